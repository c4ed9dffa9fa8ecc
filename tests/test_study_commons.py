"""Values that are made once for a study, and work that one process has to itself, in a file."""

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from kvtune import owners
from kvtune.commons import living, shared, sole
from kvtune.errors import IntegrityError, MissingInputError, UnsupportedError, UsageError
from kvtune.study import fresh, rows


def load() -> ModuleType:
    """Imports the worker by its path: tests are no package."""
    file = Path(__file__).with_name("study_worker.py")
    spec = importlib.util.spec_from_file_location("study_worker", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


worker = load()
small, Counting = worker.small, worker.Counting


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """Where a study goes."""
    return tmp_path / "study.db"


@pytest.fixture
def storage(base: Path) -> str:
    """The same as a URL."""
    return f"sqlite:///{base}"


def counted() -> Iterator[dict[str, object]]:
    """Makes another value each time."""
    number = 0
    while True:
        number += 1
        yield {"number": number, "scales": (0.1 + 0.2, 1e-300)}


def test_a_shared_value_is_made_once_and_comes_out_of_json_to_all(storage: str) -> None:
    values = counted()
    first = shared(storage, "s", "scales of one", lambda: next(values))
    assert first == {"number": 1, "scales": [0.1 + 0.2, 1e-300]}
    assert shared(storage, "s", "scales of one", lambda: next(values)) == first
    assert shared(storage, "s", "scales of two", lambda: next(values))["number"] == 2
    assert shared(storage, "t", "scales of one", lambda: next(values))["number"] == 3


@pytest.mark.parametrize("value", [None, 0, [], "", False])
def test_a_value_that_is_nothing_is_one_too(value: object, storage: str) -> None:
    assert shared(storage, "s", "what", lambda: value) == value
    assert shared(storage, "s", "what", lambda: pytest.fail("made again")) == value


def test_a_value_whose_making_was_stopped_is_made_by_the_next(storage: str) -> None:
    def stopped() -> object:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        shared(storage, "s", "what", stopped)
    assert shared(storage, "s", "what", lambda: 1) == 1


def test_a_shared_value_outlives_the_search_and_goes_with_fresh(base: Path, storage: str) -> None:
    assert shared(storage, "s", "what", lambda: 1) == 1
    with pytest.raises(MissingInputError, match="no study"):
        rows(storage, "s")
    assert len(small(base, Counting(), 4)) == 4
    assert shared(storage, "s", "what", lambda: 2) == 1
    assert len(small(base, Counting(), 6, resume=True)) == 6
    fresh(storage, "s")
    assert shared(storage, "s", "what", lambda: 2) == 2


def test_a_file_is_locked_while_a_value_is_made(base: Path, storage: str) -> None:
    def refused() -> str:
        with pytest.raises(UsageError, match="is being written"):
            small(base, Counting(), 4)
        return "refused"

    assert shared(storage, "s", "what", refused) == "refused"
    base.write_text("these are notes")
    with pytest.raises(IntegrityError, match="not an SQLite database"):
        shared(storage, "s", "what", lambda: 1)


@pytest.mark.parametrize("memory", [False, True])
def test_work_is_held_by_one_at_a_time(memory: bool, base: Path, storage: str) -> None:
    storage = "sqlite://" if memory else storage
    with sole(storage, "s", "proof") as mine:
        assert mine
        with sole(storage, "s", "proof") as again, sole(storage, "s", "other") as other:
            assert again is memory and other  # nobody else is in this process's memory
        if not memory:
            assert len(small(base, Counting(), 2)) == 2 and living(storage, "s") == 0
    with sole(storage, "s", "proof") as mine:
        assert mine


def test_an_owner_is_gone_when_its_process_is_and_not_when_it_is_elsewhere() -> None:
    mine = owners.token()
    assert not owners.gone(mine) and mine != owners.token()
    machine, pid, began, random = mine.split()
    assert owners.gone(f"{machine} {pid} {int(began) + 1} {random}")
    assert not owners.gone(f"elsewhere {pid} {int(began) + 1} {random}")
    assert not owners.gone(f"{machine} {pid} {owners.UNKNOWN} {random}")


@pytest.mark.parametrize(
    ("storage", "words"),
    [
        ("postgresql+psycopg2://me@host/db", r"no driver .*pip install 'kvtune\[postgres\]'"),
        ("postgresql+psycopg2://me@/db?host=/nowhere", "no driver"),
        ("mssql+pyodbc://me@host/db", "cannot share"),
    ],
)
def test_a_database_that_is_not_supported_is_named_with_a_cure(storage: str, words: str) -> None:
    with pytest.raises(UnsupportedError, match=words):
        fresh(storage, "s")
