"""kvtune fit: a recipe and a profile become the tensors that the recipe's codecs read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvtune.cli import amounts
from kvtune.cli.amounts import size
from kvtune.cli.options import RecipeName, Seed, Where
from kvtune.cli.output import Output

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvtune.fit import Tensors
    from kvtune.policy import Policy
    from kvtune.profile import Profile

ProfileFile = Annotated[
    Path, typer.Option("--profile", metavar="FILE", help="A profile, or a run folder with one.")
]
Target = Annotated[
    Path | None,
    typer.Option("--output", "-o", metavar="DIR", help="The recipe's folder; RECIPE-fitted."),
]
PANEL = "Training, of codecs that do"


@dataclass(frozen=True)
class Training:
    """What codecs that train are trained on, and for how long."""

    model: Annotated[
        str,
        typer.Option(
            metavar="MODEL", rich_help_panel=PANEL, help="The profile's model; trains with it."
        ),
    ] = ""
    data: Annotated[
        str,
        typer.Option(
            metavar="TEXT",
            rich_help_panel=PANEL,
            help="builtin, text or JSONL files, or hf:NAME[:SPLIT][:FIELD].",
        ),
    ] = "builtin"
    sequences: Annotated[
        int, typer.Option(min=1, rich_help_panel=PANEL, help="Sequences cut out of the text.")
    ] = 12
    context: Annotated[
        int,
        typer.Option(
            parser=amounts.tokens,
            metavar="TOKENS",
            rich_help_panel=PANEL,
            help="Tokens of each that are read, and not asked about.",
        ),
    ] = 1024
    continuation: Annotated[
        int,
        typer.Option(
            parser=amounts.tokens,
            metavar="TOKENS",
            rich_help_panel=PANEL,
            help="Tokens behind them whose attention is trained.",
        ),
    ] = 512
    steps: Annotated[
        int, typer.Option(min=1, rich_help_panel=PANEL, help="Steps of each layer.")
    ] = 200


def fit(
    out: Output,
    recipe: RecipeName,
    profile: ProfileFile,
    training: Training,
    where: Where,
    output: Target = None,
    seed: Seed = 0,
) -> None:
    """Fit RECIPE to a profile: rotations, codebooks, channel sets and projections.

    Writes recipe.toml, and kvtune.safetensors where its codecs read fitted tensors. Codecs that
    train are trained with --model, layer by layer; a fit that was stopped goes on where it was.
    """
    from kvtune import fit, runs, shipped
    from kvtune.profile import Profile
    from kvtune.recipe import RECIPE_FILE, load

    path = shipped.find(recipe)
    read = load(path)
    held = Profile.load(profile / runs.PROFILE if profile.is_dir() else profile)
    stem = path.parent.name if path.name == RECIPE_FILE else path.stem
    folder = output or Path(f"{stem}-fitted")
    bound, tensors = fit.fit(read, held)
    policies = bound.policies(fit.known_by(held))
    if training.model:
        tensors |= _trained(out, training, where, seed, folder, policies, held)
    elif untrained := _trainable(policies):
        out.warn(
            f"{untrained} keeps its closed form. To train it, run: "
            f"kvtune fit {recipe} --profile {profile} --model MODEL"
        )
    shipped_as = fit.ship(bound, tensors, folder / RECIPE_FILE)
    nbytes = sum(x.nbytes for x in tensors.values())
    out.data |= {
        "recipe": str(folder / RECIPE_FILE),
        "tensors": len(tensors),
        "bytes": nbytes,
        "sha256": shipped_as.artifact.sha256 if shipped_as.artifact else None,
        "next": f"kvtune apply {folder} --model {training.model or 'MODEL'}",
    }
    what = f"{len(tensors)} tensors, {size(nbytes)}" if tensors else "nothing to fit"
    if bound.layers != read.layers:
        what = f"budgets of {len(bound.layers)} groups of layers{f', {what}' if tensors else ''}"
    out.print(f"{folder} holds the recipe: {what}. Next:\n\n  {out.data['next']}")


def _trainable(policies: Sequence[Policy]) -> str:
    """The codecs that train, by name."""
    codecs = {codec for own in policies for chain in own.chains for codec in chain.codecs}
    return ", ".join(sorted({codec.name() for codec in codecs if codec.trains}))


def _trained(
    out: Output,
    training: Training,
    where: Where,
    seed: int,
    folder: Path,
    policies: Sequence[Policy],
    profile: Profile,
) -> Tensors:
    """The tensors of all layers that train, with what training was worth in the output's data."""
    from kvtune.bank import Sizes, text_tokens
    from kvtune.cli import run
    from kvtune.cli.job import check_length, open_model, read_texts
    from kvtune.cli.options import Text
    from kvtune.errors import IntegrityError
    from kvtune.fit import Fitter, known_by
    from kvtune.models import fingerprint
    from kvtune.trainer import FOLDER, Trainer, trains
    from kvtune.training import Course

    if not trains(policies):
        out.warn("No codec of the recipe trains: --model changes nothing.")
        return {}
    check_length(known_by(profile), training.context, training.continuation)
    model, tokenizer = open_model(out, training.model, where)
    if (found := fingerprint(model)) != profile.meta["fingerprint"]:
        raise IntegrityError(
            f"The profile is of another model than {training.model} ({found[:19]}...).",
            f"Calibrate that model: kvtune calibrate {training.model}",
        )
    out.resume = run.command_line()
    sizes = Sizes(training.sequences, training.context, training.continuation)
    text = Text(training.data, sizes.sequences, sizes.context)
    tokens = text_tokens(read_texts(text, where)["calibrate"], tokenizer, sizes, "calibrate")
    course = Course(steps=training.steps, seed=seed)
    trainer = Trainer(model, tokens, sizes.context, Fitter(profile), folder, course)
    layers = trainer.run(policies, out.say)
    before, after = (
        sum(getattr(one, name) for one in layers.values()) for name in ("before", "after")
    )
    out.data["trained"] = {"layers": len(layers), "before": before, "after": after}
    out.print(
        f"{len(layers)} layers are trained: their codes alone cost {before:.4f} nats before, "
        f"{after:.4f} after, summed on the text of the training.",
        f"{folder / FOLDER} holds them one by one, for a fit that goes on, and may be deleted.",
    )
    return {name: x for one in layers.values() for name, x in one.tensors.items()}
