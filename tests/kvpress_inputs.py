"""The tensors that kvpress and our scorers are asked about: the same on any machine."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

BATCH, QUERY_HEADS, HEADS, DIM, HIDDEN = 2, 6, 2, 16, 32
TOKENS = 280  # 4 sinks, 4 partitions of 64, and 20 more
SINKS = 4
SHARES = (0.1, 0.25, 0.5)  # that are kept
THETA = 1e4


class Inputs(NamedTuple):
    """Hidden states and the weights of an attention layer, in float32."""

    hidden: Tensor  # [B, T, E]
    query: Tensor  # [Hq * D, E]
    key: Tensor  # [H * D, E]
    value: Tensor
    output: Tensor  # [E, Hq * D]


def inputs(seed: int = 0) -> Inputs:
    """Sums of whole numbers, which any generator of this seed draws alike, to the last bit."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randint(-32, 33, (4, *shape), generator=generator).sum(0) / 64

    hidden = draw(BATCH, TOKENS, HIDDEN)
    # what all tokens have in common, so that keys have a mean and queries a direction
    hidden += draw(1, 1, HIDDEN)
    return Inputs(
        hidden,
        draw(QUERY_HEADS * DIM, HIDDEN) / 2,
        draw(HEADS * DIM, HIDDEN) / 2,
        draw(HEADS * DIM, HIDDEN),
        draw(HIDDEN, QUERY_HEADS * DIM),
    )


def heads(x: Tensor, weight: Tensor) -> Tensor:
    """Hidden states [B, T, E] as heads [B, H, T, D]."""
    return (x @ weight.T).unflatten(-1, (-1, DIM)).transpose(1, 2)
