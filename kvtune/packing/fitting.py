"""Fits a codec of caches to a model, on text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kvtune import prices
from kvtune.bank import Bank, Sizes, build, text_tokens
from kvtune.errors import UnsupportedError
from kvtune.models import fingerprint, ropes
from kvtune.packing.codec import Codec
from kvtune.packing.layout import WIDEST, columns, spans
from kvtune.packing.span import Span, fitted
from kvtune.packing.weighing import weigh
from kvtune.rope import Rope
from kvtune.texts import Document, digest

SINKS = 4  # first tokens, unlike all others: no basis is fitted to them
FINEST = 2e-5  # root of nats a token: components that deviate less are left out of a basis
MOST = 8192  # components of a basis
SIZES = Sizes(16, 2048, 64)
Say = Callable[[str, int, int], None]  # stage, done, total


def fit(
    model: Any,
    tokenizer: Any,
    documents: list[Document],
    *,
    sizes: Sizes = SIZES,
    widest: int = WIDEST,
    seed: int = 0,
    say: Say = lambda stage, done, total: None,
) -> Codec:
    """Runs contexts and continuations, weighs errors and finds the bases: once for a model.

    Args:
        sizes: of the text; a basis wants several tokens for each value of one.
        widest: values of a token that may share a basis; layers are parted to keep to it.

    Raises:
        MissingInputError: too little text.
        UnsupportedError: a model without full-attention layers.
        UsageError: contexts beyond the model's positions.
    """
    tokens = text_tokens(documents, tokenizer, sizes, "calibrate")
    turns = find_ropes(model)
    say("dense pass", 0, 1)
    bank = build(model, tokens, sizes.context)
    say("dense pass", 1, 1)
    parts = spans(bank.facts, widest)
    if not parts:
        raise UnsupportedError("The model has no full-attention layers, so nothing to pack.")
    sinks = min(SINKS, sizes.context // 2)
    weights = _weights(model, bank, turns, sinks, seed)
    found = []
    for number, layers in enumerate(parts):
        say("bases", number, len(parts))
        found.append(_pair(bank, layers, turns, weights, sinks))
    say("bases", len(parts), len(parts))
    meta = {
        "fingerprint": fingerprint(model),
        "text": digest(documents),
        "sizes": list(sizes),
        "seed": seed,
        "pre_rope": bool(turns),
    }
    return Codec(tuple(found), meta)


def find_ropes(model: Any) -> dict[int, Rope]:
    """The model's rotary embeddings, or none where keys cannot be turned back."""
    try:
        return ropes(model)
    except UnsupportedError:
        return {}


def _weights(
    model: Any, bank: Bank, turns: dict[int, Rope], sinks: int, seed: int
) -> dict[int, tuple[Tensor, Tensor]]:
    """What errors cost in each layer, of keys and values [H, D, D]."""
    pulls = prices.pulls(model, bank, seed)
    return {
        i: weigh(pulls.pop(i), bank.keys[i], bank.values[i], turns.get(i), sinks, seed)
        for i in bank.facts.compressible()
    }


@torch.no_grad()
def _pair(
    bank: Bank,
    layers: tuple[int, ...],
    turns: dict[int, Rope],
    weights: dict[int, tuple[Tensor, Tensor]],
    sinks: int,
) -> tuple[Span, Span]:
    made = []
    for side, held, ropes_of in ((0, bank.keys, turns), (1, bank.values, {})):
        rows = [
            columns({i: held[i][row : row + 1] for i in layers}, layers, ropes_of)[sinks:]
            for row in range(bank.tokens.shape[0])
        ]
        costs = torch.cat([weights[i][side] for i in layers])
        made.append(fitted(layers, torch.cat(rows), costs, FINEST, MOST))
    return made[0], made[1]
