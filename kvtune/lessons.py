"""Lessons: what training sees of a layer: its cache, queries behind it, and how outputs weigh."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvtune.bank import build
from kvtune.prices import Pull, pulls


@dataclass(frozen=True, eq=False)
class Lesson:
    """N sequences of T tokens in one layer of the dense model, and the queries of their last M.

    An error e of a query's outputs, heads joined, costs about |e root|^2 / 2 nats (the likelihood's
    pull, as prices are made of: see `prices.pulls`).
    """

    keys: Tensor  # [N, H, T, D], as they are cached
    values: Tensor  # [N, H, T, D]
    query: Tensor  # [N, Hq, M, D]
    out: Tensor  # [N, Hq, M, D], exact
    root: Tensor  # [Hq * D, Hq * D]
    scale: float | None = None
    softcap: float | None = None

    @property
    def positions(self) -> Tensor:
        """Where the queries stand [M]."""
        length, count = self.keys.shape[2], self.query.shape[2]
        return torch.arange(length - count, length, device=self.keys.device)


def lessons(
    model: Any, tokens: Tensor, context: int, seed: int, layers: Collection[int]
) -> dict[int, Lesson]:
    """Runs the dense model over tokens [N, C + M + 1], forward, and backward on the last M.

    Raises:
        UsageError: more tokens than the model has positions.
    """
    bank = build(model, tokens, context)
    found = pulls(model, bank, seed)
    return {i: _lesson(bank.keys.pop(i), bank.values.pop(i), found.pop(i)) for i in sorted(layers)}


def _lesson(keys: Tensor, values: Tensor, pull: Pull) -> Lesson:
    joined = pull.gradient.transpose(1, 2).flatten(2).flatten(0, 1).double()  # [N * M, Hq * D]
    strengths, directions = torch.linalg.eigh(joined.T @ joined / len(joined))
    root = directions * strengths.clamp_min(0).sqrt()
    return Lesson(
        torch.cat([keys, pull.keys], 2),
        torch.cat([values, pull.values], 2),
        pull.query,
        pull.out,
        root.to(keys.dtype),
        pull.scale,
        pull.softcap,
    )
