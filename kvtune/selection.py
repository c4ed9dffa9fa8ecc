"""Which settings of a layer that selects tokens go together; what does not is refused in words."""

from __future__ import annotations

import math

from kvtune.chains import Chain
from kvtune.errors import UsageError
from kvtune.retention import Merger, Selector

Chains = tuple[Chain, Chain]  # of keys and of values


def check(
    select: Selector,
    window: tuple[int, int],
    kept: Chains,
    rest: Chains | None,
    merge: Merger | None,
    where: str,
) -> None:
    """Raises UsageError where a selector, sinks and recent tokens, chains and a merger do not go
    together; `where` is for errors."""
    _check_budget(select, window, kept, where)
    _check_places(select, (*kept, *(rest or ())), merge, where)
    if not select.alike and (joint := [c for c in (*kept, *(rest or ())) if not c.apart]):
        raise UsageError(
            f"{where}: {joint[0]} stores heads together, but {select.name()} lets each head keep "
            "other tokens.",
            "Add alike = true to select.",
        )
    for chain, other in zip(kept, rest or (), strict=False):
        fitted, again = ({c.name() for c in own.codecs if c.fits} for own in (chain, other))
        if chain != other and (twice := fitted & again):
            raise UsageError(
                f"{where}: {min(twice)} is fitted in both tiers, and a side has its tensors once.",
                "Give both tiers the same chain, or leave it out of one.",
            )
    if merge is not None and rest is not None:
        raise UsageError(
            f"{where}: tokens that lose are merged, or stored in a rest tier, not both.",
            "Leave merge or rest out.",
        )
    coded = any(chain.codecs for chain in kept)
    if select.budget and coded and (merge is not None or rest is not None):
        raise UsageError(
            f"{where}: under a budget in tokens what is kept competes again, and codes are never "
            "decoded to be merged or encoded anew.",
            "Give a share instead of a budget, or leave the codecs of kept out.",
        )


def _check_budget(select: Selector, window: tuple[int, int], kept: Chains, where: str) -> None:
    if not select.budget:
        return
    blocks = math.lcm(*(chain.block for chain in kept))
    least = sum(window) + blocks
    if select.budget < least:
        what = f"sinks {window[0]} and recent {window[1]}"
        also = f", and {blocks} tokens that are encoded together" if blocks > 1 else ""
        raise UsageError(
            f"{where}: a budget of {select.budget} tokens leaves no room beside {what}{also}.",
            f"Give a budget of at least {least}, or a smaller window.",
        )


def _check_places(
    select: Selector, chains: tuple[Chain, ...], merge: Merger | None, where: str
) -> None:
    turning = [str(chain) for chain in chains if "rope" in chain.needs]
    turning += [str(merge)] if merge is not None and "rope" in merge.wants else []
    if select.in_cache and turning:
        raise UsageError(
            f"{where}: {turning[0]} turns keys by their positions in the text, which "
            f"{select.name()} has turned back already.",
            f"Leave it out: under {select.name()} keys are stored before the rotary embedding.",
        )
    if select.by_place and (odd := [chain for chain in chains if chain.block > 1]):
        raise UsageError(
            f"{where}: {odd[0]} encodes {odd[0].block} tokens together, and {select.name()} "
            "chooses one by one which stay.",
            'Give codecs that see each token alone, such as affine with group = "head".',
        )
