"""kvtune search: from a calibrated run folder to a study and a proved front."""

from pathlib import Path
from typing import Annotated

import typer

from kvtune.cli.options import Count, DryRun, MaxKl, Time, Trials
from kvtune.cli.output import Output
from kvtune.errors import UsageError

PANEL = "Search"
Storage = Annotated[
    str,
    typer.Option(metavar="URL", rich_help_panel=PANEL, help="A database URL; DIR/study.db."),
]
Objective = Annotated[
    str, typer.Option(metavar="NAMES", rich_help_panel=PANEL, help="What the front is over.")
]
Resume = Annotated[
    bool, typer.Option("--resume", rich_help_panel=PANEL, help="Go on with the search there is.")
]
Fresh = Annotated[
    bool, typer.Option("--fresh", rich_help_panel=PANEL, help="Forget the search there is.")
]
Offline = Annotated[bool, typer.Option("--offline", help="Never ask the network.")]


def search(
    out: Output,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder made by calibrate.")],
    count: Count,
    objective: Objective = "memory,accuracy",
    trials: Trials = 40,
    time: Time = None,
    max_kl: MaxKl = 0.02,
    storage: Storage = "",
    resume: Resume = False,
    fresh: Fresh = False,
    seed: Annotated[int | None, typer.Option(help="As calibrate's, when left out.")] = None,
    offline: Offline = False,
    dry_run: DryRun = False,
) -> None:
    """Search for recipes with the profile of DIR, and prove the front.

    Model, text and template are those that calibrate wrote into the folder.
    """
    from kvtune.cli import front, plan, run
    from kvtune.cli.job import TEMPLATE, Job
    from kvtune.recipe import load

    if resume and fresh:
        raise UsageError("--resume and --fresh exclude each other.")
    job = Job.load(folder).changed(seed, offline)
    template = load(folder / TEMPLATE)
    if dry_run:
        return plan.show(out, job, template, count, folder, trials=trials, calibrated=True)
    limits = run.Limits(storage or run.study_of(folder), time, resume, fresh, calibrated=True)
    run.check_study(limits)
    out.resume = run.command_line("--resume")
    tuner = run.open_run(
        out,
        job,
        folder,
        template,
        count,
        limits,
        trials=trials,
        max_kl=max_kl,
        objective=objective,
    )
    summary = run.finished(tuner, out.resume)
    front.show(out, summary, folder, job.model, max_kl)
