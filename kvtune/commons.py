"""What the workers of a study have in common: values that one found, work that one alone does."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from sqlalchemy import and_, insert, select
from sqlalchemy.exc import IntegrityError

from kvtune.leases import SECONDS, VALUES, Leases, made
from kvtune.storage import address, held_file, is_server, opened, sole_writer, sqlite_file
from kvtune.workers import members

Json = Any  # what json.dumps takes


def shared(storage: str, name: str, what: str, make: Callable[[], Json]) -> Json:
    """Returns the value that is stored under `what`, after making and storing it if there is none.

    All workers get the same one, that of the first to have made it, as it comes out of JSON. The
    study need not be there yet; `study.fresh` deletes the value. An SQLite file is locked
    meanwhile, as by `study.run`.

    Raises:
        UsageError: another process writes the SQLite file.
        IntegrityError, ResourceError, MissingInputError, UnsupportedError: as `study.run`.
    """
    url = address(storage)
    mine = and_(VALUES.c.study == name, VALUES.c.what == what)
    with sole_writer(url), opened(url) as store:
        engine = made(store.engine)

        def held() -> str | None:
            with engine.connect() as connection:
                found: str | None = connection.execute(select(VALUES.c.value).where(mine)).scalar()
                return found

        if (known := held()) is not None:
            return json.loads(known)
        row = {"study": name, "what": what, "value": json.dumps(make())}
        try:
            with engine.begin() as connection:
                connection.execute(insert(VALUES).values(row))
        except IntegrityError:  # another worker was first
            return json.loads(held() or row["value"])
        return json.loads(row["value"])


@contextmanager
def sole(storage: str, name: str, what: str, lease: float = SECONDS) -> Iterator[bool]:
    """Yields True to one worker, which has the work of that name to itself, and False to others.

    The lease of `lease` seconds is renewed meanwhile and given back in the end; when its owner
    dies, the next caller gets it. For SQLite it is a lock file beside the database's.
    """
    url = address(storage)
    if (file := sqlite_file(url)) is not None:
        with held_file(file.with_name(f"{file.name}.{what}.lock")) as mine:
            yield mine
        return
    if not is_server(url):  # in memory, where nobody else is
        yield True
        return
    with opened(url) as store:
        leases = Leases(store.engine, name, lease)
        with leases.renewed():
            with leases.turn() as turn:
                mine = turn.take(f"sole {what}")
            yield mine


def living(storage: str, name: str) -> int:
    """Counts the workers that search a study on a server now; 0 for SQLite."""
    url = address(storage)
    if not is_server(url):
        return 0
    with opened(url) as store, Leases(store.engine, name).turn() as turn:
        return members(turn)
