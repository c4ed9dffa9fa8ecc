"""The table of a study: how a trial is judged, its rows, what was seen before, and the front."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

from optuna.trial import FrozenTrial, TrialState

from kvtune.errors import ResourceError
from kvtune.sampling import Choice, key

ORIGIN, ATTRS = "origin", "attrs"  # the user attributes of a trial
Attrs = dict[str, float | str]


class Outcome(NamedTuple):
    """What an evaluation returns: a value per objective, and notes for the row."""

    values: tuple[float, ...]
    attrs: Mapping[str, float | str] = MappingProxyType({})


@dataclass(frozen=True)
class Row:
    """A finished trial.

    `values` are in the order of the objectives, None when `state` is "infeasible"; the reason is
    then in `attrs["error"]`. `memo_of` is the first row of the same configuration: this one was
    answered from it.
    """

    number: int
    origin: str
    choice: Choice
    values: tuple[float, ...] | None
    state: str
    memo_of: int | None
    attrs: Attrs


Evaluate = Callable[[Choice, Sequence[Row]], Outcome]  # the rows finished so far, by number


class Table:
    """Rows in the order of their numbers; everything it knows derives from what is stored."""

    def __init__(self, trials: Iterable[FrozenTrial]) -> None:
        self.rows: list[Row] = []
        self.seen: dict[str, Row] = {}
        for trial in trials:
            self.add(trial)

    def add(self, trial: FrozenTrial) -> Row:
        """Appends a finished trial."""
        done = trial.state is TrialState.COMPLETE
        first = self.seen.get(key(trial.params))
        row = Row(
            number=trial.number,
            origin=trial.user_attrs.get(ORIGIN, ""),
            choice=dict(trial.params),
            values=tuple(trial.values) if done else None,
            state="complete" if done else "infeasible",
            memo_of=None if first is None else first.number,
            attrs=dict(trial.user_attrs.get(ATTRS, {})),
        )
        self.rows.append(row)
        self.seen.setdefault(key(row.choice), row)
        return row

    @property
    def repeats(self) -> int:
        """The number of memo answers at the end of the table."""
        fresh = (i for i, row in enumerate(reversed(self.rows)) if row.memo_of is None)
        return next(fresh, 0)


def judge(
    trial: FrozenTrial, evaluate: Evaluate, table: Table, count: int
) -> tuple[tuple[float, ...] | None, Attrs]:
    """Returns values, or None for an infeasible trial, and its notes."""
    if trial.constraints:  # marked by a process that died before telling: a mark cannot be undone
        return None, trial.user_attrs[ATTRS]
    if (first := table.seen.get(key(trial.params))) is not None:
        return first.values, first.attrs
    try:
        values, attrs = evaluate(dict(trial.params), tuple(table.rows))
    except (ResourceError, MemoryError) as error:
        return None, {"error": str(error) or "out of memory"}
    if len(values) != count:
        raise ValueError(f"{len(values)} values for {count} objectives")
    if not all(math.isfinite(x) for x in values):
        return None, {**attrs, "error": f"values are not finite: {', '.join(map(str, values))}"}
    return values, dict(attrs)


def front(rows: Iterable[Row]) -> list[Row]:
    """Returns the rows that no row beats in one objective without losing in another.

    All objectives are minimised; rows are sorted by values, and a configuration stands once.
    """
    valued = [(row.values, row.number, row) for row in rows if row.values and row.memo_of is None]
    best: list[Row] = []
    # In this order a row can be dominated by earlier ones only.
    for values, _, row in sorted(valued, key=lambda item: item[:2]):
        if not any(_dominates(other.values or (), values) for other in best):
            best.append(row)
    return best


def _dominates(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a != b and all(x <= y for x, y in zip(a, b, strict=True))
