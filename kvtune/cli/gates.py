"""Proof and gates: a recipe's quality on held-out text, held to limits with their margins."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from kvtune.cli import amounts
from kvtune.cli.generate import forced
from kvtune.cli.job import bytes_context, check_length, read_texts
from kvtune.cli.options import Count, Text, Where
from kvtune.cli.output import Output
from kvtune.cli.verdicts import HEADS, Verdict, against
from kvtune.errors import GateError

if TYPE_CHECKING:
    from kvtune.baseline import Baseline, Evidence
    from kvtune.prove import Proof
    from kvtune.texts import Document

PANEL = "Gates"
FEW = 4  # sequences below which a bootstrap interval is too narrow to judge a baseline by


@dataclass(frozen=True)
class Gates:
    """Limits that a proof is held to."""

    max_kl: Annotated[
        float | None,
        typer.Option(min=0, rich_help_panel=PANEL, help="Mean KL from the dense model, in nats."),
    ] = None
    max_flips: Annotated[
        float | None,
        typer.Option(
            parser=amounts.share,
            metavar="SHARE",
            rich_help_panel=PANEL,
            help="Share of positions whose first choice changes: 2% or 0.02.",
        ),
    ] = None
    min_ratio: Annotated[
        float | None,
        typer.Option(min=0, rich_help_panel=PANEL, help="How many times smaller than 16 bit."),
    ] = None

    def any(self) -> bool:
        """Whether there is a limit at all."""
        return any(limit is not None for limit in vars(self).values())


@dataclass(frozen=True)
class Versus:
    """An earlier proof that a new one is held to, and where the new one is kept."""

    baseline: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            rich_help_panel=PANEL,
            help="Fail when worse than this proof: of --save-baseline, or of --json.",
        ),
    ] = None
    baseline_slack: Annotated[
        float,
        typer.Option(
            parser=amounts.share,
            metavar="SHARE",
            rich_help_panel=PANEL,
            help="How much larger than the baseline's the cache may be: 1% or 0.01.",
        ),
    ] = 0.0
    save_baseline: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            rich_help_panel=PANEL,
            help="Keep this proof as a baseline, when its gates hold.",
        ),
    ] = None

    def any(self) -> bool:
        """Whether a proof is compared or kept."""
        return self.baseline is not None or self.save_baseline is not None

    def held(self) -> Baseline | None:
        """Reads the baseline, if there is one; errors as `Baseline.load`."""
        from kvtune.baseline import Baseline

        return None if self.baseline is None else Baseline.load(self.baseline)

    def keep(self, recipe: str, found: Measured) -> None:
        """Writes the new baseline, if it is wanted."""
        from kvtune.baseline import Baseline

        if self.save_baseline is not None:
            Baseline(recipe, *found).save(self.save_baseline)


@dataclass(frozen=True)
class Asked:
    """What a proof is made on."""

    model: str
    where: Where
    text: Text
    count: Count
    steps: int  # tokens generated behind each context
    force: bool
    draft: tuple[Any, Any] | None = None  # a small model and its tokenizer


class Measured(NamedTuple):
    """A proof and what it was made on."""

    proof: Proof
    evidence: Evidence


def verdicts(gates: Gates, proof: Proof) -> list[Verdict]:
    """Holds a proof to the limits that were given."""
    found = []
    if gates.max_kl is not None:
        interval = (proof.kl_low, proof.kl_high)
        found.append(Verdict.of("max-kl", proof.kl, gates.max_kl, interval))
    if gates.max_flips is not None:
        interval = (proof.flips_low, proof.flips_high)
        found.append(Verdict.of("max-flips", proof.flips, gates.max_flips, interval))
    if gates.min_ratio is not None:
        found.append(Verdict.of("min-ratio", proof.ratio, gates.min_ratio, least=True))
    return found


def measured(
    out: Output, path: Path, opened: tuple[Any, Any], asked: Asked, held: Baseline | None
) -> Measured:
    """Measures a recipe by generation on the part of the text that proofs are made on.

    Raises:
        IntegrityError: the recipe, or the baseline `held`, is another model's.
        UsageError: the baseline was measured at other sizes.
    """
    from kvtune import recipe as recipes
    from kvtune.bank import Sizes
    from kvtune.models import facts, fingerprint
    from kvtune.prefill import Draft
    from kvtune.prove import prove

    model, tokenizer = opened
    known, text = facts(model.config), asked.text
    check_length(known, text.context, asked.steps)
    at = bytes_context(out, known, asked.count.bytes_at)
    if held:
        held.check_model(fingerprint(model))
        held.check_sizes(text.context, asked.steps, at, asked.count.batch)
    documents = read_texts(text, asked.where)["proof"]
    out.say("proof by generation", 0, 1)
    proof = prove(
        model,
        tokenizer,
        documents,
        path,
        sizes=Sizes(text.sequences, text.context, asked.steps),
        steps=asked.steps,
        bytes_context=at,
        batch=asked.count.batch,
        force=asked.force,
        draft=asked.draft and Draft(*asked.draft),
    )
    out.say("proof by generation", 1, 1)
    if asked.force:
        forced(out, recipes.load(path), model)
    return Measured(proof, _evidence(asked, model, documents, proof))


def _evidence(asked: Asked, model: Any, documents: list[Document], proof: Proof) -> Evidence:
    from kvtune.baseline import Evidence
    from kvtune.models import fingerprint, label
    from kvtune.texts import digest

    dtype = str(model.dtype).removeprefix("torch.")
    name, texts = label(asked.model), digest(documents)
    return Evidence(name, fingerprint(model), texts, dtype, asked.steps, proof.rows)


def judge(
    out: Output, found: Measured, gates: Gates, versus: Versus, held: Baseline | None
) -> list[Verdict]:
    """Prints every number of a proof, and every gate; returns the verdicts."""
    judged = verdicts(gates, found.proof)
    if held:
        judged += against(held, *found, versus.baseline_slack)
        how = "paired" if held.pairs_with(found.evidence) else "intervals"
        out.data["baseline"] = {"recipe": held.recipe, "how": how, "proof": held.proof.table()}
        if how == "intervals":
            out.warn(
                "The baseline was measured at other positions (other text or --sequences), so "
                "intervals are compared: only a large change can fail."
            )
        if len(found.evidence.rows) < FEW:
            out.warn(
                f"{len(found.evidence.rows)} sequences say little about chance: a change of chance "
                f"may fail, too. Give --sequences {2 * FEW} or more."
            )
    out.data |= {"proof": found.proof.table(), "evidence": found.evidence.table()}
    out.data["gates"] = [vars(verdict) for verdict in judged]
    out.print(*sentences(found.proof))
    if judged:
        out.print(_table(judged))
    return judged


def sentences(proof: Proof) -> list[str]:
    """The numbers of a proof, in words."""
    return [
        f"KL {proof.kl:.4f} nats (95 %: {proof.kl_low:.4f} to {proof.kl_high:.4f}), flips "
        f"{proof.flips:.1%} ({proof.flips_low:.1%} to {proof.flips_high:.1%}), over "
        f"{proof.positions:,} positions after {proof.context:,} tokens.",
        f"{proof.bits:.2f} true bits per value: {amounts.size(proof.bytes)}, {proof.ratio:.2f}x "
        f"smaller than 16 bit, at {proof.bytes_context:,} tokens, batch {proof.batch}.",
    ]


def demand(judged: list[Verdict]) -> None:
    """Raises GateError when a gate was missed."""
    if failed := [verdict.gate for verdict in judged if not verdict.passed]:
        raise GateError(f"The recipe misses {', '.join(failed)}.", "Choose one with more bits.")


def _table(judged: list[Verdict]) -> Table:
    table = Table(box=SIMPLE_HEAD)
    for name in HEADS:
        table.add_column(name, justify="left" if name in (HEADS[0], HEADS[-1]) else "right")
    for verdict in judged:
        table.add_row(*verdict.cells())
    return table
