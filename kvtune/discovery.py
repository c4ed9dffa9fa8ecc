"""Discovery: what is defined in a folder of the package, one thing per file, found by file name."""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

from kvtune.errors import UsageError, suggest


def names(folder: str) -> tuple[str, ...]:
    """The names of all files in `kvtune/<folder>`."""
    package = importlib.import_module(f"kvtune.{folder}")
    return tuple(sorted(module.name for module in pkgutil.iter_modules(package.__path__)))


def find(folder: str, name: str, kind: type, what: str, several: str) -> type[Any]:
    """Returns the one class of a kind that the file `kvtune/<folder>/<name>.py` defines.

    Args:
        what: how errors call what a file stands for.
        several: how they call what it defines.

    Raises:
        UsageError: no such file. Only names of existing files resolve, since recipes come from
        strangers.
    """
    if name not in (known := names(folder)):
        raise UsageError(f"There is no {what} {name!r}.", suggest(name, known))
    module = importlib.import_module(f"kvtune.{folder}.{name}")
    found = [
        thing
        for thing in vars(module).values()
        if isinstance(thing, type)
        and issubclass(thing, kind)
        and thing.__module__ == module.__name__
    ]
    if len(found) != 1:
        raise UsageError(f"{folder}/{name}.py defines {len(found)} {several} instead of one.")
    return found[0]
