"""A span of layers as one vector a token: its mean, what reads it, and its principal basis."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

ROUGH = 64  # steps in the largest component, of which bfloat16 rounds away less than a half


@dataclass(frozen=True, eq=False)
class Span:
    """One side, keys or values, of layers of equal shape, their heads side by side: W = L H D.

    Components are z = (x - mean) root basis, with root^2 what each head's errors cost and the basis
    the principal one of (x - mean) root: a Karhunen-Loeve transform across layers and heads (KVTC,
    arXiv:2511.01815) in which errors of all components cost alike, in nats.
    """

    layers: tuple[int, ...]
    mean: Tensor  # [W]
    root: Tensor  # [L H, D, D], symmetric
    basis: Tensor  # [W, R], orthonormal columns, the strongest first
    deviations: Tensor  # [R], of the components over the text that the codec was made of

    @property
    def width(self) -> int:
        """W, the values of a token."""
        return self.mean.shape[0]

    @property
    def rank(self) -> int:
        """R, the components that the codec keeps."""
        return self.basis.shape[1]

    def forward(self, x: Tensor, step: float = 0.0) -> Tensor:
        """Components z [T, R] of tokens x [T, W], as exactly as codes of a step can tell."""
        y, basis = self.weighed(x), self.basis.to(x.device).float()
        with self._fast(step):
            return y @ basis

    def weighed(self, x: Tensor) -> Tensor:
        """(x - mean) root, [T, W]: what the basis is of."""
        centred = x.float() - self.mean.to(x.device).float()
        return blockwise(centred, self.root.to(x.device).float())

    def back(self, z: Tensor, live: Tensor, step: float = 0.0) -> Tensor:
        """Tokens x [T, W] of the components z [T, R'] that `live` [R'] names; others are 0."""
        basis = self.basis.index_select(1, live).float()
        with self._fast(step):
            y = z @ basis.T
        inverse = torch.linalg.inv(self.root.double()).float()
        return blockwise(y, inverse) + self.mean.float()

    @contextmanager
    def _fast(self, step: float) -> Iterator[None]:
        """Lets products of 32 bits round their factors to 16, where a step hides it and the machine
        is then faster (3 times on AMX)."""
        own = torch.get_float32_matmul_precision()
        if float(self.deviations.max()) < ROUGH * step:
            torch.set_float32_matmul_precision("medium")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(own)


def blockwise(x: Tensor, blocks: Tensor) -> Tensor:
    """Multiplies each head's part of x [T, W] by its own block [L H, D, D]."""
    heads = x.unflatten(1, blocks.shape[:2]).transpose(0, 1)
    return torch.bmm(heads, blocks).transpose(0, 1).flatten(1)


def roots(weights: Tensor, least: float = 1e-4) -> Tensor:
    """The symmetric roots [L H, D, D] of what errors cost; directions that are read less than
    `least` of a head's strongest are taken to be read so much, since other text may read them."""
    values, vectors = torch.linalg.eigh(weights.double())
    # a head that nothing read at all still has to come back
    floor = values.amax().clamp_min(1e-12) * 1e-6
    values = values.clamp_min((values.amax(-1, keepdim=True) * least).clamp_min(floor))
    found: Tensor = (vectors * values.sqrt()[..., None, :]) @ vectors.mT
    return found


def fitted(layers: tuple[int, ...], x: Tensor, weights: Tensor, finest: float, most: int) -> Span:
    """Makes a span of tokens x [T, W] and what errors of each head cost [L H, D, D].

    Args:
        finest: components that deviate less are left out.
        most: the most components.
    """
    root = roots(weights).float()
    mean = x.double().mean(0).float()
    bare = Span(layers, mean, root, torch.empty(len(mean), 0), torch.empty(0))
    second = torch.zeros(len(mean), len(mean))
    for part in x.split(4096):
        y = bare.weighed(part)
        second.addmm_(y.T, y)
    values, vectors = torch.linalg.eigh(second / max(1, len(x)))
    deviations = values.clamp_min(0).sqrt().flip(0)
    rank = max(1, min(most, int((deviations > finest).sum())))
    basis = vectors[:, -rank:].flip(1).half().contiguous()
    return Span(layers, mean, root, basis, deviations[:rank].contiguous())
