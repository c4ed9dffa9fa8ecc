"""kvtune tune: the whole job, from a model to a proved front and a chosen recipe."""

from typing import Annotated

import typer

from kvtune.cli.options import (
    Aim,
    Continuation,
    Count,
    DryRun,
    Folder,
    Model,
    Seed,
    Template,
    Text,
    Where,
)
from kvtune.cli.output import Output


def tune(
    out: Output,
    model: Model,
    where: Where,
    text: Text,
    aim: Aim,
    count: Count,
    output: Folder = None,
    template: Template = "search-fast",
    continuation: Continuation = 128,
    seed: Seed = 0,
    fresh: Annotated[bool, typer.Option("--fresh", help="Forget the folder's search.")] = False,
    dry_run: DryRun = False,
) -> None:
    """Calibrate, search and prove: the whole job for MODEL.

    What the run folder already holds is used again, so the same command goes on after an
    interruption.
    """
    from kvtune.cli import front, plan, run
    from kvtune.cli.job import Job, folder_for, template_of

    run.goal_of(aim, count, 1)  # refused before anything is loaded
    job = Job.of(model, where, text, continuation, seed)
    folder, opened = folder_for(output, model), template_of(template)
    if dry_run:
        return plan.show(out, job, opened, count, folder, trials=aim.trials)
    limits = run.limits_of(folder, aim, anew=fresh)
    run.check_study(limits)
    out.resume = run.command_line()
    tuner = run.open_run(out, job, folder, opened, count, run.begun(limits, folder), aim)
    job.save(folder, opened)
    summary = tuner.run(out.resume)
    front.show(out, summary, folder, model, aim.choose_within)
