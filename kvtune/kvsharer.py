"""KVSharer's search for layers that may read another's cache (arXiv:2410.18517)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity
from transformers import DynamicCache

from kvtune.attention import NAME
from kvtune.cache import CompressedCache
from kvtune.errors import UsageError
from kvtune.methods.owner import Owner
from kvtune.models import facts
from kvtune.policy import Policy

Map = dict[int, int]  # borrower -> owner


@dataclass(frozen=True)
class Pair:
    """Two layers, and how far their averaged caches are apart."""

    owner: int
    borrower: int
    distance: float


@dataclass(frozen=True)
class Step:
    """A map of owners as the search found it: one more borrower than the step before."""

    pair: Pair
    cosine: float  # of the last hidden states with the dense model's, this pair shared too
    owners: Map


def averages(model: Any, tokens: Tensor) -> dict[int, Tensor]:
    """Keys and values [2, H, T, D] of each full-attention layer, averaged over tokens [N, T]."""
    found: dict[int, Tensor] = {}
    for row in tokens.split(1):
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model(row, past_key_values=cache, logits_to_keep=1)
        for index in facts(model.config).compressible():
            layer: Any = cache.layers[index]
            both = torch.cat([layer.keys, layer.values]).float() / len(tokens)
            found[index] = found[index] + both if index in found else both
    return found


def ranked(averaged: dict[int, Tensor]) -> list[Pair]:
    """All pairs of layers of equal shape, the LARGEST Euclidean distance first.

    That unlike caches replace one another better than like ones is the paper's finding, and what
    its greedy search relies on; `kvtune bench sharing` shows how it does beside measured pairs.
    """
    found = [
        Pair(owner, borrower, float((averaged[owner] - averaged[borrower]).norm()))
        for borrower in averaged
        for owner in averaged
        if owner < borrower and averaged[owner].shape == averaged[borrower].shape
    ]
    return sorted(found, key=lambda pair: -pair.distance)


def policies_of(owners: Map, layers: int) -> tuple[Policy, ...]:
    """The policies of a model that is dense but for its borrowers."""
    return tuple(
        Policy(share=Owner(layer=owners[index])) if index in owners else Policy()
        for index in range(layers)
    )


def allowed(owners: Map, pair: Pair) -> bool:
    """Whether a map can take one more pair: no layer borrows twice, or lends what it borrows."""
    borrows = pair.borrower in owners or pair.owner in owners
    return not borrows and pair.borrower not in owners.values()


def search(
    model: Any,
    tokens: Tensor,
    shares: int,
    threshold: float = 0.5,
    say: Callable[[int, int], None] = lambda done, total: None,
) -> list[Step]:
    """Shares layers one by one, the pair with the largest distance first, where the last hidden
    states of tokens [N, T] stay near the dense model's: their mean cosine is above the threshold.

    Raises:
        UsageError: no pair of layers is left before so many share.
    """
    dense = last_hidden(model, tokens, {})
    steps: list[Step] = []
    owners: Map = {}
    for pair in ranked(averages(model, tokens)):
        if len(steps) == shares:
            break
        if not allowed(owners, pair):
            continue
        tried = {**owners, pair.borrower: pair.owner}
        cosine = float(cosine_similarity(last_hidden(model, tokens, tried), dense, dim=-1).mean())
        if cosine > threshold:
            owners = tried
            steps.append(Step(pair, cosine, owners))
            say(len(steps), shares)
    if len(steps) < shares:
        raise UsageError(
            f"Only {len(steps)} of {shares} layers can share with a cosine above {threshold:g}.",
            "Give a lower --threshold, or fewer --shares.",
        )
    return steps


@torch.no_grad()
def last_hidden(model: Any, tokens: Tensor, owners: Map) -> Tensor:
    """The last hidden states [N, T, C] of tokens [N, T], some layers reading another's cache."""
    model.set_attn_implementation(NAME)
    count = len(facts(model.config).layers)
    cache = CompressedCache(policies_of(owners, count), model.config, {}, {})
    out = model(tokens, past_key_values=cache, output_hidden_states=True, logits_to_keep=1)
    found: Tensor = out.hidden_states[-1].float()
    return found


def neighbours(layers: Sequence[int], reach: int) -> list[Map]:
    """Maps of a single borrower, whose owner is one of the `reach` layers before it."""
    return [
        {borrower: owner}
        for place, borrower in enumerate(layers)
        for owner in layers[max(0, place - reach) : place]
    ]
