"""For the tests of promises: `kvtune tune` under an audit hook, or killed again and again."""

import json
import os
import random
import signal
import sys
import sysconfig
import time
from contextlib import redirect_stdout
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from optuna.storages import RDBStorage

from kvtune.cli import main

SEED = 7
# where code may come from: Python, what is installed, and kvtune itself
SOUND = tuple(
    {os.path.realpath(path) for path in (*sysconfig.get_paths().values(), sys.prefix)}
    | {str(Path(__file__).resolve().parents[1] / part) for part in ("kvtune", "kernels")}
)
TOLD = ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "pickle.find_class")
SPAWNS = ("subprocess.Popen", "os.exec", "os.posix_spawn", "os.system")


def words(place: Path, folder: Path, *more: str) -> list[str]:
    """The command line of a small run of the tiny model that lies in `place`."""
    sizes = ("--sequences", "2", "--context", "256", "--continuation", "16", "--bytes-at", "1k")
    data = ("--data", str(place / "text.txt"), "--template", "search-kivi", "--offline", "-q")
    return ["tune", str(place / "model"), "-o", str(folder), *sizes, *data, *more]


def audited(place: Path, folder: Path) -> dict[str, Any]:
    """Runs the whole job and returns what it did that it should not do, and how much it did."""
    seen: dict[str, list[str]] = {"told": [], "spawned": [], "foreign": []}
    counts = {"exec": 0, "open": 0}

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in TOLD:
            # a socket of this machine's own is no network
            if event != "socket.connect" or isinstance(arguments[1], tuple):
                seen["told"].append(f"{event} {arguments[1:]}")
        elif event in SPAWNS:
            seen["spawned"].append(f"{event} {arguments[:2]}")
        elif event == "exec":
            counts["exec"] += 1
            file = getattr(arguments[0], "co_filename", "")
            # code that a library makes itself has no file
            if file.startswith("/") and not os.path.realpath(file).startswith(SOUND):
                seen["foreign"].append(file)
        elif event == "open":
            counts["open"] += 1

    sys.addaudithook(hook)
    code = main([*words(place, folder), "--trials", "4"])
    return {"code": code, **seen, **counts}


def life(place: Path, folder: Path, seconds: float) -> bool:
    """Lets a child run the job and kills it after a time; returns whether it came to its end."""
    if not (child := os.fork()):
        torch.set_num_threads(1)
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
            os._exit(main([*words(place, folder), "--trials", "4"]))
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if os.waitpid(child, os.WNOHANG)[0]:
            return True
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    return not os.WIFSIGNALED(status)


def warm() -> None:
    """Imports once what every child would import again; computes nothing, so forks are safe."""
    import_module("kvtune.cli.run")
    import_module("kvtune.cli.plan")
    import_module("transformers.models.llama.modeling_llama")
    import_module("transformers.generation.utils")
    RDBStorage("sqlite://").engine.dispose()


def killed(place: Path, folder: Path, seconds: float, times: int) -> int:
    """Kills the job at random moments of its time, then lets it finish; returns the kills."""
    chance, deaths = random.Random(SEED), 0
    for _ in range(times):
        deaths += not life(place, folder, chance.uniform(0.05, 0.6) * seconds)
    assert life(place, folder, 600)
    return deaths


if __name__ == "__main__":
    torch.set_num_threads(1)
    mode, place, folder = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    if mode == "audit":
        print(json.dumps(audited(place, folder)))
    else:
        warm()
        began = time.monotonic()
        assert life(place, folder.with_name("straight"), 600)
        print(json.dumps({"deaths": killed(place, folder, time.monotonic() - began, 6)}))
