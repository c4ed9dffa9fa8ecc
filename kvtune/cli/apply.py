"""kvtune apply: generate with a recipe, or prove it on held-out text and hold it to gates."""

from typing import Annotated

import typer

from kvtune.cli.gates import Asked, Gates, Versus, demand, judge, measured, sentences
from kvtune.cli.generate import Prompt, generate
from kvtune.cli.options import Continuation, Count, Force, RecipeName, Text, Where
from kvtune.cli.output import Output
from kvtune.cli.reports import Reports, reported
from kvtune.cli.suite import Suite, scored
from kvtune.errors import UsageError

ModelOption = Annotated[
    str, typer.Option(metavar="MODEL", rich_help_panel="Model", help="As for kvtune tune.")
]


Drafter = Annotated[
    str | None,
    typer.Option(
        "--draft",
        metavar="MODEL",
        rich_help_panel="Model",
        help="A small model of the same family, for recipes that look ahead or cut prompts.",
    ),
]


def apply(
    out: Output,
    recipe: RecipeName,
    model: ModelOption,
    where: Where,
    prompt: Prompt,
    gates: Gates,
    versus: Versus,
    reports: Reports,
    suite: Suite,
    text: Text,
    count: Count,
    continuation: Continuation = 48,
    draft: Drafter = None,
    force: Force = False,
) -> None:
    """Generate with RECIPE (--prompt), or prove it on held-out text.

    A proof exits with 3 when a gate fails: --max-kl, --max-flips, --min-ratio, --max-drop,
    --baseline.
    """
    from kvtune import shipped
    from kvtune.cli.job import open_model

    out.data |= {"recipe": recipe, "model": model}
    with reported(out, reports, recipe, model) as report:
        proves = any(bundle.any() for bundle in (gates, versus, reports, suite))
        if prompt.prompt is not None and proves:
            what = "--prompt generates text; gates and their files need a proof"
            raise UsageError(f"{what}, so leave one of them out.")
        suite.check()
        path, held = shipped.find(recipe), versus.held()
        opened = open_model(out, model, where)
        small = None if draft is None else open_model(out, draft, where)
        if prompt.prompt is not None:
            return generate(out, path, opened, prompt, force, small)
        asked = Asked(model, where, text, count, continuation, force, small)
        found = measured(out, path, opened, asked, held)
        report.lines = sentences(found.proof)
        report.verdicts = judge(out, found, gates, versus, held)
        fallen = scored(out, path, opened, suite, text, where, force, small)
        report.verdicts += fallen
        out.data["gates"] += [vars(verdict) for verdict in fallen]
        demand(report.verdicts)
        versus.keep(recipe, found)
