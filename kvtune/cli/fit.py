"""kvtune fit: a recipe and a profile become the tensors that the recipe's codecs read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvtune.cli.amounts import size
from kvtune.cli.options import RecipeName
from kvtune.cli.output import Output

ProfileFile = Annotated[
    Path, typer.Option("--profile", metavar="FILE", help="A profile, or a run folder with one.")
]
Target = Annotated[
    Path | None,
    typer.Option("--output", "-o", metavar="DIR", help="The recipe's folder; RECIPE-fitted."),
]


def fit(out: Output, recipe: RecipeName, profile: ProfileFile, output: Target = None) -> None:
    """Fit RECIPE to a profile: rotations, codebooks and channel sets.

    Writes recipe.toml, and kvtune.safetensors where its codecs read fitted tensors.
    """
    from kvtune import fit, runs, shipped
    from kvtune.profile import Profile
    from kvtune.recipe import RECIPE_FILE, load

    path = shipped.find(recipe)
    read = load(path)
    held = Profile.load(profile / runs.PROFILE if profile.is_dir() else profile)
    bound, tensors = fit.fit(read, held)
    stem = path.parent.name if path.name == RECIPE_FILE else path.stem
    folder = output or Path(f"{stem}-fitted")
    shipped_as = fit.ship(bound, tensors, folder / RECIPE_FILE)
    nbytes = sum(x.nbytes for x in tensors.values())
    out.data |= {
        "recipe": str(folder / RECIPE_FILE),
        "tensors": len(tensors),
        "bytes": nbytes,
        "sha256": shipped_as.artifact.sha256 if shipped_as.artifact else None,
        "next": f"kvtune apply {folder} --model MODEL",
    }
    what = f"{len(tensors)} tensors, {size(nbytes)}" if tensors else "nothing to fit"
    out.print(f"{folder} holds the recipe: {what}. Next:\n\n  {out.data['next']}")
