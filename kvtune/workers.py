"""Who evaluates which trial: the one writer of a file, or each of a server's workers in turn."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

from optuna.storages import RDBStorage
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.engine import URL
from sqlalchemy.orm import Session

from kvtune.errors import UnsupportedError
from kvtune.leases import Leases, Turn
from kvtune.storage import address, is_server, opened, place, sole_writer

MEMBER = "worker "  # the lease that a worker holds as long as it is there
KNOWN = ("postgresql", "mysql", "mariadb")


class Desk(Protocol):
    """Where a worker gets its trials; all but `turn` belongs into a turn."""

    pause: float  # seconds until a look at what others do is worth while again

    def turn(self) -> AbstractContextManager[object]:
        """Holds off all other workers meanwhile."""

    def others(self) -> int:
        """How many other workers there are."""

    def free(self, running: Sequence[FrozenTrial]) -> FrozenTrial | None:
        """Takes over a trial that nobody evaluates any more."""

    def reserve(self, study: Study, trial: FrozenTrial) -> FrozenTrial:
        """Stores a trial, whole, as running; returns it with its number."""

    def give(self, trial: FrozenTrial) -> bool:
        """Gives a trial back; tells whether it was still ours."""


class Alone:
    """The only writer: a trial that is reserved and not told is that of a process that died."""

    pause = 0.0

    @contextmanager
    def turn(self) -> Iterator[None]:
        """It is always its turn."""
        yield

    def others(self) -> int:
        """None."""
        return 0

    def free(self, running: Sequence[FrozenTrial]) -> FrozenTrial | None:
        """The first of them, if there is one."""
        return next(iter(running), None)

    def reserve(self, study: Study, trial: FrozenTrial) -> FrozenTrial:
        """In one transaction."""
        study.add_trial(trial)
        return study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))[0]

    def give(self, trial: FrozenTrial) -> bool:
        """It is ours for good."""
        return True


class Team:
    """One of several workers: a trial is evaluated under a lease, and free when that is over."""

    def __init__(self, store: RDBStorage, leases: Leases) -> None:
        self._store, self._leases = store, leases
        self._turn: Turn | None = None
        self.pause = min(0.5, leases.seconds / 10)

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Trials and leases change together, in one transaction."""
        with self._leases.turn() as self._turn:
            self._turn.take(f"{MEMBER}{self._leases.owner.split(' ')[-1]}")
            yield

    @property
    def _now(self) -> Turn:
        assert self._turn is not None
        return self._turn

    def others(self) -> int:
        """By the leases that they hold as long as they are there."""
        return members(self._now)

    def free(self, running: Sequence[FrozenTrial]) -> FrozenTrial | None:
        """The first whose lease is over, or whose owner is known to be dead."""
        held = self._now.others()
        found = next((trial for trial in running if _name(trial) not in held), None)
        if found is not None:
            self._now.take(_name(found))
        return found

    def reserve(self, study: Study, trial: FrozenTrial) -> FrozenTrial:
        """With its lease, in the transaction of the turn: a turn that was lost stores nothing."""
        with Session(self._now.connection) as session:
            # the public add_trial has a transaction of its own
            stored: Any = self._store._get_prepared_new_trial(study._study_id, trial, session)
            session.flush()
            trial.number, trial._trial_id = stored.number, stored.trial_id
            session.commit()
        self._now.take(_name(trial))
        return trial

    def give(self, trial: FrozenTrial) -> bool:
        """False when the lease ended unrenewed and another worker took the trial over."""
        held = self._now.holds(_name(trial))
        self._now.give(_name(trial))
        return held


def members(turn: Turn) -> int:
    """Counts the other workers of a study."""
    return sum(what.startswith(MEMBER) for what in turn.others())


def _name(trial: FrozenTrial) -> str:
    return f"trial {trial.number}"


@contextmanager
def writing(storage: str, name: str, seconds: float) -> Iterator[tuple[RDBStorage, Desk]]:
    """Opens a study's database to write it, alone or as one of its workers.

    Raises:
        UsageError: another process writes the file.
        UnsupportedError: workers cannot agree in such a database.
    """
    url = address(storage)
    _check(url)
    with sole_writer(url), opened(url) as store:
        if not is_server(url):
            yield store, Alone()
            return
        leases = Leases(store.engine, name, seconds)
        with leases.turn() as turn:
            turn.sweep()
        with leases.renewed():
            yield store, Team(store, leases)


def _check(url: URL) -> None:
    if is_server(url) and url.get_backend_name() not in KNOWN:
        what = f"kvtune's workers cannot share {place(url)}"
        raise UnsupportedError(what, f"They can share: {', '.join(KNOWN)}.")
