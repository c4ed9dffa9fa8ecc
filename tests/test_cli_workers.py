"""--workers starts the same command line again, each on its GPU, and leaves no process behind."""

import os
import signal
import sys
import time
from pathlib import Path

import pytest

from kvtune.cli.workers import check, passed_on, spawn
from kvtune.errors import UsageError

SERVER = "postgresql+psycopg://me@host/db"


@pytest.fixture
def notes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a Python of our own, which runs nothing, notes its surroundings and words."""
    file, python = tmp_path / "notes", tmp_path / "python"
    python.write_text(
        "#!/bin/sh\n"
        f'echo "$$ $CUDA_VISIBLE_DEVICES $@" >> {file}\n'
        'case "$*" in *long*) exec sleep 60;; *bad*) echo wrong >&2; exit 4;; esac\n'
        'case "$*" in *killed*) kill -9 $$;; esac\n'
    )
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    return file


def noted(notes: Path, count: int) -> list[list[str]]:
    """Waits until so many processes have begun; returns the words of their notes, sorted."""
    while not notes.exists() or notes.read_text().count("\n") < count:
        time.sleep(0.01)
    return sorted(line.split() for line in notes.read_text().splitlines())


def lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize("storage", ["", "study.db", "sqlite:///study.db", "sqlite://"])
def test_workers_on_a_file_are_refused_with_the_cure(storage: str) -> None:
    with pytest.raises(UsageError, match=r"--workers 2 .*--storage postgresql\+psycopg://"):
        check(2, storage)
    check(1, storage)
    check(2, SERVER)


@pytest.mark.parametrize(
    "words",
    [
        ["search", "run", "--workers", "4", "--fresh", "--storage", SERVER],
        ["search", "--workers=4", "run", "--json", "--storage", SERVER],
        ["search", "run", "--storage", SERVER],
    ],
)
def test_a_further_worker_starts_no_more_and_deletes_nothing(words: list[str]) -> None:
    assert passed_on(words) == ["search", "run", "--storage", SERVER, "--quiet"]


@pytest.mark.parametrize(
    ("visible", "given"),
    [("0,1,2", ["0", "1", "2", "1"]), ("7", ["7"] * 4), ("GPU-a,GPU-b", ["GPU-a", "GPU-b"] * 2)],
)
def test_workers_go_round_the_visible_gpus(
    visible: str, given: list[str], notes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with spawn(5, ["search", "run"]):
        pass
    assert sorted(words[1] for words in noted(notes, 4)) == sorted(given)
    for words in noted(notes, 4):
        assert words[2:] == ["-m", "kvtune", "search", "run", "--quiet"]


def test_one_worker_starts_nothing(notes: Path) -> None:
    with spawn(1, ["search"]):
        assert not notes.exists()
    assert not notes.exists()


@pytest.mark.parametrize("stop", [KeyboardInterrupt, ValueError])
def test_workers_are_stopped_with_the_first(stop: type[BaseException], notes: Path) -> None:
    with pytest.raises(stop), spawn(3, ["long"]):
        pids = [int(words[0]) for words in noted(notes, 2)]
        raise stop
    assert not any(map(lives, pids))


@pytest.mark.parametrize(
    ("word", "said"), [("bad", "worker 1: wrong\n"), ("killed", "worker 1: Ended by signal 9.\n")]
)
def test_the_errors_of_a_failed_worker_are_shown(
    word: str, said: str, notes: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with spawn(2, [word]):
        pass
    shown = capfd.readouterr()
    assert shown.err == said and shown.out == ""


def test_the_first_waits_for_the_others(notes: Path) -> None:
    with spawn(2, ["long"]):
        ((pid, *_),) = noted(notes, 1)
        os.kill(int(pid), signal.SIGTERM)
    assert not lives(int(pid))


def test_a_wrong_command_line_fails_in_each_worker(capfd: pytest.CaptureFixture[str]) -> None:
    with spawn(2, ["methods", "nosuch"]):
        pass
    assert "worker 1: Error: " in capfd.readouterr().err
