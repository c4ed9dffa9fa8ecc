"""kvtune apply: generate with a recipe, or prove it on held-out text and hold it to gates."""

from typing import Annotated

import typer

from kvtune.cli.gates import Asked, Gates, judge, measured
from kvtune.cli.generate import Prompt, generate
from kvtune.cli.options import Continuation, Count, Force, RecipeName, Text, Where
from kvtune.cli.output import Output
from kvtune.errors import UsageError

ModelOption = Annotated[
    str, typer.Option(metavar="MODEL", rich_help_panel="Model", help="As for kvtune tune.")
]


def apply(
    out: Output,
    recipe: RecipeName,
    model: ModelOption,
    where: Where,
    prompt: Prompt,
    gates: Gates,
    text: Text,
    count: Count,
    continuation: Continuation = 48,
    force: Force = False,
) -> None:
    """Generate with RECIPE (--prompt), or prove it on held-out text.

    A proof exits with 3 when a gate fails: --max-kl, --max-flips, --min-ratio.
    """
    from kvtune import shipped
    from kvtune.cli.job import open_model

    if prompt.prompt is not None and gates.any():
        raise UsageError("--prompt generates text; gates need a proof, so leave one of them out.")
    path = shipped.find(recipe)
    opened = open_model(out, model, where)
    out.data |= {"recipe": recipe, "model": model}
    if prompt.prompt is not None:
        return generate(out, path, opened, prompt, force)
    asked = Asked(where, text, count, continuation)
    judge(out, measured(out, path, opened, asked, force), gates)
