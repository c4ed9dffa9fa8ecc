"""kvtune search: from a calibrated run folder to a study and a proved front."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from kvtune.cli.options import Aim, Count, DryRun
from kvtune.cli.output import Output
from kvtune.cli.workers import Workers, check, spawn
from kvtune.errors import UsageError

_search: Callable[..., Any] = partial(typer.Option, rich_help_panel="Search")
_model: Callable[..., Any] = partial(typer.Option, rich_help_panel="Model")
Directory = Annotated[Path, typer.Argument(metavar="DIR", help="A folder made by calibrate.")]


@dataclass(frozen=True)
class Study:
    """Where the search is kept, and what becomes of the one there is."""

    storage: Annotated[str, _search(metavar="URL", help="A database URL; or DIR/study.db.")] = ""
    resume: Annotated[bool, _search("--resume", help="Go on with the search there is.")] = False
    fresh: Annotated[bool, _search("--fresh", help="Forget the search there is.")] = False
    seed: Annotated[int | None, _search(help="Of the trials; calibrate's when left out.")] = None
    offline: Annotated[bool, _model("--offline", help="Never ask the network.")] = False


def search(
    out: Output,
    folder: Directory,
    aim: Aim,
    study: Study,
    count: Count,
    workers: Workers = 1,
    dry_run: DryRun = False,
) -> None:
    """Search for recipes with the profile of DIR, and prove the front.

    Model, text and template are those that calibrate wrote into the folder. The same command on
    other machines, with a copy of DIR and the same --storage on a server, joins the search.
    """
    from kvtune.cli import front, plan, run
    from kvtune.cli.job import TEMPLATE, Job
    from kvtune.recipe import load

    if study.resume and study.fresh:
        raise UsageError("--resume and --fresh exclude each other.")
    run.goal_of(aim, count, 1)  # refused before anything is loaded
    job, template = Job.load(folder).changed(study.seed, study.offline), load(folder / TEMPLATE)
    if dry_run:
        return plan.show(out, job, template, count, folder, trials=aim.trials, calibrated=True)
    limits = run.limits_of(folder, aim, study.storage, resume=study.resume, anew=study.fresh)
    check(workers, study.storage)
    run.check_study(limits)
    out.resume = run.command_line("--resume")
    limits = run.begun(limits, folder)
    with spawn(workers, sys.argv[1:]):
        tuner = run.open_run(out, job, folder, template, count, limits, aim)
        summary = tuner.run(out.resume, calibrated=True)
    front.show(out, summary or tuner.finished(), folder, job.model, aim.choose_within)
