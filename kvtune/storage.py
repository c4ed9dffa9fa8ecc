"""A study's database: looked at before it is opened, locked while written, its faults in words."""

from __future__ import annotations

import fcntl
import os
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import optuna
from optuna.exceptions import StorageInternalError
from optuna.storages import RDBStorage
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, ProgrammingError, SQLAlchemyError
from sqlalchemy.exc import IntegrityError as Conflict

from kvtune.errors import (
    IntegrityError,
    KvtuneError,
    MissingInputError,
    ResourceError,
    UnsupportedError,
    UsageError,
)

T = TypeVar("T")
PATIENCE = 60.0  # seconds to wait for another program's transaction
# a server that vanished is missed within a minute; a worker would wait for its answer for hours
KEEPALIVE = {"keepalives_idle": 30, "keepalives_interval": 10, "keepalives_count": 3}
SETTLING = (0.1, 0.3, 1.0, 3.0)  # seconds between tries to make tables that others make as well
MAGIC = b"SQLite format 3\0"
EXHAUSTED = ("full", "disk i/o", "readonly", "unable to open", "locked", "out of memory")


def address(storage: str) -> URL:
    """Reads a database URL; anything without `://` is the path of an SQLite file.

    Raises:
        UsageError: it is no database URL.
    """
    if "://" not in storage:
        return URL.create("sqlite", database=storage)
    try:
        url = make_url(storage)
        if url.drivername == "postgresql":  # the driver that kvtune[postgres] installs
            url = url.set(drivername="postgresql+psycopg")
        url.get_dialect()  # an unknown kind of database is a wrong URL, not a silent server
        return url
    except ArgumentError as error:
        raise UsageError(f"--storage {storage!r}: {error}", "Like sqlite:///study.db.") from None


def sqlite_file(url: URL) -> Path | None:
    """Returns the file behind an SQLite URL; None for other databases and for memory."""
    name = url.database or ":memory:"
    if url.get_backend_name() != "sqlite" or name == ":memory:" or name.startswith("file:"):
        return None
    return Path(name).resolve()


def is_server(url: URL) -> bool:
    """Tells whether several processes may write the database at once."""
    return url.get_backend_name() != "sqlite"


def finished_schema(file: Path) -> bool:
    """Tells whether a file holds Optuna's tables to the last; an absent or half-made one does not.

    Raises:
        IntegrityError: it is not an SQLite database, is damaged, or holds something else.
        ResourceError: it cannot be read.
    """
    if not file.exists() or not file.stat().st_size:
        return False
    try:
        with file.open("rb") as head:
            if head.read(len(MAGIC)) != MAGIC:
                raise broken(file, "it is not an SQLite database")
        with closing(sqlite3.connect(file, timeout=PATIENCE)) as base:
            return _stamped(file, base)
    except (OSError, sqlite3.OperationalError) as error:
        raise ResourceError(f"cannot read study file {file}: {error}") from error
    except sqlite3.DatabaseError as error:
        raise broken(file, str(error)) from error


def _stamped(file: Path, base: sqlite3.Connection) -> bool:
    if (damage := base.execute("PRAGMA quick_check(1)").fetchone()[0]) != "ok":
        raise broken(file, damage)
    tables = {name for (name,) in base.execute("SELECT name FROM sqlite_master")}
    # Killed while it made its first file, Optuna leaves some of its tables; a stranger leaves none.
    if tables and not tables & {"studies", "version_info", "alembic_version"}:
        raise broken(file, "its tables are not Optuna's")
    if "alembic_version" not in tables:
        return False
    return base.execute("SELECT version_num FROM alembic_version").fetchone() is not None


def broken(place: Path | str, why: str) -> IntegrityError:
    """Returns the error for a database that is no usable study."""
    return IntegrityError(
        f"broken study file {place}: {why}", "Move it away, or name another with --storage."
    )


@contextmanager
def opened(url: URL) -> Iterator[RDBStorage]:
    """Opens the database, making Optuna's tables where they are missing.

    Raises:
        IntegrityError: it is broken, or written by another version of Optuna.
        ResourceError: the disk is full or read-only, or another program holds the file.
        MissingInputError: the database server does not answer.
        UnsupportedError: the database's driver is not installed.
    """
    with _quiet(), worded(url):
        storage = _connect(url)
        try:
            yield storage
        finally:
            storage.remove_session()
            storage.engine.dispose()


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps Optuna's progress lines out of the log meanwhile."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(max(before, optuna.logging.WARNING))
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)


def settled(make: Callable[[], T]) -> T:
    """Makes tables, again and again while other workers that make the same ones get in the way."""
    for pause in SETTLING:
        try:
            return make()
        except (Conflict, ProgrammingError):
            time.sleep(pause)
    return make()


def _connect(url: URL) -> RDBStorage:
    file = sqlite_file(url)
    text = url.render_as_string(hide_password=False).replace("{", "{{").replace("}", "}}")
    # SQLite's own default, synchronous = FULL, stays: a row that was told survives a power cut.
    options: dict[str, Any] = {"connect_args": {"timeout": PATIENCE}}
    if is_server(url):
        options = {"pool_pre_ping": True}  # a connection may have died during a long evaluation
        if url.drivername == "postgresql+psycopg":
            options["connect_args"] = KEEPALIVE
    try:
        # With all tables there none is made, so that a newer Optuna's file is refused untouched.
        made = file is not None and finished_schema(file)
        return settled(lambda: RDBStorage(text, engine_kwargs=options, skip_table_creation=made))
    except RuntimeError as error:
        raise broken(place(url), f"it belongs to another version of Optuna ({error})") from error
    except ImportError as error:
        driver = "Install one, such as `pip install 'kvtune[postgres]'` for PostgreSQL."
        raise UnsupportedError(f"no driver for {place(url)}: {error}", driver) from error


def place(url: URL) -> str:
    """Names the database in messages, without its password."""
    return str(sqlite_file(url) or url.render_as_string())


@contextmanager
def worded(url: URL) -> Iterator[None]:
    """Puts a database's faults into words."""
    try:
        yield
    except (StorageInternalError, SQLAlchemyError) as error:
        raise _words(url, str(error.__cause__ or error).splitlines()[0]) from error


def _words(url: URL, why: str) -> KvtuneError:
    if is_server(url):
        return MissingInputError(f"database {place(url)} fails: {why}", "Is its server up?")
    if any(word in why.lower() for word in EXHAUSTED):
        return ResourceError(
            f"cannot write study file {place(url)}: {why}",
            "Free the disk, allow writing, or close what holds the file; then --resume.",
        )
    return broken(place(url), why)


@contextmanager
def sole_writer(url: URL) -> Iterator[None]:
    """Holds the lock beside an SQLite file; the kernel frees it when its owner dies.

    Raises:
        UsageError: a living process holds it.
        MissingInputError: the folder does not exist.
        ResourceError: the folder cannot be written.
    """
    if (file := sqlite_file(url)) is None:
        yield
        return
    handle = _lock_file(file.with_name(f"{file.name}.lock"))
    try:
        _take(handle, file)
        yield
    finally:
        os.close(handle)


@contextmanager
def held_file(lock: Path) -> Iterator[bool]:
    """Yields True while this process holds a lock file, False when another one does.

    Raises:
        MissingInputError: the folder does not exist.
        ResourceError: the folder cannot be written.
    """
    handle = _lock_file(lock)
    try:
        yield _taken(handle)
    finally:
        os.close(handle)


def _taken(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False


def _lock_file(file: Path) -> int:
    try:
        return os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
    except FileNotFoundError as error:
        raise MissingInputError(f"folder {file.parent} does not exist") from error
    except OSError as error:
        raise ResourceError(f"cannot write in {file.parent}: {error.strerror}") from error


def _take(handle: int, file: Path) -> None:
    try:
        if not _taken(handle):
            owner = os.pread(handle, 20, 0).decode() or "unknown"
            raise UsageError(
                f"study file {file} is being written by process {owner}",
                "Wait for it, or stop it and use --resume.",
            )
        os.ftruncate(handle, 0)
        os.pwrite(handle, str(os.getpid()).encode(), 0)
    except OSError as error:
        raise ResourceError(f"cannot lock {file}: {error.strerror}") from error
