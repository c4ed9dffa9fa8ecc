"""The search loop survives kills, broken files, full disks and a second writer."""

import importlib.util
import itertools
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random
from types import ModuleType

import optuna
import pytest

from kvtune.errors import IntegrityError, ResourceError, UsageError
from kvtune.study import Choice, Outcome, Row, fresh, rows
from kvtune.table import Evaluate

ROOT = Path(__file__).parents[1]
WORKER = Path(__file__).with_name("study_worker.py")
TRIALS = 25


def load() -> ModuleType:
    """Imports the worker by its path: tests are no package."""
    spec = importlib.util.spec_from_file_location("study_worker", WORKER)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


worker = load()
SMALL, Counting, small = worker.SMALL, worker.Counting, worker.small


def start(mode: str, base: Path, trials: int = TRIALS) -> subprocess.Popen[str]:
    """Starts the worker."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    return subprocess.Popen(
        [sys.executable, str(WORKER), mode, str(base), str(trials)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": paths},
    )


def finish(mode: str, base: Path, trials: int = TRIALS) -> str:
    """Runs the worker to its end; returns the last line that it prints."""
    with start(mode, base, trials) as process:
        out, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    return out.splitlines()[-1]


def stored(base: Path) -> list[Row]:
    """Reads the worker's table from the file."""
    return rows(f"sqlite:///{base}", worker.NAME)


def states(base: Path, name: str) -> list[str]:
    """Returns the state of every trial in the file, in order, as Optuna has it."""
    store = optuna.storages.RDBStorage(f"sqlite:///{base}")
    trials = optuna.load_study(study_name=name, storage=store).trials
    store.remove_session()
    store.engine.dispose()
    assert [trial.number for trial in trials] == list(range(len(trials)))
    return [trial.state.name for trial in trials]


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    """The table of a search that nothing disturbed."""
    base = tmp_path_factory.mktemp("straight") / "study.db"
    table: list[Row] = worker.search(str(base), TRIALS)
    return table


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """Where a study goes."""
    return tmp_path / "study.db"


def kill_at_random(base: Path, moments: Random) -> bool:
    """Kills a worker somewhere between its first instruction and its last; tells if it landed."""
    with start("run", base) as process:
        assert process.stdout is not None
        if moments.random() < 0.75:
            process.stdout.readline()
        time.sleep(moments.uniform(0.0, 0.6))
        process.kill()
    return process.returncode == -signal.SIGKILL


def test_killed_at_twenty_random_moments_the_tables_equal_the_straight_one(
    straight: list[Row], tmp_path: Path
) -> None:
    moments, landed, used = Random(5), 0, []
    for round_ in itertools.count():
        if landed >= 20:
            break
        used.append(tmp_path / f"{round_}.db")
        landed += sum(kill_at_random(used[-1], moments) for _ in range(5))
    for base in used:
        assert worker.search(str(base), TRIALS) == straight
        assert len(states(base, worker.NAME)) == TRIALS
        assert "RUNNING" not in states(base, worker.NAME)


def test_killed_between_any_two_writes_the_table_equals_the_straight_one(
    straight: list[Row], base: Path
) -> None:
    deaths = int(finish("steps", base))
    assert deaths > TRIALS
    assert stored(base) == straight
    assert len(states(base, worker.NAME)) == TRIALS


def test_a_trial_left_running_keeps_its_number_and_is_measured_again(base: Path) -> None:
    calls = Counting()

    def interrupted(choice: Choice, rows: Sequence[Row]) -> Outcome:
        calls(choice)
        if len(calls.calls) == 4:
            raise KeyboardInterrupt
        return Outcome((1.0, 2.0), {"try": float(len(calls.calls))})

    with pytest.raises(KeyboardInterrupt):
        small(base, interrupted, 6)
    done = rows(f"sqlite:///{base}", "s")
    assert states(base, "s") == ["COMPLETE"] * len(done) + ["RUNNING"]
    table = small(base, interrupted, 6, resume=True)
    assert table[: len(done)] == done
    assert calls.calls[3] == calls.calls[4] == tuple(table[len(done)].choice.values())
    assert table[len(done)].attrs == {"try": 5.0}


def killed_before_telling(base: Path, evaluate: Evaluate, patch: pytest.MonkeyPatch) -> None:
    """Leaves a study whose first trial was measured, noted and not told."""

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with patch.context() as once, pytest.raises(KeyboardInterrupt):
        once.setattr(optuna.study.Study, "tell", killed)
        small(base, evaluate, 2, seed=2)


def test_a_trial_marked_infeasible_before_a_kill_stays_so(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_big(choice: Choice, rows: Sequence[Row]) -> Outcome:
        raise ResourceError("too big")

    killed_before_telling(base, too_big, monkeypatch)
    evaluate = Counting()
    table = small(base, evaluate, 2, seed=2, resume=True)
    assert [row.state for row in table] == ["infeasible", "complete"]
    assert table[0].attrs == {"error": "too big"} and len(evaluate.calls) == 1


def test_nothing_noted_before_a_kill_stays_in_a_row_measured_again(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed_before_telling(base, lambda *_: Outcome((1.0, 1.0), {"old": 1.0}), monkeypatch)
    table = small(base, lambda *_: Outcome((2.0, 2.0), {"new": 2.0}), 1, seed=2, resume=True)
    assert table[0].attrs == {"new": 2.0} and table[0].values == (2.0, 2.0)


def test_a_fault_of_the_evaluator_is_raised_and_its_trial_is_kept(base: Path) -> None:
    def faulty(choice: Choice, rows: Sequence[Row]) -> Outcome:
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        small(base, faulty, 6)
    assert states(base, "s") == ["RUNNING"]
    assert len(small(base, Counting(), 6, resume=True)) == 6


def broken_files(base: Path) -> Iterator[tuple[str, Path]]:
    """Makes files that are no study, each with what its refusal says."""
    small(base, Counting(), 3)
    text = base.with_name("text.db")
    text.write_text("these are notes, and no database at all\n" * 9)
    yield "not an SQLite database", text
    foreign = base.with_name("foreign.db")
    with sqlite3.connect(foreign) as other:
        other.execute("CREATE TABLE songs (name TEXT)")
    other.close()
    yield "not Optuna's", foreign
    newer = Path(shutil.copy(base, base.with_name("newer.db")))
    with sqlite3.connect(newer) as other:
        other.execute("UPDATE alembic_version SET version_num = 'v99.0.0.a'")
        other.execute("DROP TABLE trial_heartbeats")
    other.close()
    yield "another version of Optuna", newer
    torn = Path(shutil.copy(base, base.with_name("torn.db")))
    torn.write_bytes(torn.read_bytes()[: torn.stat().st_size // 2])
    yield "broken study file", torn


def test_a_broken_study_file_is_refused_in_words_and_left_as_it_is(base: Path) -> None:
    for words, file in broken_files(base):
        before = file.read_bytes()
        for attempt in (
            lambda x=file: small(x, Counting(), 3, resume=True),
            lambda x=file: rows(f"sqlite:///{x}", "s"),
            lambda x=file: fresh(f"sqlite:///{x}", "s"),
        ):
            with pytest.raises(IntegrityError, match=words):
                attempt()
            assert file.read_bytes() == before


def test_a_study_that_kvtune_did_not_make_is_refused(base: Path) -> None:
    store = optuna.storages.RDBStorage(f"sqlite:///{base}")
    study = optuna.create_study(study_name="s", storage=store, directions=["minimize"] * 2)
    study.add_trial(optuna.trial.create_trial(values=[1.0, 2.0]))
    store.remove_session()
    store.engine.dispose()
    with pytest.raises(IntegrityError, match="not made by kvtune"):
        small(base, Counting(), 3, resume=True)


def test_a_second_writer_is_refused_while_the_first_lives(base: Path) -> None:
    with start("hold", base) as first:
        try:
            assert first.stdout is not None
            assert [first.stdout.readline().strip() for _ in range(2)] == ["ready", "held"]
            with pytest.raises(UsageError, match=f"process {first.pid}"):
                worker.search(str(base), TRIALS)
            assert stored(base) == []
        finally:
            first.kill()
    assert len(worker.search(str(base), 3)) == 3


def test_a_full_disk_is_an_answer_and_the_study_goes_on_after_it(
    straight: list[Row], base: Path
) -> None:
    assert finish("full", base, 1000).startswith("ResourceError cannot write study file")
    assert worker.search(str(base), TRIALS)[:TRIALS] == straight
