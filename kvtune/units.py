"""Units: the cache layers of layers that live and die together, made and forked as one."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from kvtune.grouped import bonded
from kvtune.heads import make_layer
from kvtune.layer import CompressedLayer, Shared
from kvtune.lent import BorrowingLayer, LendingLayer
from kvtune.pages import MakeSite
from kvtune.policy import Policy
from kvtune.sharing import Unit

ENDLESS = 1 << 40  # tokens
Sites = Callable[[int], tuple[MakeSite, MakeSite]]  # of a layer


def make_unit(
    unit: Unit,
    policies: Sequence[Policy],
    sites: Sites,
    shared: Shared | None = None,
    handed: Callable[[int], int] = lambda _: 0,
) -> list[CompressedLayer]:
    """Empty layers of a unit, in order; the model hands a layer's cache on to so many others."""
    first = policies[unit[0]]
    if first.sharer is not None:
        counts = [handed(index) for index in unit]
        return list(bonded(first, tuple(map(sites, unit)), counts, shared))
    borrowers = len(unit) - 1 + handed(unit[0])
    if borrowers == 0:
        return [make_layer(first, sites(unit[0]), shared)]
    if first.is_dense:  # a window without an end, so that a crop takes back any tokens
        first = first.model_copy(update={"recent": ENDLESS})
    owner = LendingLayer(first, sites(unit[0]), borrowers, shared)
    return [owner, *(BorrowingLayer(policies[index], owner) for index in unit[1:])]


def forked(layers: Sequence[CompressedLayer]) -> list[CompressedLayer]:
    """Copy-on-write twins of all layers of a unit."""
    found: list[CompressedLayer] = [layers[0].fork()]
    for layer in layers[1:]:
        own = layer.fork_of(found[0]) if isinstance(layer, BorrowingLayer) else layer.fork()
        found.append(own)
    return found
