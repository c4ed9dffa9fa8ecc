"""Saving: whether a basis that is found in each prompt pays for itself at a context length."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from kvtune.cache import layer_bytes
from kvtune.chains import Chain
from kvtune.errors import UsageError
from kvtune.models import Facts
from kvtune.policy import Policy
from kvtune.retention import Selector
from kvtune.space import SIDES, Choices, Opened, Side

Shape = tuple[int, int]  # kv heads and head_dim


def check_saves(policies: Sequence[Policy], known: Facts, context: int) -> None:
    """Refuses policies whose basis of each prompt takes more bytes than it saves at a context.

    Ranks of as many directions as there are tokens, or more, are among those.

    Raises:
        UsageError: the rank, the width and how many tokens it takes.
    """
    for layer, policy in enumerate(policies):
        shape = known.layers[layer].kv_heads, known.layers[layer].head_dim
        if policy.share and policy.due(context) < policy.least:
            enough = policy.first + policy.sinks + policy.recent
            raise UsageError(
                f"layer {layer}: {policy.share} takes {enough:,} tokens to save bytes; the context "
                f"has {context:,}.",
                "Take a longer context, or a lower rank.",
            )
        for index, side in enumerate(SIDES):
            for chain in dict.fromkeys(pair[index] for pair in policy.tiers):
                if why := unsaving(policy, side, chain, shape, context):
                    raise UsageError(
                        f"layer {layer}, {side}: {why}.",
                        'Take a longer context, a lower rank, or basis = "calibrated".',
                    )


def unsaving(policy: Policy, side: Side, chain: Chain, shape: Shape, context: int) -> str:
    """Why one chain of a layer saves nothing at a context, in words; empty where it does, and for
    chains that learn nothing of a prompt."""
    learning = [(codec, at) for codec, at in chain.shapes(*shape) if codec.learns]
    if not learning or policy.share:
        return ""
    codec, (heads, head_dim) = max(learning, key=lambda one: one[0].least(*one[1]))
    groups, rank = codec.shape(heads, head_dim)
    told = f"{codec.name()} finds {rank:,} of {heads * head_dim // groups:,} directions in a prompt"
    if policy.due(context) < policy.least:
        enough = policy.first + policy.sinks + policy.recent
        return f"{told}, which takes {enough:,} tokens to save bytes; the context has {context:,}"
    alone: dict[str, object] = {name: chain if name == side else Chain() for name in SIDES}
    bare = policy.model_copy(update={**alone, "heads": (), "select": None, "rest": None})
    stored = layer_bytes(bare, *shape, context)
    taken, dense = stored[SIDES.index(side)], 2 * heads * head_dim * context
    if taken < dense:
        return ""
    return f"{told}, which takes {taken:,} bytes at {context:,} tokens, and 16 bits take {dense:,}"


def saving(
    windows: dict[str, Choices], known: Facts, context: int
) -> tuple[dict[str, Choices], list[str]]:
    """The choices that save bytes at a context, and why others are left out, each once.

    Raises:
        UsageError: a side of a layer has none left.
    """
    reasons: dict[str, None] = {}
    found = {}
    for name, choices in windows.items():
        found[name] = {layer: _kept(own, layer, context, reasons) for layer, own in choices.items()}
    return found, list(reasons)


def _kept(own: Opened, layer: int, context: int, reasons: dict[str, None]) -> Opened:
    # windows of both sides wait for the longest block of either
    block = math.lcm(*(chain.block for side in SIDES for chain in own.chains(side)))
    held = max(0, context - own.sinks - own.recent) // block * block + own.sinks + own.recent
    kept: dict[str, Any] = {}
    for side in SIDES:
        told = {
            chain: unsaving(own.cell(side, chain), side, chain, own.shape, held)
            for chain in own.chains(side)
        }
        kept[side] = tuple(chain for chain, why in told.items() if not why)
        reasons |= dict.fromkeys(why for why in told.values() if why)
        if not kept[side]:
            raise UsageError(
                f"No setting of layer {layer}'s {side} saves bytes: {next(iter(told.values()))}.",
                'Take a longer context, or open basis = "calibrated" as well.',
            )
    return replace(own, **kept, selects=_dropping(own, context, reasons))


def _dropping(own: Opened, context: int, reasons: dict[str, None]) -> tuple[Selector, ...]:
    """The selections that drop any tokens at a context, whatever is done with the others."""
    found = []
    for select in own.selects:
        policy = own.policy(Chain(), Chain(), select)
        if policy.due(context):
            found.append(select)
        else:
            least = policy.sinks + policy.recent + policy.block
            told = f"a share of {select.share:g} drops no token before {least:,} are there"
            reasons |= {f"{told}; the context has {context:,}": None}
    if own.selects and not found:
        told = next(reversed(reasons))
        raise UsageError(f"No share of tokens is worth a search: {told}.", "Take a longer context.")
    return tuple(found)
