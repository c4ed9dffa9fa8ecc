"""The kill-safe search loop over an Optuna study: a resumed run equals an uninterrupted one.

A trial is reserved with all its parameters in one transaction and told in another. What comes
next follows from the finished rows alone. So wherever a process dies, the next one finds at most
one reserved trial, measures it under the same number, and goes on as if nothing had happened.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import optuna
from optuna.exceptions import ExperimentalWarning
from optuna.storages import RDBStorage
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, Trial, TrialState, create_trial

from kvtune.errors import IntegrityError, MissingInputError, UsageError, suggest
from kvtune.sampling import Choice, Plan, Seeded, Space, propose
from kvtune.storage import address, finished_schema, opened, place, sole_writer, sqlite_file
from kvtune.table import ATTRS, ORIGIN, Evaluate, Outcome, Row, Table, front, judge

__all__ = ["Choice", "Outcome", "Row", "Seeded", "Space", "fresh", "front", "rows", "run"]

BINDING = "kvtune"  # the study's user attribute that says what it belongs to
CONSTRAINT = "resources"  # above zero on infeasible trials; absent, hence feasible, on all others


def run(
    storage: str,
    name: str,
    space: Space,
    starts: Sequence[Seeded],
    evaluate: Evaluate,
    *,
    objectives: tuple[str, ...],
    trials: int,
    seed: int,
    seconds: float | None = None,
    resume: bool = False,
    context: str = "",
    on_trial: Callable[[Row, int], None] | None = None,
) -> list[Row]:
    """Searches until the study has `trials` rows, `seconds` are over or the space is spent.

    Every objective is minimised. A repeated configuration is answered from its first row. A
    ResourceError or MemoryError of `evaluate`, or a value that is not finite, makes the row
    infeasible; any other exception leaves the trial to the next resume. One process at a time
    writes a study: a lock sees to it for SQLite, the caller for other databases.

    Raises:
        UsageError: the study has rows and `resume` is off; another process writes it; a start
            point or objective is wrong.
        IntegrityError: the study belongs to another search, or its file is broken.
        ResourceError: the study cannot be written.
    """
    end = math.inf if seconds is None else time.monotonic() + seconds
    plan = Plan(space, tuple(starts), objectives, seed, context)
    with _writing(storage) as store:
        study = _bound(store, name, plan, resume)
        table = _table(study)
        while len(table.rows) < trials and time.monotonic() < end:
            if (trial := _running(study) or _reserve(study, plan, table)) is None:
                break
            row = table.add(_finish(study, trial, evaluate, table))
            if on_trial is not None:
                on_trial(row, trials)
        return table.rows


def rows(storage: str, name: str) -> list[Row]:
    """Reads the finished rows of a study; an SQLite file is not written.

    Raises:
        MissingInputError: there is no such study.
        IntegrityError: the file is broken.
    """
    url = address(storage)
    if (file := sqlite_file(url)) is not None and not finished_schema(file):
        raise MissingInputError(f"there is no study in {file}", "`kvtune search` makes one.")
    with _quiet(), opened(url) as store:
        names = tuple(optuna.get_all_study_names(storage=store))
        if name not in names:
            raise MissingInputError(f"no study {name!r} in {place(url)}", suggest(name, names))
        return _table(optuna.load_study(study_name=name, storage=store)).rows


def fresh(storage: str, name: str) -> None:
    """Deletes a study with all its rows, if there is one.

    Raises:
        UsageError: another process writes it.
        IntegrityError: the file is broken.
    """
    with _writing(storage) as store:
        if name in optuna.get_all_study_names(storage=store):
            optuna.delete_study(study_name=name, storage=store)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps Optuna's progress lines out of the log meanwhile."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(max(before, optuna.logging.WARNING))
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)


@contextmanager
def _writing(storage: str) -> Iterator[RDBStorage]:
    url = address(storage)
    with _quiet(), sole_writer(url), opened(url) as store:
        yield store


def _table(study: Study) -> Table:
    return Table(x for x in study.get_trials(deepcopy=False) if x.state.is_finished())


def _bound(store: RDBStorage, name: str, plan: Plan, resume: bool) -> Study:
    """Returns the study of that name, bound to the plan; made anew if it has nothing to keep."""
    directions = [StudyDirection.MINIMIZE] * len(plan.objectives)
    if name in optuna.get_all_study_names(storage=store):
        study = optuna.load_study(study_name=name, storage=store)
        if _worth_keeping(study, resume):
            return _check(study, plan)
        # Left unbound by a kill, it is taken as it is: deleting it could be killed again and again.
        if study.directions == directions and not study.get_trials(deepcopy=False):
            return _bind(study, plan)
        optuna.delete_study(study_name=name, storage=store)
    return _bind(optuna.create_study(study_name=name, storage=store, directions=directions), plan)


def _worth_keeping(study: Study, resume: bool) -> bool:
    if _table(study).rows and not resume:
        raise UsageError(
            f"study {study.study_name!r} has rows already",
            "Use --resume to go on or --fresh to start anew.",
        )
    return resume and bool(study.user_attrs or study.get_trials(deepcopy=False))


def _bind(study: Study, plan: Plan) -> Study:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        study.set_metric_names(list(plan.objectives))
    study.set_user_attr(BINDING, plan.binding())  # last: a study that has it is complete
    return study


def _check(study: Study, plan: Plan) -> Study:
    stored, hint = study.user_attrs.get(BINDING), "Or use --fresh to start anew."
    if not isinstance(stored, dict):
        raise IntegrityError(f"study {study.study_name!r} was not made by kvtune", hint)
    ours = plan.binding()
    if changed := [what for what in ours if stored.get(what) != ours[what]]:
        raise IntegrityError(
            f"study {study.study_name!r} was made with other {', '.join(changed)}",
            f"Resume with what it was made with. {hint}",
        )
    return study


def _running(study: Study) -> FrozenTrial | None:
    """Returns the trial that is reserved and not told: ours, or that of a process that died."""
    return next(iter(study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))), None)


def _reserve(study: Study, plan: Plan, table: Table) -> FrozenTrial | None:
    """Stores the next trial, whole, as running; returns None when the space is spent."""
    number = len(study.get_trials(deepcopy=False))
    if number >= len(plan.starts) and len(table.seen) >= plan.space.size:
        return None
    found = propose(study, plan, number, table)
    trial = create_trial(
        state=TrialState.RUNNING,
        params=found.choice,
        distributions=plan.space.distributions,
        user_attrs={ORIGIN: found.origin},
    )
    study.add_trial(trial)
    return _running(study)


def _finish(study: Study, trial: FrozenTrial, evaluate: Evaluate, table: Table) -> FrozenTrial:
    """Judges a reserved trial and tells the study."""
    live = Trial(study, trial._trial_id)
    values, attrs = judge(trial, evaluate, table, len(study.directions))
    live.set_user_attr(ATTRS, attrs)  # one value, so that a second try leaves nothing of the first
    if values is not None:
        return study.tell(live, values)
    if not trial.constraints:  # without any, Optuna 5 would take the trial for feasible
        live.set_constraint(CONSTRAINT, 1.0)
    return study.tell(live, state=TrialState.PRUNED)
