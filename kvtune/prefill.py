"""Prefill: a prompt is read into a cache as its recipe asks, be it more than one plain forward."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from kvtune.cache import CompressedCache
from kvtune.drafting import drafted, glanced, same_tokenizer
from kvtune.errors import UnsupportedError, UsageError
from kvtune.layer import CompressedLayer
from kvtune.models import facts
from kvtune.placement import input_device
from kvtune.replay import ask, replayed

AHEAD = 32  # tokens that a draft says


class Draft(NamedTuple):
    """A small model of the same family, and its tokenizer."""

    model: Any
    tokenizer: Any


def asks(cache: Cache) -> frozenset[str]:
    """What a cache's recipe wants of a prompt beyond a plain forward, of {"replay", "ahead",
    "shortened"}."""
    if not isinstance(cache, CompressedCache):
        return frozenset()
    needs = frozenset[str]().union(*(policy.needs for policy in cache.policies))
    shortened = {"shortened"} if cache.shortener else set()
    return (needs & {"replay", "ahead"}) | shortened


def prefill(
    model: Any,
    cache: Cache,
    tokens: Tensor,
    *,
    tokenizer: Any,
    draft: Draft | None = None,
    kinds: Tensor | None = None,
    ahead: int = AHEAD,
) -> Tensor:
    """Reads all but the last token of a prompt [B, T], unpadded, into an empty cache; returns the
    tokens to continue with: `model.generate(found, past_key_values=cache)`.

    A context is replayed (KVzip), looked at by what a draft says of it (SpecKV), or cut to what a
    draft looks at (SpecPC), as the recipe says; then the tokens to continue with are fewer. A cache
    that wants nothing of this is left to `generate`, and the tokens come back as they are.

    Args:
        draft: for recipes that look ahead or cut a prompt.
        kinds: bool [B, T], true of tokens that go before all others where a selector asks.
        ahead: tokens that the draft says.

    Raises:
        UsageError: no draft where one is needed, or one with another tokenizer; a prompt too short,
        or one that leaves no positions for what is read behind it.
        UnsupportedError: layers that read another's cache; a replay and a draft in one recipe.
    """
    wanted = asks(cache)
    if not isinstance(cache, CompressedCache) or (not wanted and kinds is None):
        return tokens
    if tokens.shape[1] < 2:
        raise UsageError("A prompt of one token leaves nothing to select from.", "Give more.")
    said = _said(wanted, tokens, tokenizer, draft, ahead)
    kept, kinds = shortened(cache, tokens, said, kinds, draft)
    if wanted == {"shortened"} and kinds is None:
        return kept
    behind = torch.cat([kept[:, -1:], said], 1) if said is not None and "ahead" in wanted else None
    context = None if kinds is None else kinds[:, :-1]
    fill(model, cache, kept[:, :-1], tokenizer=tokenizer, behind=behind, kinds=context)
    return kept


def read(
    model: Any,
    cache: CompressedCache,
    tokens: Tensor,
    *,
    tokenizer: Any,
    draft: Draft | None = None,
    ahead: int = AHEAD,
) -> Tensor:
    """As `prefill`, of a context that something else follows: all of its tokens [B, T] are read;
    returns those that were."""
    wanted = asks(cache)
    said = _said(wanted, tokens, tokenizer, draft, ahead)
    kept, _ = shortened(cache, tokens, said, None, draft)
    behind = said if "ahead" in wanted else None
    fill(model, cache, kept, tokenizer=tokenizer, behind=behind)
    return kept


def shortened(
    cache: CompressedCache,
    tokens: Tensor,
    said: Tensor | None,
    kinds: Tensor | None,
    draft: Draft | None,
) -> tuple[Tensor, Tensor | None]:
    """The tokens [B, n] of a prompt that are read at all, and their kinds."""
    part = cache.shortener
    if part is None or tokens.shape[1] <= part.budget:
        return tokens, kinds
    assert draft is not None, "a draft was asked for"
    rows = []
    for row in range(len(tokens)):
        own = slice(row, row + 1)
        more = tokens[own, :0] if said is None else said[own]
        rows.append(part.keep(glanced(draft.model, tokens[own], more, part.window, part.skip)))
    places = torch.stack(rows).to(tokens.device)
    return tokens.gather(1, places), None if kinds is None else kinds.gather(1, places)


@torch.no_grad()
def fill(
    model: Any,
    cache: CompressedCache,
    tokens: Tensor,
    *,
    tokenizer: Any,
    behind: Tensor | None = None,
    kinds: Tensor | None = None,
) -> None:
    """Puts a context [B, T] into an empty cache: one forward, with the tokens `behind` [B, n] it
    that are only looked at, and a replay where a selector needs one.

    Layers that select nothing take the context densely first, since the model reads on behind it,
    and store it when all is read.
    """
    replays = "replay" in asks(cache)
    _check(model, cache, tokens, behind, replays)
    own, shared = list(cache.layers), cache.shared
    shared.kinds, shared.waits = kinds, replays
    shared.ahead = 0 if behind is None else behind.shape[1]
    if replays or behind is not None:
        cache.layers = [layer if _selects(layer) else DynamicLayer() for layer in own]
    device = input_device(model)
    whole = tokens if behind is None else torch.cat([tokens, behind.to(tokens)], 1)
    try:
        model(whole.to(device), past_key_values=cache, logits_to_keep=1)
        if replays:
            _replay(model, cache, tokens.to(device), tokenizer)
        stand_ins, cache.layers = cache.layers, own
        for layer, stand_in in zip(own, stand_ins, strict=True):
            if layer is not stand_in:
                _store(layer, stand_in, tokens.shape[1])
    finally:
        cache.layers = own
        shared.kinds, shared.waits, shared.ahead = None, False, 0


def _said(
    wanted: frozenset[str], tokens: Tensor, tokenizer: Any, draft: Draft | None, ahead: int
) -> Tensor | None:
    """What the draft says behind a prompt, where a recipe asks for it."""
    if not wanted & {"ahead", "shortened"}:
        return None
    if draft is None:
        what = "looks ahead with" if "ahead" in wanted else "cuts a prompt by what it sees of"
        raise UsageError(f"The recipe {what} a draft model, and none is given.", "Give --draft.")
    same_tokenizer(draft.tokenizer, tokenizer)
    return drafted(draft.model, tokens, ahead if "ahead" in wanted else 1)


def _check(
    model: Any, cache: CompressedCache, tokens: Tensor, behind: Tensor | None, replays: bool
) -> None:
    if cache.get_seq_length():
        raise UsageError("The cache holds a prompt already.", "Give a fresh one: cache.fresh().")
    if any(policy.borrower for policy in cache.policies):
        raise UnsupportedError(
            "Layers that read another's cache do not go with a prompt that is replayed, or looked "
            "at by a draft.",
            "Leave share out of this recipe.",
        )
    if replays and behind is not None:
        raise UnsupportedError(
            "A recipe whose selectors need a replay looks at no draft as well.",
            "Use one of both selectors in all layers.",
        )
    most = facts(model.config).max_positions
    if behind is not None and tokens.shape[1] + behind.shape[1] > most:
        what = f"{tokens.shape[1]:,} tokens of prompt and {behind.shape[1]:,} behind it exceed the "
        raise UsageError(f"{what}model's {most:,} positions.", "Give a shorter prompt.")


def _selects(layer: Any) -> bool:
    return isinstance(layer, CompressedLayer) and layer.policy.select is not None


def _replay(model: Any, cache: CompressedCache, tokens: Tensor, tokenizer: Any) -> None:
    """Reads the context again behind itself, and lets the layers that wait decide by it."""
    dense: list[Any] = []
    for layer in cache.layers:
        twin = copy.copy(layer)
        if _selects(layer):
            twin = DynamicLayer()
            twin.update(*layer.prompt())
        dense.append(twin)
    held = {
        index: (dense[index].keys, dense[index].values)
        for index, policy in enumerate(cache.policies)
        if "replay" in policy.needs
    }
    scores = replayed(model, tokens, dense, held, ask(tokenizer))
    for index, layer in enumerate(cache.layers):
        if _selects(layer):
            layer.settle_prompt(scores.get(index))


def _store(layer: Any, stand_in: DynamicLayer, length: int) -> None:
    """Gives a layer the first tokens that stood in its place."""
    keys, values = stand_in.keys[:, :, :length], stand_in.values[:, :, :length]
    if isinstance(layer, CompressedLayer):
        layer.fill(keys, values)
    else:
        layer.update(keys.clone(), values.clone())
