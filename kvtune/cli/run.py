"""A tuning run from the command line: where its study lives, and when its search stops."""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvtune import runs
from kvtune.bank import Sizes
from kvtune.calibrate import find_ropes, missing_cells, priced_further
from kvtune.cli.job import Job, bytes_context, check_length, open_model, read_texts
from kvtune.cli.options import Count
from kvtune.cli.output import Output
from kvtune.errors import IntegrityError, MissingInputError, UsageError
from kvtune.measure import Bench
from kvtune.models import facts, fingerprint
from kvtune.profile import Profile
from kvtune.recipe import Recipe
from kvtune.search import OBJECTIVES, STUDY, Goal, Search
from kvtune.study import Row, fresh, rows
from kvtune.tune import Settings, Tuner, tune


@dataclass(frozen=True)
class Limits:
    """Where the study lives, when its search ends, and what becomes of rows that it has."""

    storage: str  # a database URL, or the path of an SQLite file
    seconds: float | None = None
    resume: bool = True
    anew: bool = False
    calibrated: bool = False  # the folder's profile is taken as it is, or the run refused


class Run(Tuner):
    """A Tuner whose search keeps within limits."""

    limits: Limits

    def profile(self, exact: bool = False) -> Profile:
        """The folder's profile; made when it is missing or another's, unless the limits say no."""
        if not self.limits.calibrated:
            made = super().profile(exact)
            if missing_cells(made, self.choices):  # of another template
                (self.folder / runs.PROFILE).unlink()
                made = super().profile(exact)
            return made
        held = Profile.load(self.folder / runs.PROFILE)
        if held.meta.get("fingerprint") != fingerprint(self.model):
            what = f"{self.folder / runs.PROFILE} was measured on {held.meta.get('model')}, "
            hint = f"Run: kvtune calibrate MODEL -o {self.folder}"
            raise IntegrityError(f"{what}whose fingerprint is not this model's.", hint)
        return held

    def search(
        self, profile: Profile, resume: bool, seconds: float | None = None, anew: bool = False
    ) -> list[Row]:
        """All rows of the study, as the limits say."""
        bench = Bench(self.model, self._bank("search"), find_ropes(self.model))
        if missing := missing_cells(profile, self.choices):
            seed = self.settings.seed
            profile = priced_further(self.model, bench.bank, profile, missing, seed, self.say)
        self._search = Search(bench, profile, self.choices, self.settings.goal)
        self._search.prepare(self.folder)
        if self.limits.anew:
            fresh(self.limits.storage, STUDY)
        return self._search.run(
            self.limits.storage,
            self.settings.trials,
            self.settings.seed,
            self.limits.resume,
            self.limits.seconds,
            on_trial=lambda row, total: self.say("trials", min(row.number + 1, total), total),
        )

    def bound(self) -> str:
        """A search that was cut short is another run than one that was not."""
        seconds = self.limits.seconds
        return runs.binding(run=super().bound(), seconds=seconds) if seconds else super().bound()


def open_run(
    out: Output,
    job: Job,
    folder: Path,
    template: Recipe,
    count: Count,
    limits: Limits,
    **settings: Any,
) -> Run:
    """Loads model and texts and returns the run of a folder."""
    model, tokenizer = open_model(out, job.model, job.where)
    known = facts(model.config)
    check_length(known, job.text.context, job.continuation)
    objective = settings.pop("objective", ",".join(OBJECTIVES))
    goal = Goal.parse(objective, bytes_context(out, known, count.bytes_at), count.batch)
    sizes = Sizes(job.text.sequences, job.text.context, job.continuation)
    steps = min(Settings.proof_steps, job.continuation)
    held = Settings(sizes=sizes, goal=goal, seed=job.seed, proof_steps=steps, **settings)
    texts = read_texts(job.text, job.where)
    name = job.model
    run = Run(model, tokenizer, texts, template, folder, name=name, settings=held, say=out.say)
    run.limits = limits
    return run


def study_of(folder: Path) -> str:
    """The study that a run folder holds by itself."""
    return str(folder / runs.STUDY)


def check_study(limits: Limits) -> None:
    """Refuses, before anything is loaded, a study that is broken, or that has rows unasked for."""
    try:
        held = rows(limits.storage, STUDY)
    except MissingInputError:
        return
    if held and not limits.resume and not limits.anew:
        what = f"{len(held)} trials are in {limits.storage} already."
        raise UsageError(what, "Use --resume to go on or --fresh to start anew.")


def finished(run: Run, command: str) -> dict[str, Any]:
    """Runs all stages that are not finished yet; returns the summary."""
    if run.limits.anew:
        (run.folder / runs.SUMMARY).unlink(missing_ok=True)
    return tune(run, command)


def command_line(*more: str) -> str:
    """The user's command as it goes on after an interruption, with some words added."""
    words = [word for word in sys.argv[1:] if word not in ("--fresh", *more)]
    return shlex.join(["kvtune", *words, *more])
