"""Views: what layers may be under one window, what is predicted of it, and parts of it that are
told beside the whole."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from kvtune.space import Choices, Triple
from kvtune.surrogate import Rung, Surrogate

ALONE = "bits alone"  # origins of the front of settings without a projection
# where tokens are searched: the fronts of some axes alone, and what they save by
OWN = {
    "tokens alone": frozenset({"tokens"}),
    ALONE: frozenset({"bits"}),
    "rank alone": frozenset({"rank"}),
    "rank and bits": frozenset({"rank", "bits"}),
}


class View(NamedTuple):
    """The search under one window: what layers may be, and what is predicted of it."""

    choices: Choices
    whole: Surrogate
    by_head: Surrogate | None  # where a layer lets its kv heads differ


def without_projections(views: Mapping[str, View]) -> dict[str, View]:
    """The views without projections; nothing where a place has no other setting."""
    return _only(views, lambda rung: not rung.chain.projects)


def saving_by(views: Mapping[str, View], used: frozenset[str]) -> dict[str, View]:
    """The views of settings that save by nothing but some axes; nothing where none does."""

    def wanted(rung: Rung) -> bool:
        return isinstance(rung.chain, Triple) and rung.chain.axes <= used

    found = _only(views, wanted)
    every = [own for view in found.values() for own in view.whole.rungs.values()]
    return found if any(len(own) > 1 for own in every) else {}


def _only(views: Mapping[str, View], wanted: Callable[[Rung], bool]) -> dict[str, View]:
    """The views of some settings; nothing where a place has none."""
    found = {}
    for name, view in views.items():
        rungs = {
            place: tuple(rung for rung in own if wanted(rung))
            for place, own in view.whole.rungs.items()
        }
        if all(rungs.values()):
            found[name] = View(view.choices, Surrogate(rungs, view.whole.growth), None)
    return found
