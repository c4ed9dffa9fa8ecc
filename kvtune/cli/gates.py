"""Proof and gates: a recipe's quality on held-out text, held to limits with their margins."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from kvtune.cli import amounts
from kvtune.cli.generate import forced
from kvtune.cli.job import bytes_context, check_length, read_texts
from kvtune.cli.options import Count, Text, Where
from kvtune.cli.output import Output
from kvtune.errors import GateError

if TYPE_CHECKING:
    from kvtune.prove import Proof

PANEL = "Gates"


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
class Asked:
    """What a proof is made on."""

    where: Where
    text: Text
    count: Count
    steps: int  # tokens generated behind each context


@dataclass(frozen=True)
class Verdict:
    """One gate: what was measured, what is allowed, and how much room is left."""

    gate: str
    value: float
    limit: float
    margin: float  # below zero when the gate fails
    interval: tuple[float, float] | None
    passed: bool


def verdicts(gates: Gates, proof: Proof) -> list[Verdict]:
    """Holds a proof to the gates that were given."""
    found = []
    if gates.max_kl is not None:
        interval = (proof.kl_low, proof.kl_high)
        found.append(_verdict("max-kl", proof.kl, gates.max_kl, gates.max_kl - proof.kl, interval))
    if gates.max_flips is not None:
        room, interval = gates.max_flips - proof.flips, (proof.flips_low, proof.flips_high)
        found.append(_verdict("max-flips", proof.flips, gates.max_flips, room, interval))
    if gates.min_ratio is not None:
        room = proof.ratio - gates.min_ratio
        found.append(_verdict("min-ratio", proof.ratio, gates.min_ratio, room, None))
    return found


def _verdict(
    gate: str, value: float, limit: float, margin: float, interval: tuple[float, float] | None
) -> Verdict:
    return Verdict(gate, value, limit, margin, interval, margin >= 0)


def measured(out: Output, path: Path, opened: tuple[Any, Any], asked: Asked, force: bool) -> Proof:
    """Measures a recipe by generation on the part of the text that proofs are made on."""
    from kvtune import recipe as recipes
    from kvtune.bank import Sizes
    from kvtune.models import facts
    from kvtune.prove import prove

    model, tokenizer = opened
    known, text = facts(model.config), asked.text
    check_length(known, text.context, asked.steps)
    at = bytes_context(out, known, asked.count.bytes_at)
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
        force=force,
    )
    out.say("proof by generation", 1, 1)
    if force:
        forced(out, recipes.load(path), model)
    return proof


def judge(out: Output, proof: Proof, gates: Gates) -> None:
    """Prints every number of a proof, and every gate.

    Raises:
        GateError: a gate failed.
    """
    judged = verdicts(gates, proof)
    out.data |= {"proof": proof.table(), "gates": [vars(verdict) for verdict in judged]}
    _show(out, proof, judged)
    if failed := [verdict.gate for verdict in judged if not verdict.passed]:
        raise GateError(f"The recipe misses {', '.join(failed)}.", "Choose one with more bits.")


def _show(out: Output, proof: Proof, judged: list[Verdict]) -> None:
    out.print(
        f"KL {proof.kl:.4f} nats (95 %: {proof.kl_low:.4f} to {proof.kl_high:.4f}), flips "
        f"{proof.flips:.1%} ({proof.flips_low:.1%} to {proof.flips_high:.1%}), over "
        f"{proof.positions:,} positions after {proof.context:,} tokens.",
        f"{proof.bits:.2f} true bits per value: {amounts.size(proof.bytes)}, {proof.ratio:.2f}x "
        f"smaller than 16 bit, at {proof.bytes_context:,} tokens, batch {proof.batch}.",
    )
    if not judged:
        return
    table = Table(box=SIMPLE_HEAD)
    for name in ("gate", "value", "limit", "margin", "95 % interval", ""):
        table.add_column(name, justify="left" if name in ("gate", "") else "right")
    for verdict in judged:
        table.add_row(*_cells(verdict))
    out.print(table)


def _cells(verdict: Verdict) -> list[str]:
    low_high = verdict.interval
    interval = (
        f"{_shown(verdict, low_high[0])} to {_shown(verdict, low_high[1])}" if low_high else ""
    )
    numbers = [_shown(verdict, x) for x in (verdict.value, verdict.limit, verdict.margin)]
    return [verdict.gate, *numbers, interval, "ok" if verdict.passed else "FAILED"]


def _shown(verdict: Verdict, value: float) -> str:
    return {"max-kl": f"{value:.4f}", "max-flips": f"{value:.2%}"}.get(
        verdict.gate, f"{value:.2f}x"
    )
