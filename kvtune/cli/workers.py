"""--workers: further processes of the same command line, which search the same study."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from threading import Thread
from typing import Annotated

import typer

from kvtune.cli.faults import INTERRUPTED
from kvtune.errors import UsageError

PATIENCE = 30.0  # seconds for a worker to give its trial back and end
LAST = 20  # lines of what a failed worker said

Workers = Annotated[
    int,
    typer.Option(
        "--workers",
        min=1,
        metavar="N",
        help="Processes of this machine that search together, over all GPUs; needs --storage.",
        rich_help_panel="Search",
    ),
]


def check(count: int, storage: str) -> None:
    """Refuses several workers on a database that one process at a time writes.

    Raises:
        UsageError: it is an SQLite file.
    """
    from kvtune.storage import address, is_server

    if count > 1 and not (storage and is_server(address(storage))):
        raise UsageError(
            f"--workers {count} needs a database that several processes may write.",
            "Give --storage postgresql+psycopg://USER@HOST/DATABASE.",
        )


@contextmanager
def spawn(count: int, words: Sequence[str]) -> Iterator[None]:
    """Runs `count - 1` more processes of a command line beside the body, each on the next GPU.

    Only the errors of those that fail are shown. They are waited for in the end, and stopped
    when the body is. `--fresh` is for the first process alone, before it calls this.

    Args:
        words: the command line behind `kvtune`.
    """
    command, devices = [sys.executable, "-m", "kvtune", *passed_on(words)], _devices(count)
    running: list[tuple[subprocess.Popen[str], Thread]] = []
    try:
        for index in range(1, count):
            running.append(_started(index, command, _surroundings(index, count, devices)))
        yield
        for _, watcher in running:
            watcher.join()
    except BaseException:
        _stop([process for process, _ in running])
        for _, watcher in running:
            watcher.join()
        raise


def passed_on(words: Sequence[str]) -> list[str]:
    """The words of a command line for a further worker, who speaks of nothing but errors."""
    kept, rest = [], iter(words)
    for word in rest:
        if word == "--workers":
            next(rest, None)
        elif word not in ("--fresh", "--json") and not word.startswith("--workers="):
            kept.append(word)
    return [*kept, "--quiet"]


def _devices(count: int) -> list[str]:
    """The GPUs as the driver names them to this process."""
    if count == 1:
        return []
    if (named := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name for name in named.split(",") if name.strip() not in ("", "-1")]
    import torch

    return [str(index) for index in range(torch.cuda.device_count())]


def _surroundings(index: int, count: int, devices: Sequence[str]) -> dict[str, str]:
    """The environment of a worker: one GPU, or its share of the cores."""
    if devices:
        return {**os.environ, "CUDA_VISIBLE_DEVICES": devices[index % len(devices)]}
    share = max(1, (os.cpu_count() or 1) // count)
    return {"OMP_NUM_THREADS": str(share), **os.environ}


def _started(
    index: int, command: Sequence[str], surroundings: dict[str, str]
) -> tuple[subprocess.Popen[str], Thread]:
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=surroundings,
        process_group=0,  # Ctrl-C reaches it once, through us
    )
    watcher = Thread(target=partial(_watch, index, process), daemon=True)
    watcher.start()
    return process, watcher


def _watch(index: int, process: subprocess.Popen[str]) -> None:
    """Reads what a worker says; shows it at once when it failed."""
    _, said = process.communicate()
    code = process.returncode
    if code in (0, INTERRUPTED, -signal.SIGTERM):
        return
    ended = [f"Ended by signal {-code}."] if code < 0 else []
    for line in [*said.splitlines(), *ended][-LAST:]:
        print(f"worker {index}: {line}", file=sys.stderr)


def _stop(running: Sequence[subprocess.Popen[str]]) -> None:
    """Asks all workers to end in good order; those that do not are killed."""
    for process in running:
        process.terminate()
    for process in running:
        try:
            process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
