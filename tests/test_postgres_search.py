"""A law of whole searches by many workers: the command line, a real server, a model, one front."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from kvtune.errors import MissingInputError
from kvtune.search import STUDY
from kvtune.study import rows


def load(name: str) -> ModuleType:
    file = Path(__file__).with_name(f"{name}.py")
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


TINY, SERVER = load("cli_tiny"), load("postgres_server")
kv = TINY.kv


@pytest.fixture
def url() -> Iterator[str]:
    """A database on a server of its own."""
    server = SERVER.Server()
    yield server.base()
    server.close()


def started(folder: Path, *more: str) -> subprocess.Popen[bytes]:
    """Starts `kvtune search` as a shell on another machine would."""
    command = [sys.executable, "-m", "kvtune", "search", str(folder), "-q", "--bytes-at", "1k"]
    surroundings = {**os.environ, "OMP_NUM_THREADS": "1"}
    with (folder / "said").open("ab") as said:
        return subprocess.Popen(
            [*command, "--trials", "1", *more], stdout=said, stderr=said, env=surroundings
        )


def front(folder: Path) -> list[str]:
    """The proved recipes, without the day they were made on."""
    files = sorted((folder / "front").glob("*.toml"))
    return ["".join(x for x in f.read_text().splitlines() if "date" not in x) for f in files]


def some(url: str) -> bool:
    """Whether a worker has told its first trials."""
    try:
        return len(rows(url, STUDY)) >= 2
    except MissingInputError:
        return False


def test_four_workers_of_which_one_is_killed_find_the_front_of_one(
    kv: Any, url: str, tmp_path: Path
) -> None:
    model, prose = TINY.tiny(tmp_path / "model"), TINY.text(tmp_path / "prose.txt")
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    made = kv("calibrate", model, "--data", prose, *TINY.SMALL, "--bytes-at", "1k", "-o", alone)
    assert made.code == 0, made.err
    shutil.copytree(alone, shared)
    assert started(alone).wait(180) == 0
    first = started(shared, "--storage", url, "--workers", "3")
    victim = started(shared, "--storage", url)
    while not some(url):
        time.sleep(0.05)
    victim.send_signal(signal.SIGKILL)  # in the midst of trials
    victim.wait()
    assert first.wait(180) == 0, (shared / "said").read_text()
    found, expected = rows(url, STUDY), rows(str(alone / "study.db"), STUDY)
    assert [row.number for row in found] == list(range(len(expected)))
    assert {(row.origin, row.values) for row in found} == {
        (row.origin, row.values) for row in expected
    }
    assert front(shared) == front(alone)
