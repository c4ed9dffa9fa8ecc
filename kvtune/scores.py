"""Scores: what the tasks of a suite found, beside the dense model, with intervals and verdicts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kvtune.intervals import Interval, items_needed, resampled

TOLERANCE = 0.1  # a difference that may be left open when a recipe is called no worse
FEWEST = 6  # of fewer items all may fall by chance: 2 * 0.5 ** 5 is more than 5 %
UNIT, SIGNED = (0.0, 1.0), (-1.0, 1.0)


@dataclass(frozen=True)
class TaskScores:
    """One task: the scores of the same items through both caches."""

    name: str
    chance: float
    dense: tuple[float, ...]
    compressed: tuple[float, ...]
    averaged: bool = True
    details: tuple[tuple[str, float, float], ...] = ()  # name, dense mean, compressed mean

    @property
    def differences(self) -> list[float]:
        """Compressed less dense, item by item."""
        return [b - a for a, b in zip(self.dense, self.compressed, strict=True)]

    @property
    def difference(self) -> Interval:
        """The mean difference, from resampled pairs."""
        return resampled([self.differences], SIGNED)

    @property
    def at_chance(self) -> bool:
        """Whether the dense model does no better than guessing, as far as these items tell."""
        return resampled([self.dense], UNIT).low <= self.chance

    @property
    def informative(self) -> bool:
        """Whether it enters the mean."""
        return self.averaged and not self.at_chance

    def table(self) -> dict[str, Any]:
        """Plain values."""
        verdict, needed = judged(self.difference, self.differences)
        if self.at_chance:
            verdict, needed = "cannot tell", None
        held: dict[str, Any] = {
            "chance": _rounded(self.chance),
            "n": len(self.dense),
            "dense": _side(self.dense),
            "compressed": _side(self.compressed),
            "difference": _interval(self.difference),
            "verdict": verdict,
            "needs": needed,
            "at_chance": self.at_chance,
            "averaged": self.informative,
        }
        if self.details:
            held["details"] = {
                name: {"dense": _rounded(dense), "compressed": _rounded(compressed)}
                for name, dense, compressed in self.details
            }
        return held


@dataclass(frozen=True)
class Scores:
    """A suite at one length."""

    length: int
    seed: int
    items: int
    tasks: tuple[TaskScores, ...]
    too_long: tuple[str, ...] = ()  # tasks that do not fit into the length
    recipe: str = ""  # its name, by which a report shows it

    @property
    def difference(self) -> Interval | None:
        """Mean difference over the informative tasks; None without any."""
        told = [task.differences for task in self.tasks if task.informative]
        return resampled(told, SIGNED) if told else None

    def table(self) -> dict[str, Any]:
        """Plain values: recipe, length, seed, items, tasks, too_long, mean (None without any)."""
        return {
            "recipe": self.recipe,
            "length": self.length,
            "seed": self.seed,
            "items": self.items,
            "tasks": {task.name: task.table() for task in self.tasks},
            "too_long": list(self.too_long),
            "mean": self._mean(),
        }

    def _mean(self) -> dict[str, Any] | None:
        told = [task for task in self.tasks if task.informative]
        if (difference := self.difference) is None:
            return None
        every = [x for task in told for x in task.differences]
        verdict, needed = judged(difference, every)
        sides = {
            side: resampled([getattr(task, side) for task in told], UNIT)
            for side in ("dense", "compressed")
        }
        return {
            "tasks": [task.name for task in told],
            **{side: _scored(found) for side, found in sides.items()},
            "difference": _interval(difference),
            "verdict": verdict,
            "needs": needed,
        }


def judged(difference: Interval, every: list[float]) -> tuple[str, int | None]:
    """The verdict on a difference, and how many items would do where it cannot tell."""
    if difference.high < 0 and len(every) >= FEWEST:
        return "worse", None
    if -difference.low <= TOLERANCE and len(every) >= FEWEST:
        return f"no worse than {max(0.0, -difference.low):.1%}", None
    return "cannot tell", max(FEWEST, items_needed(every, TOLERANCE))


def _side(scores: tuple[float, ...]) -> dict[str, float]:
    return _scored(resampled([scores], UNIT))


def _scored(found: Interval) -> dict[str, float]:
    score, low, high = map(_rounded, found)
    return {"score": score, "low": low, "high": high}


def _interval(found: Interval) -> dict[str, float]:
    return {name: _rounded(value) for name, value in found._asdict().items()}


def _rounded(value: float) -> float:
    return round(value, 6)
