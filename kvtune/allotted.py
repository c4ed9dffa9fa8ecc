"""Allotted: a budget that layers share, written out as entries with budgets of their own."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from kvtune import parts
from kvtune.chains import Chain
from kvtune.entries import HeadEntry, LayerPolicy, Tier
from kvtune.errors import UsageError
from kvtune.models import Facts
from kvtune.retention import Allocator, Selector, Stats
from kvtune.shares import exact
from kvtune.spans import resolve, write

LEAVING = 65536  # tokens that leave the window, where a share of them is allotted
LEAST = 0.01  # of them: no layer gets a smaller share, unless all do (D2O)
TIMES = 8  # tokens that there are for each of a budget in tokens
DIGITS = 4  # of a share that is written

Read = Callable[[str, Sequence[int]], Tensor]  # a profile's tensor by name, of some layers
Amounts = tuple[float, ...]  # of a layer, or of each of its heads


def allotted(
    entries: Sequence[LayerPolicy], known: Facts, read: Read | None = None
) -> tuple[LayerPolicy, ...]:
    """Returns entries in which every budget is written: none of them says `allot`.

    Layers that get the same are one entry. Without `read`, there is no profile, and an allocator
    that needs one is refused.

    Raises:
        UsageError: an allocator goes by what calibration measured, and there is no profile; layers
        not covered exactly once.
    """
    if not any(entry.allot for entry in entries):
        return tuple(entries)
    owner = resolve([entry.span for entry in entries], len(known.layers))
    found: list[LayerPolicy] = []
    for index, entry in enumerate(entries):
        layers = [layer for layer, own in enumerate(owner) if own == index]
        found += _written(entry, layers, known, read)
    return tuple(found)


def _written(
    entry: LayerPolicy, layers: list[int], known: Facts, read: Read | None
) -> list[LayerPolicy]:
    if entry.allot is None:
        return [entry]
    allocator, select = parts.parse(entry.allot), parts.parse(entry.select or {})
    assert isinstance(allocator, Allocator) and isinstance(select, Selector), "both were checked"
    if allocator.reads and read is None:
        raise UsageError(
            f"layers {entry.span}: {allocator.name()} shares the budget out by what calibration "
            "measured.",
            "Run: kvtune fit RECIPE --profile profile.safetensors",
        )
    sharing = [layer for layer in layers if layer in known.compressible()]
    tensors = {name: read(name, sharing) for name in allocator.reads if read} if sharing else {}
    groups: dict[Amounts, list[int]] = {}
    if sharing:
        stats = Stats(len(sharing), known.layers[sharing[0]].kv_heads, 0, 0, tensors)
        for layer, own in zip(sharing, _amounts(entry, select, allocator, stats), strict=True):
            groups.setdefault(own, []).append(layer)
    if not groups:
        return [entry.model_copy(update={"allot": None})]
    # layers that are not compressed stand in the span too, and must be covered
    next(iter(groups.values())).extend(layer for layer in layers if layer not in sharing)
    return [_entry(entry, select, sorted(own), amounts) for amounts, own in groups.items()]


def _entry(
    entry: LayerPolicy, select: Selector, layers: list[int], amounts: Amounts
) -> LayerPolicy:
    ((common, _),) = Counter(amounts).most_common(1)
    others: dict[float, list[int]] = {}
    for head, amount in enumerate(amounts):
        if amount != common:
            others.setdefault(amount, []).append(head)
    heads = tuple(
        HeadEntry(span=write(own), kept=entry.kept, select=_table(entry, select, amount))
        for amount, own in others.items()
    )
    made: dict[str, Any] = {"select": _table(entry, select, common), "heads": heads}
    return entry.model_copy(update={"span": write(layers), "allot": None, **made})


def _table(entry: LayerPolicy, select: Selector, amount: float) -> dict[str, Any]:
    return {**(entry.select or {}), "budget" if select.budget else "share": amount}


def _amounts(
    entry: LayerPolicy, select: Selector, allocator: Allocator, stats: Stats
) -> list[Amounts]:
    """What each layer is given, or each of its heads: tokens, or shares."""
    ((sinks, recent),) = entry.windows()
    window = sinks + recent
    if select.budget:
        unit, budget = _unit(entry), select.budget
        if budget < window + unit:  # refused wherever it is used, with or without an allocator
            return [(budget,)] * stats.layers
        stats = Stats(stats.layers, stats.heads, window + unit, TIMES * budget, stats.tensors)
        found = allocator.allot(stats, budget)
        if unit > 1:  # what the runtime would round down is given to others
            rows = found if allocator.per_head else found[None]
            made = torch.stack([_in_units(row, budget, window, unit) for row in rows])
            found = made if allocator.per_head else made[0]
        return [tuple(row) for row in found.reshape(stats.layers, -1).tolist()]
    least, mean = (window + round(x * LEAVING) for x in (min(LEAST, select.share), select.share))
    stats = Stats(stats.layers, stats.heads, least, window + LEAVING, stats.tensors)
    part = (allocator.allot(stats, mean) - window).double() / LEAVING
    rounded = part.reshape(stats.layers, -1).tolist()
    return [tuple(max(10**-DIGITS, round(x, DIGITS)) for x in row) for row in rounded]


def _in_units(row: Tensor, budget: int, window: int, unit: int) -> Tensor:
    """The same tokens in whole units behind the window, of the sum that equal ones would have."""
    total = len(row) * ((budget - window) // unit)
    return exact((row - window) / unit, total, 1, total) * unit + window


def _unit(entry: LayerPolicy) -> int:
    """Tokens that are encoded together."""
    tiers = [own for own in (entry.kept, entry.rest) if isinstance(own, Tier)]
    chains: list[Chain] = [chain for tier in tiers for chain in tier.chains()]
    return math.lcm(*(chain.block for chain in chains))
