"""The table of a study: how a trial is judged, its rows, what was seen before, and the front."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple

from optuna.trial import FrozenTrial, TrialState

from kvtune.errors import ResourceError
from kvtune.halving import dominates
from kvtune.sampling import Choice, key

ORIGIN, ATTRS, JUDGED = "origin", "attrs", "judged"  # the user attributes of a trial
RESOURCES = "resources"  # the constraint that a trial breaks which did not fit or gave no number
COMPLETE, INFEASIBLE, STOPPED = "complete", "infeasible", "stopped"
Attrs = dict[str, float | str]
NOTHING: Mapping[str, Any] = MappingProxyType({})


class Outcome(NamedTuple):
    """What an evaluation returns: a value per objective, notes for the row, and constraints.

    `excess` says by how much each constraint is broken: above zero is too much, zero or less is
    within. One that is broken makes the row infeasible; its values then stand in its notes.
    """

    values: tuple[float, ...]
    attrs: Mapping[str, float | str] = NOTHING
    excess: Mapping[str, float] = NOTHING


class Stopped(Exception):
    """Raised by an evaluation that gave up early: what it saw was not worth going on with."""

    def __init__(self, attrs: Mapping[str, float | str] = NOTHING) -> None:
        super().__init__("stopped")
        self.attrs = dict(attrs)


class Infeasible(Exception):
    """Raised by an evaluation that breaks a constraint, measured or known beforehand.

    Raises:
        ValueError: no constraint of `excess` is broken, that is above zero.
    """

    def __init__(self, attrs: Mapping[str, float | str], excess: Mapping[str, float]) -> None:
        super().__init__(_over(excess))
        self.attrs, self.excess = {"error": str(self), **attrs}, dict(excess)
        if not _broken(excess):
            raise ValueError(f"an infeasible trial breaks a constraint, not {self.excess}")


@dataclass(frozen=True)
class Row:
    """A finished trial.

    `values` are in the order of the objectives; None when `state` is "infeasible", the reason then
    being in `attrs["error"]`, or "stopped". `memo_of` is the first row of the same configuration:
    this one was answered from it. `excess` is above zero for each constraint that is broken.
    """

    number: int
    origin: str
    choice: Choice
    values: tuple[float, ...] | None
    state: str
    memo_of: int | None
    attrs: Attrs
    excess: dict[str, float] = field(default_factory=dict)


Evaluate = Callable[[Choice, Sequence[Row]], Outcome]  # the rows finished so far, by number


class Table:
    """Rows in the order of their numbers; everything it knows derives from what is stored."""

    def __init__(self, trials: Iterable[FrozenTrial]) -> None:
        self.rows: list[Row] = []
        self.seen: dict[str, Row] = {}
        for trial in trials:
            self._add(trial)

    def _add(self, trial: FrozenTrial) -> None:
        """Appends a finished trial."""
        first = self.seen.get(key(trial.params))
        state = _state(trial)
        row = Row(
            number=trial.number,
            origin=trial.user_attrs.get(ORIGIN, ""),
            choice=dict(trial.params),
            values=tuple(trial.values) if state == COMPLETE else None,
            state=state,
            memo_of=None if first is None else first.number,
            attrs=dict(trial.user_attrs.get(ATTRS, {})),
            excess=trial.constraints,
        )
        self.rows.append(row)
        self.seen.setdefault(key(row.choice), row)

    @property
    def repeats(self) -> int:
        """The number of memo answers at the end of the table."""
        fresh = (i for i, row in enumerate(reversed(self.rows)) if row.memo_of is None)
        return next(fresh, 0)


def _state(trial: FrozenTrial) -> str:
    if _broken(trial.constraints):
        return INFEASIBLE
    return COMPLETE if trial.state is TrialState.COMPLETE else STOPPED


class Verdict(NamedTuple):
    """What is told about a trial; `values` is None unless it is complete."""

    values: tuple[float, ...] | None
    attrs: Attrs
    excess: Mapping[str, float] = NOTHING


def judge(
    trial: FrozenTrial, evaluate: Evaluate, table: Table, objectives: Sequence[str]
) -> Verdict:
    """Evaluates a trial, unless it was judged before or its configuration is in the table."""
    # Judged by a process that died before telling. Constraints cannot be set twice, so it stands.
    if (judged := trial.user_attrs.get(JUDGED)) is not None:
        values = judged["values"]
        return Verdict(values and tuple(values), trial.user_attrs[ATTRS], judged["excess"])
    if (first := table.seen.get(key(trial.params))) is not None:
        return Verdict(first.values, first.attrs, first.excess)
    try:
        return _weighed(evaluate(dict(trial.params), tuple(table.rows)), objectives)
    except (ResourceError, MemoryError) as error:
        return Verdict(None, {"error": str(error) or "out of memory"}, {RESOURCES: 1.0})
    except Stopped as stopped:
        return Verdict(None, stopped.attrs)
    except Infeasible as bad:
        return Verdict(None, bad.attrs, bad.excess)


def _weighed(outcome: Outcome, objectives: Sequence[str]) -> Verdict:
    values, attrs, excess = outcome.values, dict(outcome.attrs), dict(outcome.excess)
    if len(values) != len(objectives):
        raise ValueError(f"{len(values)} values for {len(objectives)} objectives")
    if not all(math.isfinite(x) for x in values):
        said = f"values are not finite: {', '.join(map(str, values))}"
        return Verdict(None, {**attrs, "error": said}, {**excess, RESOURCES: 1.0})
    if _broken(excess):
        measured = dict(zip(objectives, values, strict=True))
        return Verdict(None, {"error": _over(excess), **measured, **attrs}, excess)
    return Verdict(values, attrs, excess)


def _broken(excess: Mapping[str, float]) -> bool:
    return any(value > 0 for value in excess.values())


def _over(excess: Mapping[str, float]) -> str:
    broken = (f"{name} by {value:.3g}" for name, value in excess.items() if value > 0)
    return f"over its limit: {', '.join(broken)}"


def front(rows: Iterable[Row]) -> list[Row]:
    """Returns the rows that no row beats in one objective without losing in another.

    All objectives are minimised; rows are sorted by values, and a configuration stands once.
    """
    valued = [(row.values, row.number, row) for row in rows if row.values and row.memo_of is None]
    best: list[Row] = []
    # In this order a row can be dominated by earlier ones only.
    for values, _, row in sorted(valued, key=lambda item: item[:2]):
        if not any(dominates(other.values or (), values) for other in best):
            best.append(row)
    return best
