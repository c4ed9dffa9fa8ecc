"""Measured KV-cache compression for your model: calibrate, search and prove recipes."""

import sys
from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# what users call, and the module that holds it: nothing heavy is imported before it is asked for
_HOMES = {
    "Recipe": "recipe",
    "Profile": "profile",
    "CompressedCache": "cache",
    "load": "cache",
    "prefill": "prefill",
    "Draft": "prefill",
    "Sizes": "bank",
    "calibrate": "calibrate",
    "Bounds": "goal",
    "Goal": "goal",
    "Limits": "search",
    "Search": "search",
    "Settings": "publish",
    "Tuner": "tune",
    "tune": "tune",
}
__all__ = ["__version__", *sorted(_HOMES)]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'kvtune' has no attribute {name!r}")
    import_module(f"kvtune.{_HOMES[name]}")
    for public, home in _HOMES.items():
        # an import binds modules here (kvtune.calibrate), but a function of that name is the face
        if module := sys.modules.get(f"kvtune.{home}"):
            globals()[public] = getattr(module, public)
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
