"""A tuning run from the command line: its Tuner, where its study lives, and how it goes on."""

from __future__ import annotations

import shlex
import sys
from dataclasses import replace
from pathlib import Path

from kvtune import runs
from kvtune.bank import Sizes
from kvtune.cli.job import Job, bytes_context, check_length, open_model, read_texts
from kvtune.cli.options import Aim, Count
from kvtune.cli.output import Output
from kvtune.errors import MissingInputError, UsageError
from kvtune.goal import Bounds, Goal
from kvtune.models import facts
from kvtune.publish import Settings
from kvtune.recipe import Recipe
from kvtune.search import STUDY, Limits
from kvtune.storage import address, is_server
from kvtune.study import fresh, rows
from kvtune.tune import Tuner


def open_run(
    out: Output,
    job: Job,
    folder: Path,
    template: Recipe,
    count: Count,
    limits: Limits,
    aim: Aim,
) -> Tuner:
    """Loads model and texts and returns the Tuner of a folder."""
    model, tokenizer = open_model(out, job.model, job.where)
    known = facts(model.config)
    check_length(known, job.text.context, job.continuation)
    settings = Settings(
        sizes=Sizes(job.text.sequences, job.text.context, job.continuation),
        goal=goal_of(aim, count, bytes_context(out, known, count.bytes_at)),
        seed=job.seed,
        proof_steps=min(Settings.proof_steps, job.continuation),
        max_kl=aim.choose_within,
        latency_table=aim.latency_table,
    )
    texts = read_texts(job.text, job.where)
    tuner = Tuner(model, tokenizer, texts, template, folder, name=job.model, settings=settings)
    tuner.limits, tuner.say = limits, out.say
    for why in tuner.unsaving:
        out.warn(f"A setting is left out: {why}.")
    if tuner.untimed:
        out.warn(f"{tuner.untimed} settings are left out: no kernel reads them, so none is timed.")
    return tuner


def goal_of(aim: Aim, count: Count, context: int) -> Goal:
    """What a search is for, as the options say it; UsageError when they contradict themselves."""
    bounds = Bounds(aim.max_bytes, aim.max_kl, aim.max_latency, aim.min_ratio)
    return Goal.parse(aim.objective, context, count.batch, bounds, aim.bits)


def limits_of(folder: Path, aim: Aim, storage: str = "", **rest: bool) -> Limits:
    """The limits of a run: its study is the folder's own unless another place is named.

    A study on a server is joined without a word: its workers come and go, and one of another
    search is refused in any case.
    """
    limits = Limits(storage or str(folder / runs.STUDY), aim.trials, aim.time, **rest)
    joins = bool(storage) and is_server(address(storage))
    return replace(limits, resume=True) if joins else limits


def check_study(limits: Limits) -> None:
    """Refuses, before anything is loaded, a study that is broken, or that has rows unasked for."""
    try:
        held = rows(limits.storage, STUDY)
    except MissingInputError:
        return
    if held and not limits.resume and not limits.anew:
        what = f"{len(held)} trials are in {limits.storage} already."
        raise UsageError(what, "Use --resume to go on or --fresh to start anew.")


def begun(limits: Limits, folder: Path) -> Limits:
    """The limits of a run whose earlier search is forgotten where that was asked for."""
    if limits.anew:
        fresh(limits.storage, STUDY)
        (folder / runs.SUMMARY).unlink(missing_ok=True)
        return replace(limits, resume=True, anew=False)
    return limits


def command_line(*more: str) -> str:
    """The user's command as it goes on after an interruption, with some words added."""
    words = [word for word in sys.argv[1:] if word not in ("--fresh", *more)]
    return shlex.join(["kvtune", *words, *more])
