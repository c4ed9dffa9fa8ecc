"""What a run folder holds for a report, and what it lacks."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from kvtune import recipe as recipes
from kvtune import runs
from kvtune.errors import IntegrityError, MissingInputError
from kvtune.profile import Profile
from kvtune.recipe import Recipe
from kvtune.report.records import Job, Point, Scores, Summary, Trials

TRIALS, JOB, SCORES = "trials.json", "run.json", "scores"
R = TypeVar("R", bound=BaseModel)


@dataclass(frozen=True)
class Missing:
    """A part that the folder does not hold, and the command that makes it."""

    part: str
    words: tuple[str, ...]

    @property
    def command(self) -> str:
        """The words as a shell takes them."""
        return shlex.join(self.words)


@dataclass(frozen=True)
class Run:
    """A run folder as the report shows it; None or empty is what it does not hold."""

    folder: Path
    summary: Summary | None
    profile: Profile | None
    trials: Trials | None
    job: Job | None
    recipes: dict[str, tuple[str, Recipe]]  # by file below the folder: its text, and read
    scores: tuple[Scores, ...]
    command: str  # that made the folder, as its model card says

    @property
    def model(self) -> str:
        """The model's name."""
        named = self.summary.model if self.summary else ""
        return named or (str(self.profile.meta.get("model", "")) if self.profile else "")

    @property
    def chosen(self) -> Point | None:
        """The chosen point of the front."""
        return self.summary.points[self.summary.chosen] if self.summary else None

    def missing(self, place: str) -> list[Missing]:
        """What the folder lacks; commands speak of it as `place`."""
        model = self.job.model if self.job and "/" not in self.job.model[:1] else "MODEL"
        calibrate = ("kvtune", "calibrate", model or "MODEL", "-o", place)
        again = ("kvtune", "search", place, *(("--fresh",) if self.summary else ()))
        suite = ("kvtune", "apply", f"{place}/chosen", "--model", model or "MODEL")
        found: list[tuple[object, str, tuple[str, ...]]]
        profile = "the price table and the spectra (profile.safetensors)"
        found = [(self.profile, profile, calibrate)]
        if self.summary is None:  # all the rest comes with the front, or after it
            found.append((None, "the proved front (tune.json)", again))
        else:
            held = "uniform recipes on held-out text (held_out in tune.json)"
            found += [
                (self.summary.held_out, held, again),
                (self.trials, f"the search's trials ({TRIALS})", again),
                (self.scores, f"task scores ({SCORES}/)", (*suite, "--suite", "quick")),
            ]
        return [Missing(part, words) for there, part, words in found if not there]


def read(folder: Path) -> Run:
    """Reads a run folder.

    Raises:
        MissingInputError: it holds neither a profile nor a proved front.
        IntegrityError: one of its files is damaged.
    """
    summary = _timed(_record(folder / runs.SUMMARY, Summary))
    profile = _profile(folder)
    if summary is None and profile is None:
        what = f"{folder} holds nothing to report: no {runs.SUMMARY} and no {runs.PROFILE}."
        raise MissingInputError(
            what, f"Run: {shlex.join(['kvtune', 'tune', 'MODEL', '-o', str(folder)])}"
        )
    if summary and summary.chosen >= len(summary.points):
        raise _damaged(
            folder / runs.SUMMARY, f"it chose point {summary.chosen} of {len(summary.points)}"
        )
    scores = [_record(file, Scores) for file in sorted((folder / SCORES).glob("*.json"))]
    return Run(
        folder,
        summary,
        profile,
        _record(folder / TRIALS, Trials),
        _record(folder / JOB, Job),
        _recipes(folder, summary),
        tuple(found for found in scores if found),
        _command(folder),
    )


def _timed(summary: Summary | None) -> Summary | None:
    """The summary, its proved points with the latency that was found on held-out text."""
    if summary is None:
        return None
    known = {(own.origin, own.bytes): own.latency for own in summary.held_out}
    points = tuple(
        point.model_copy(update={"latency": known.get((point.origin, point.bytes))})
        if point.latency is None
        else point
        for point in summary.points
    )
    return summary.model_copy(update={"points": points})


def _profile(folder: Path) -> Profile | None:
    file = folder / runs.PROFILE
    return Profile.load(file) if file.is_file() else None


def _record(file: Path, kind: type[R]) -> R | None:
    """One JSON file, None when it is not there."""
    if not file.is_file():
        return None
    try:
        return kind.model_validate(json.loads(file.read_text(encoding="utf-8")))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise _damaged(file, f"{place}: {first['msg']}" if place else first["msg"]) from None
    except (ValueError, RecursionError) as error:
        raise _damaged(file, str(error)) from None


def _damaged(file: Path, why: str) -> IntegrityError:
    hint = f"Delete {file} and run the command that made it again."
    return IntegrityError(f"{file} is damaged: {why}.", hint)


def _recipes(folder: Path, summary: Summary | None) -> dict[str, tuple[str, Recipe]]:
    """The recipes of the front's points that are still there."""
    found = {}
    for point in summary.points if summary else ():
        # a name out of a stranger's file must not lead out of the folder
        if not re.fullmatch(rf"{runs.FRONT}/\d+\.toml", point.file):
            raise _damaged(folder / runs.SUMMARY, f"{point.file!r} is no file of the front")
        file = folder / point.file
        if file.is_file():
            read_ = recipes.load(file)
            found[point.file] = file.read_text(encoding="utf-8"), read_
    return found


def _command(folder: Path) -> str:
    """The command in the chosen recipe's model card, which is the one that was typed."""
    card = folder / runs.CHOSEN / "README.md"
    if not card.is_file():
        return ""
    said = re.search(r"^Made by `(.*)`\.$", card.read_text(encoding="utf-8"), re.MULTILINE)
    return said[1] if said else ""
