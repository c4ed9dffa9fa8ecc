"""Leases: which worker does what in a study on a server, for how long, by the database's clock."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from sqlalchemy import (
    Column,
    ColumnElement,
    Connection,
    Engine,
    Float,
    MetaData,
    Select,
    String,
    Table,
    Text,
    and_,
    delete,
    func,
    insert,
    select,
    text,
    update,
)
from sqlalchemy.exc import IntegrityError, SQLAlchemyError

from kvtune.owners import gone, token
from kvtune.storage import settled

SECONDS = 60.0  # a lease that was not renewed for so long is anybody's
IDLE = "idle_in_transaction_session_timeout"  # milliseconds
TURN = ""  # what stands in the row whose lock is a worker's turn

_tables = MetaData()
LEASES = Table(
    "kvtune_leases",
    _tables,
    Column("study", String(255), primary_key=True),
    Column("what", String(255), primary_key=True),
    Column("owner", String(255), nullable=False),
    Column("expires", Float(53), nullable=False),
)
VALUES = Table(
    "kvtune_values",
    _tables,
    Column("study", String(255), primary_key=True),
    Column("what", String(255), primary_key=True),
    Column("value", Text, nullable=False),
)


def made(engine: Engine) -> Engine:
    """Makes the tables that a study has besides Optuna's, where they are missing."""
    settled(lambda: _tables.create_all(engine))
    return engine


def forget(engine: Engine, study: str) -> None:
    """Deletes what workers shared in a study."""
    with made(engine).begin() as connection:
        connection.execute(delete(VALUES).where(VALUES.c.study == study))


@dataclass(frozen=True)
class Turn:
    """What one worker may do while no other one has its turn; it lasts if its transaction does."""

    connection: Connection
    study: str
    owner: str
    now: float
    seconds: float

    def others(self) -> dict[str, str]:
        """Returns what other workers, alive as far as is known, hold, each with its owner."""
        own = and_(LEASES.c.study == self.study, LEASES.c.what != TURN)
        found = self.connection.execute(select(LEASES).where(own))
        return {
            row.what: row.owner
            for row in found
            if row.owner != self.owner and row.expires > self.now and not gone(row.owner)
        }

    def holds(self, what: str) -> bool:
        """Tells whether the lease is still this worker's."""
        owner = select(LEASES.c.owner).where(self._is(what))
        return self.connection.execute(owner).scalar() == self.owner

    def take(self, what: str) -> bool:
        """Takes a lease, unless a worker that lives holds it."""
        if what in self.others():
            return False
        values = {"owner": self.owner, "expires": self.now + self.seconds}
        if not self.connection.execute(
            update(LEASES).where(self._is(what)).values(values)
        ).rowcount:
            row = {"study": self.study, "what": what, **values}
            self.connection.execute(insert(LEASES).values(row))
        return True

    def give(self, what: str) -> None:
        """Gives a lease back."""
        mine = and_(self._is(what), LEASES.c.owner == self.owner)
        self.connection.execute(delete(LEASES).where(mine))

    def sweep(self) -> None:
        """Deletes the leases of workers that are dead, as if they had given them back."""
        kept = [TURN, *self.others()]
        dead = and_(LEASES.c.owner != self.owner, LEASES.c.what.not_in(kept))
        self.connection.execute(delete(LEASES).where(LEASES.c.study == self.study, dead))

    def _is(self, what: str) -> ColumnElement[bool]:
        return and_(LEASES.c.study == self.study, LEASES.c.what == what)


@contextmanager
def _transaction(engine: Engine) -> Iterator[Connection]:
    """As `engine.begin`; PostgreSQL ends that of a worker which stands still or has vanished."""
    with engine.begin() as connection:
        if engine.name == "postgresql":
            connection.execute(text(f"SET LOCAL {IDLE} = {round(1000 * SECONDS)}"))
        yield connection


def _now(connection: Connection) -> float:
    """Reads the database's clock: seconds since some moment. A turn may have waited long for it."""
    postgres = connection.dialect.name == "postgresql"  # whose now() is when a transaction began
    clock = func.clock_timestamp() if postgres else func.utc_timestamp()
    return float(connection.execute(select(clock)).scalar_one().timestamp())


class Leases:
    """One worker's leases in a study. Their owner is named anew for each: none is inherited."""

    def __init__(self, engine: Engine, study: str, seconds: float = SECONDS) -> None:
        self.engine, self.study, self.seconds = made(engine), study, seconds
        self.owner = token()
        self._seat()

    @contextmanager
    def turn(self) -> Iterator[Turn]:
        """Waits until no other worker has its turn. All is done at the end, or nothing."""
        with _transaction(self.engine) as connection:
            # a row of our own: Optuna locks the study's, in transactions inside the turn
            connection.execute(self._turn().with_for_update()).one()
            yield Turn(connection, self.study, self.owner, _now(connection), self.seconds)

    @contextmanager
    def renewed(self) -> Iterator[None]:
        """Renews all leases of this worker in the background; gives them back at the end."""
        over = threading.Event()
        thread = threading.Thread(target=self._renew, args=(over,), daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join(self.seconds)
            with suppress(SQLAlchemyError):  # they end by themselves
                self._give_all()

    def _turn(self) -> Select[tuple[str]]:
        mine = and_(LEASES.c.study == self.study, LEASES.c.what == TURN)
        return select(LEASES.c.owner).where(mine)

    def _seat(self) -> None:
        """Makes the row that is locked in turns, unless another worker does."""
        with suppress(IntegrityError), self.engine.begin() as connection:
            if connection.execute(self._turn()).first() is None:
                row = {"study": self.study, "what": TURN, "owner": "", "expires": 0.0}
                connection.execute(insert(LEASES).values(row))

    def _renew(self, over: threading.Event) -> None:
        while not over.wait(self.seconds / 4):
            # if it fails: the next time, or the worker finds out at its turn
            with suppress(SQLAlchemyError), _transaction(self.engine) as connection:
                expires = _now(connection) + self.seconds
                connection.execute(update(LEASES).where(self._mine()).values(expires=expires))

    def _give_all(self) -> None:
        with self.engine.begin() as connection:
            connection.execute(delete(LEASES).where(self._mine()))

    def _mine(self) -> ColumnElement[bool]:
        return and_(LEASES.c.study == self.study, LEASES.c.owner == self.owner)
