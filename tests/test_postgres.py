"""Workers on one study in PostgreSQL: no trial is lost, none is done twice, whoever dies."""

import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from random import Random
from types import ModuleType
from typing import Any

import psycopg
import pytest

from kvtune import leases
from kvtune.commons import living, shared, sole
from kvtune.errors import MissingInputError, UsageError
from kvtune.study import Choice, Outcome, Row, fresh, front, rows

ROOT = Path(__file__).parents[1]
LONG, SHORT = 60.0, 1.0  # seconds of a lease
TURN_ONLY = 1  # the row of the leases that is locked in turns


def load(name: str) -> ModuleType:
    """Imports a file beside this one by its path: tests are no package."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


worker, Server = load("postgres_worker"), load("postgres_server").Server
Worker = subprocess.Popen[str]


@pytest.fixture(scope="module")
def server() -> Iterator[Any]:
    """A server for all tests that let it live."""
    made = Server()
    yield made
    made.close()


@pytest.fixture
def url(server: Any) -> str:
    """A new database."""
    made: str = server.base()
    return made


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """Where workers note what they evaluate."""
    return tmp_path / "log"


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    """Ends what is entered in it."""
    with ExitStack() as made:
        yield made


@pytest.fixture
def straight(tmp_path: Path) -> list[Row]:
    """The table of one undisturbed worker, in SQLite."""
    table: list[Row] = worker.search(str(tmp_path / "study.db"), 24)
    return table


def start(stack: ExitStack, mode: str, url: str, log: Path, lease: float = LONG) -> Worker:
    """Starts a worker, which dies with the test."""
    process = subprocess.Popen(
        [sys.executable, worker.__file__, mode, url, str(log), str(lease)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])},
    )
    stack.enter_context(process)
    stack.callback(process.kill)
    return process


def ended(process: Worker) -> str:
    """Waits for a worker to end well; returns what it printed."""
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    return out.strip()


def said(process: Worker) -> str:
    """Waits for a line of a worker."""
    assert process.stdout is not None
    return process.stdout.readline().strip()


def evaluations(log: Path) -> Counter[str]:
    """How often the evaluation of each configuration was begun."""
    if not log.exists():
        return Counter()
    return Counter(line.partition(" ")[2] for line in log.read_text().splitlines())


def stored_leases(url: str) -> int:
    """Counts the rows of the table of leases."""
    with psycopg.connect(url.replace("+psycopg", "")) as connection:
        found = connection.execute("SELECT count(*) FROM kvtune_leases").fetchone()
    assert found is not None
    return int(found[0])


def bare(table: Sequence[Row]) -> list[tuple[Any, ...]]:
    """Rows without the notes of who measured them."""
    return [(x.number, x.origin, x.choice, x.values, x.state, x.memo_of) for x in table]


def test_one_worker_on_a_server_finds_what_it_finds_in_a_file(url: str, tmp_path: Path) -> None:
    file = str(tmp_path / "study.db")
    table = worker.search(url, 40, given=5)
    assert table == worker.search(file, 40, given=5) == rows(url, worker.NAME)
    assert {row.origin for row in table[5:]} == {"random", "sampler"}
    assert stored_leases(url) == TURN_ONLY


def test_a_killed_worker_loses_no_trial_and_none_is_done_twice(
    url: str, log: Path, stack: ExitStack, straight: list[Row]
) -> None:
    victim = start(stack, "hang:24", url, log)
    assert said(victim) == "held"
    others = [start(stack, "search:24", url, log) for _ in range(3)]
    while len(evaluations(log)) < 24:  # all are begun
        time.sleep(0.05)
    assert {process.poll() for process in others} == {None}  # they wait for the one that lives
    victim.kill()
    assert [ended(process) for process in others] == ["24"] * 3
    table = rows(url, worker.NAME)
    assert bare(table) == bare(straight)
    assert bare(front(table)) == bare(front(straight))
    twice = {choice: count for choice, count in evaluations(log).items() if count > 1}
    begun = [line.partition(" ")[2] for line in log.read_text().splitlines()]
    assert twice == {begun[1]: 2} and len(begun) == 25
    assert stored_leases(url) == TURN_ONLY + 1  # that the victim is there, which nobody believes


def test_workers_killed_at_random_moments_lose_no_trial(
    url: str, log: Path, stack: ExitStack, straight: list[Row]
) -> None:
    moments, killed = Random(3), 0
    for _ in range(3):
        crowd = [start(stack, "resume:24", url, log) for _ in range(3)]
        until = len(evaluations(log)) + 1 + moments.randrange(3)
        while len(evaluations(log)) < until and crowd[0].poll() is None:
            time.sleep(0.01)
        for process in crowd:
            time.sleep(moments.uniform(0.0, 0.1))
            process.kill()
            killed += process.wait() == -signal.SIGKILL
    table = worker.search(url, 24, resume=True)
    assert bare(table) == bare(straight)
    assert killed and sum(evaluations(log).values()) <= 24 + killed
    assert stored_leases(url) == TURN_ONLY


def test_workers_that_race_for_tiny_trials_never_hold_the_same_one(
    url: str, log: Path, stack: ExitStack
) -> None:
    crowd = [start(stack, "search:200", url, log) for _ in range(4)]
    assert [ended(process) for process in crowd] == ["200"] * 4
    table = rows(url, worker.NAME)
    assert [row.number for row in table] == list(range(200))
    assert [row.origin for row in table] == [x.origin for x in worker.starts(200)]
    assert set(evaluations(log).values()) == {1} and len(evaluations(log)) == 200
    assert len({line.partition(" ")[0] for line in log.read_text().splitlines()}) == 4


def test_workers_that_sample_never_evaluate_a_configuration_twice(
    url: str, log: Path, stack: ExitStack
) -> None:
    crowd = [start(stack, "sample", url, log) for _ in range(3)]
    assert [ended(process) for process in crowd] == [str(worker.SAMPLED)] * 3
    table = rows(url, worker.NAME)
    assert [row.number for row in table] == list(range(worker.SAMPLED))
    assert {"sampler"} <= {row.origin for row in table}
    assert set(evaluations(log).values()) == {1}
    assert len(evaluations(log)) == sum(row.memo_of is None for row in table)


def test_a_worker_whose_lease_was_taken_over_tells_nothing(
    url: str, log: Path, stack: ExitStack
) -> None:
    sleeper = start(stack, "hang:6", url, log, SHORT)
    assert said(sleeper) == "held"
    sleeper.send_signal(signal.SIGSTOP)  # alive, but it renews nothing
    assert ended(start(stack, "resume:6", url, log, SHORT)) == "6"
    before = rows(url, worker.NAME)
    Path(f"{log}.go").touch()
    sleeper.send_signal(signal.SIGCONT)
    assert ended(sleeper) == "6"
    assert rows(url, worker.NAME) == before
    assert [row.attrs["worker"] == sleeper.pid for row in before] == [True] + [False] * 5
    assert max(evaluations(log).values()) == 2


def test_a_result_that_comes_too_late_is_dropped(url: str) -> None:
    def late(choice: Choice, rows: Sequence[Row]) -> Outcome:
        if not rows:
            with psycopg.connect(url.replace("+psycopg", "")) as connection:
                connection.execute("UPDATE kvtune_leases SET owner = 'a 1 - b', expires = 9e18")
            worker.search(url, 1, resume=True, seconds=0.3)
            with psycopg.connect(url.replace("+psycopg", "")) as connection:
                connection.execute("UPDATE kvtune_leases SET expires = 0")
            table = worker.search(url, 1, in_time, resume=True)
            assert [row.attrs for row in table] == [{"in": "time"}]
        return Outcome((9.0, 9.0))

    def in_time(choice: Choice, rows: Sequence[Row]) -> Outcome:
        return Outcome((1.0, 1.0), {"in": "time"})

    assert [row.values for row in worker.search(url, 1, late)] == [(1.0, 1.0)]


def test_a_trial_is_given_back_at_once_by_a_worker_that_stops(url: str) -> None:
    def stopped(choice: Choice, rows: Sequence[Row]) -> Outcome:
        if len(rows) == 2:
            raise KeyboardInterrupt
        return Outcome((1.0, 2.0))

    with pytest.raises(KeyboardInterrupt):
        worker.search(url, 6, stopped)
    assert stored_leases(url) == TURN_ONLY
    table = worker.search(url, 6, resume=True)
    assert [row.number for row in table] == list(range(6))


def test_a_worker_joins_those_at_work_unasked_and_nobody_deletes_their_study(url: str) -> None:
    seen = []

    def meanwhile(choice: Choice, rows: Sequence[Row]) -> Outcome:
        if not rows:
            assert living(url, worker.NAME) == 1
            with pytest.raises(UsageError, match="1 more worker"):
                fresh(url, worker.NAME)
            seen.extend(worker.search(url, 6, seconds=1.0))
        return worker.evaluate(choice)

    news: list[int] = []
    table = worker.search(url, 6, meanwhile, on_trial=lambda row, _: news.append(row.number))
    assert [row.number for row in seen] == [1, 2, 3, 4, 5]
    assert [row.number for row in table] == list(range(6)) and sorted(news) == list(range(6))
    assert living(url, worker.NAME) == 0
    with pytest.raises(UsageError, match="--resume"):
        worker.search(url, 6)
    fresh(url, worker.NAME)
    assert len(worker.search(url, 3)) == 3


def test_a_lost_server_is_an_answer_and_the_study_goes_on_when_it_is_back() -> None:
    own = Server()
    try:
        url = own.base()

        def cut(choice: Choice, rows: Sequence[Row]) -> Outcome:
            if len(rows) == 3:
                own.kill()
            return worker.evaluate(choice)

        with pytest.raises(MissingInputError, match=r"database .* fails: .*Is its server up\?"):
            worker.search(url, 6, cut, lease=SHORT)
        with pytest.raises(MissingInputError, match="Is its server up"):
            worker.search(url, 6)
        own.start()
        table = worker.search(url, 6, resume=True)
        assert [row.number for row in table] == list(range(6))
    finally:
        own.close()


@pytest.mark.parametrize("scheme", ["postgresql", "postgresql+psycopg"])
def test_a_server_that_is_not_there_is_named_without_its_password(scheme: str) -> None:
    with pytest.raises(
        MissingInputError, match=r"me:\*\*\*@.* fails: .*Is its server up"
    ) as caught:
        worker.search(f"{scheme}://me:secret@/db?host=/nowhere", 1)
    assert "secret" not in str(caught.value)


def test_all_workers_get_one_shared_value(url: str, log: Path, stack: ExitStack) -> None:
    crowd = [start(stack, "share", url, log) for _ in range(4)]
    found = {ended(process) for process in crowd}
    assert len(found) == 1
    assert str(shared(url, worker.NAME, "scale", lambda: pytest.fail("made again"))) in found
    assert shared(url, worker.NAME, "other", lambda: 1) == 1
    fresh(url, worker.NAME)
    assert shared(url, worker.NAME, "scale", lambda: 2) == 2


def test_sole_work_passes_on_when_its_owner_is_killed(
    url: str, log: Path, stack: ExitStack
) -> None:
    owner = start(stack, "sole", url, log)
    assert said(owner) == "True"
    with sole(url, worker.NAME, "proof") as mine, sole(url, worker.NAME, "else") as other:
        assert not mine and other
    owner.kill()
    owner.wait()
    with sole(url, worker.NAME, "proof") as mine:
        assert mine
    with sole(url, worker.NAME, "proof") as mine:
        assert mine


def test_the_death_of_a_worker_elsewhere_shows_when_its_lease_is_over(
    url: str, log: Path, stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "gone", lambda _: False)  # as for a worker on another machine
    owner = start(stack, "sole", url, log, SHORT)
    assert said(owner) == "True"
    owner.kill()
    owner.wait()
    with sole(url, worker.NAME, "proof") as mine:
        assert not mine
    while not mine:
        with sole(url, worker.NAME, "proof", SHORT) as mine:
            pass
