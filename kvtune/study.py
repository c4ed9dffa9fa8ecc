"""The kill-safe search loop over an Optuna study: a resumed run equals an uninterrupted one.

A trial is reserved with all its parameters in one transaction and told in another. What comes
next follows from the finished rows alone. So wherever a process dies, the next one finds its
reserved trial, measures it under the same number, and goes on as if nothing had happened. In a
server's database several workers do so at once, each with its own trial.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Sequence

import optuna
from optuna.exceptions import ExperimentalWarning
from optuna.storages import RDBStorage
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, Trial, TrialState, create_trial

from kvtune.errors import IntegrityError, MissingInputError, UsageError, suggest
from kvtune.leases import SECONDS, forget
from kvtune.sampling import Choice, Past, Plan, Seeded, Space, key, propose
from kvtune.storage import address, finished_schema, opened, place, sqlite_file
from kvtune.table import ATTRS, JUDGED, ORIGIN, Evaluate, Outcome, Row, Table, Verdict, front, judge
from kvtune.workers import Desk, writing

__all__ = ["Choice", "Outcome", "Row", "Seeded", "Space", "fresh", "front", "rows", "run"]

BINDING = "kvtune"  # the study's user attribute that says what it belongs to


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
    lease: float = SECONDS,
) -> list[Row]:
    """Searches until the study has `trials` rows, `seconds` are over or the space is spent.

    Every objective is minimised. A repeated configuration is answered from its first row. A
    ResourceError, MemoryError or Infeasible of `evaluate`, a broken constraint or a value that is
    not finite makes the row infeasible, Stopped makes it stopped; any other exception leaves the
    trial to the next resume. A lock sees to it that one process at a time writes an SQLite file.

    In a server's database, any number of workers call this at once, the later ones with or without
    `resume`. Each evaluates other trials, under leases of `lease` seconds that it renews meanwhile;
    the trial of one that died is taken over. It returns when nobody evaluates any more. `on_trial`
    is told of each row that is new, whoever measured it, with the total.

    Raises:
        UsageError: the study has rows and `resume` is off; another process writes its file; a start
            point or objective is wrong.
        IntegrityError: the study belongs to another search, or its file is broken.
        ResourceError: the study cannot be written.
        MissingInputError: the database server does not answer.
        UnsupportedError: no driver for the database, or one that workers cannot share.
    """
    end = math.inf if seconds is None else time.monotonic() + seconds
    plan = Plan(space, tuple(starts), objectives, seed, context)
    with writing(storage, name, lease) as (store, desk):
        with desk.turn():
            study = _bound(store, name, plan, resume or desk.others() > 0)
        known = {row.number for row in _table(study).rows}
        while True:
            late = time.monotonic() >= end
            with desk.turn():
                table, trial, wait = _next(study, plan, desk, 0 if late else trials)
            for row in table.rows:
                if row.number not in known and on_trial is not None:
                    on_trial(row, trials)
            known |= {row.number for row in table.rows}
            if trial is not None:
                _finish(study, desk, trial, judge(trial, evaluate, table, objectives))
            elif wait:
                time.sleep(desk.pause)
            else:
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
    with opened(url) as store:
        names = tuple(optuna.get_all_study_names(storage=store))
        if name not in names:
            raise MissingInputError(f"no study {name!r} in {place(url)}", suggest(name, names))
        return _table(optuna.load_study(study_name=name, storage=store)).rows


def fresh(storage: str, name: str) -> None:
    """Deletes a study with all its rows and all that its workers shared, if there is one.

    Raises:
        UsageError: another process writes it.
        IntegrityError: the file is broken.
    """
    with writing(storage, name, SECONDS) as (store, desk), desk.turn():
        if others := desk.others():
            what = f"study {name!r} is being searched by {others} more"
            raise UsageError(f"{what} worker{'s' * (others > 1)}", "Stop them, or leave --fresh.")
        if name in optuna.get_all_study_names(storage=store):
            optuna.delete_study(study_name=name, storage=store)
        forget(store.engine, name)


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


def _next(
    study: Study, plan: Plan, desk: Desk, trials: int
) -> tuple[Table, FrozenTrial | None, bool]:
    """Returns the table, the trial that this worker has now, and whether others may leave one."""
    found = study.get_trials(deepcopy=False)
    table = Table(x for x in found if x.state.is_finished())
    running = [x for x in found if not x.state.is_finished()]
    if len(table.rows) >= trials:
        return table, None, False
    trial = desk.free(running)
    if trial is None and len(found) < trials:
        past = Past(table.repeats, table.seen.keys(), {key(x.params) for x in running})
        if (start := propose(study, plan, len(found), past)) is not None:
            trial = desk.reserve(study, _running(plan, start))
    return table, trial, bool(running)


def _running(plan: Plan, start: Seeded) -> FrozenTrial:
    return create_trial(
        state=TrialState.RUNNING,
        params=start.choice,
        distributions=plan.space.distributions,
        user_attrs={ORIGIN: start.origin},
    )


def _finish(study: Study, desk: Desk, trial: FrozenTrial, verdict: Verdict) -> None:
    """Tells the study about a trial, unless another worker has taken it over meanwhile."""
    with desk.turn():
        if desk.give(trial):
            _tell(study, trial, verdict)


def _tell(study: Study, trial: FrozenTrial, verdict: Verdict) -> None:
    live, excess = Trial(study, trial._trial_id), dict(verdict.excess)
    # one value, so that a second try leaves nothing of the first
    live.set_user_attr(ATTRS, verdict.attrs)
    if excess:  # from here on the verdict stands: a constraint cannot be set a second time
        live.set_user_attr(JUDGED, {"values": verdict.values, "excess": excess})
    for name, value in excess.items():
        if name not in trial.constraints:
            live.set_constraint(name, value)
    if verdict.values is not None:
        study.tell(live, verdict.values)
    else:  # without a broken constraint Optuna 5 takes it for feasible, and worse than a full one
        study.tell(live, state=TrialState.PRUNED)
