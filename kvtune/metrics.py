"""Metrics: how much errors of a projection weigh, by channel or by direction of a head."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kvtune.spectral import root

LEAST = 1e-3  # of the largest: a channel that is read or spread less is taken to be so much


class Metric(NamedTuple):
    """A scale of each channel, or a symmetric root of each head; neither where all weigh alike."""

    scale: Tensor | None = None  # [*, H, 1, D]
    root: Tensor | None = None  # [H, D, D]
    back: Tensor | None = None  # its inverse

    def into(self, x: Tensor) -> Tensor:
        """x [B, H, T, D] so turned that errors weigh alike in all directions."""
        if self.root is not None:
            return x @ self.root.to(x)
        return x if self.scale is None else x * self.scale.to(x)

    def out_of(self, x: Tensor) -> Tensor:
        """Inverse of `into`."""
        if self.back is not None:
            return x @ self.back.to(x)
        return x if self.scale is None else x / self.scale.to(x)


def evened(power: Tensor) -> Tensor:
    """Scales [B, *] that give all channels one spread, from their mean squares [B, *]."""
    spread = power.clamp_min(0).sqrt()
    largest = spread.flatten(1).amax(1).clamp_min(1e-30)
    largest = largest.reshape(-1, *[1] * (power.ndim - 1))
    return largest / spread.clamp_min(largest * LEAST)


def reading(energy: Tensor) -> Tensor:
    """Scales [H, D] of channels by the energy of what reads them."""
    read = energy.clamp_min(0).sqrt()
    largest = read.amax().clamp_min(1e-30)
    return (read / largest).clamp_min(LEAST)


def rooted(weight: Tensor) -> dict[str, Tensor]:
    """The root of a weight [H, D, D] and its inverse, in 16 bits; heads keep their proportions."""
    found = root(weight)
    half = (found / found.abs().amax().clamp_min(1e-30)).half()
    return {"root": half, "back": torch.linalg.inv(half.double()).half()}
