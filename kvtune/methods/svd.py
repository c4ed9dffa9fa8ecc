"""Keeps the strongest directions of heads by a truncated SVD, each prompt's own or calibrated."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Annotated, Literal

import torch
from torch import Tensor

from kvtune.marks import OneOf, Share
from kvtune.metrics import Metric, evened, reading, rooted
from kvtune.parts import Code, Fold, Projection, Seen, Site, Up
from kvtune.seen import blocks
from kvtune.spectral import gram, top


class Svd(Projection):
    """Stores `rank` of the channels of some kv heads together: those that a truncated SVD keeps.

    The basis is that of each prompt (ShadowKV, arXiv:2410.21465; xKV of one layer,
    arXiv:2503.18893), found from the Gram matrix of its first tokens and kept beside its pages, or
    a calibrated one (Eigen Attention, arXiv:2408.05646; Palu, arXiv:2407.21118), of which any rank
    is a slice. Later tokens are projected on the same basis. Keys are low-rank before RoPE: put
    `derope` first.

    Errors are least in a metric: `plain`; `whitened` by the spread of each channel, so that no
    outlier claims the basis; `queries`, by how strongly the queries read each channel at any
    distance (RoPE-averaged energy; of values the likelihood's pull); `kq` by how they read each
    direction of a head, which makes logits' errors least (KQ-SVD, arXiv:2512.05916). The whitened
    SVD of projection weights (SVD-LLM, arXiv:2403.07378) keeps what `plain` keeps with
    `centre = "none"`.
    """

    rank: Annotated[float, Share((0.125, 0.1875, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0))] = 0.25
    heads: Annotated[int | Literal["all"], OneOf((1, 2, 4, "all"))] = "all"
    basis: Literal["prompt", "calibrated"] = "prompt"
    metric: Literal["plain", "whitened", "queries", "kq"] = "plain"
    centre: Literal["mean", "none"] = "none"

    fits = True

    @property
    def payload_bits(self) -> float:
        """Of a cached value: as many as channels are kept."""
        return 16 * self.rank

    @property
    def apart(self) -> bool:
        """One head at a time."""
        return self.heads == 1

    @property
    def learns(self) -> bool:
        """A prompt's own basis."""
        return self.basis == "prompt"

    def size(self, heads: int) -> int:
        """How many of a layer's kv heads share a basis; ValueError when these do not part so."""
        size = heads if isinstance(self.heads, str) else self.heads
        if heads % size:
            raise ValueError(f"svd takes {size} heads together, which do not part {heads} kv heads")
        return size

    def shape(self, heads: int, head_dim: int) -> tuple[int, int]:
        """Groups of heads, and the rank of each."""
        size = self.size(heads)
        return heads // size, max(1, round(self.rank * size * head_dim))

    def least(self, heads: int, head_dim: int) -> int:
        """From how many tokens on a prompt's own basis saves bytes: T (w - r) > r w, and w more
        for a mean and for channels' scales."""
        if self.basis == "calibrated":
            return 0
        width, rank = self.size(heads) * head_dim, self.shape(heads, head_dim)[1]
        rows = rank + (self.centre == "mean") + (self.metric == "whitened")
        return rank if rank == width else rows * width // (width - rank) + 1

    def blanks(self, heads: int, head_dim: int) -> dict[str, Tensor]:
        """In 16 bits: the metric where calibration finds it, and the basis where it does."""
        half = torch.empty(heads, head_dim, head_dim, dtype=torch.float16, device="meta")
        found: dict[str, Tensor] = {}
        if self.metric == "kq":
            found |= {"root": half, "back": half.clone()}
        if self.metric == "queries" or (self.metric, self.basis) == ("whitened", "calibrated"):
            found["scale"] = half[:, 0].clone()
        if self.basis == "calibrated":
            size, (groups, rank) = self.size(heads), self.shape(heads, head_dim)
            found["basis"] = half.new_empty(groups, size, head_dim, rank)
            if self.centre == "mean":
                found["mean"] = half[:, 0].clone()
        return found

    def fit(self, seen: Seen) -> dict[str, Tensor]:
        """Finds the metric, and the basis of a calibrated one."""
        found = self._metric_of(seen)
        if self.basis == "calibrated":
            found["basis"] = self._basis_of(seen, found)
            if self.centre == "mean":
                found["mean"] = seen.mean.half()
        return found

    def learn(self, x: Tensor, site: Site) -> dict[str, Tensor]:
        """The basis [B, G, g, D, r] of x [B, H, T, D] of each row; its mean and channels' scales
        [B, H, 1, D]."""
        if not self.learns:
            return {}
        found = {}
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        if self.centre == "mean":
            found["mean"] = wide.mean(2, keepdim=True).to(x.dtype)
            wide = wide - found["mean"].to(wide)
        if self.metric == "whitened":
            found["scale"] = evened(wide.square().mean(2, keepdim=True)).to(x.dtype)
        inside = self._with(site, found)
        joined = _joined(self._metric(inside).into(wide), self.size(x.shape[1]))
        rank = self.shape(*x.shape[1::2])[1]
        basis = top(gram(joined), rank).to(x.dtype)
        found["basis"] = basis.unflatten(2, (-1, x.shape[-1])).contiguous()
        return found

    def behind(self, seen: Seen, site: Site) -> Seen:
        """Of a calibrated basis; a prompt's own has about its spectrum."""
        heads, dim = seen.mean.shape
        size = self.size(heads)
        alike = self.model_copy(update={"basis": "calibrated"})
        named = {
            name: site.tensors.get(f"{self.name()}.{name}") for name in alike.blanks(heads, dim)
        }
        own = {name: x for name, x in named.items() if x is not None}
        if len(own) < len(named):
            own = alike.fit(seen)
        metric, basis = self._metric(self._with(site, own)), own["basis"].flatten(1, 2).double()
        into, back = (_whole(turn, heads, dim, size) for turn in (metric.into, metric.out_of))
        shift = own["mean"].double() if "mean" in own else torch.zeros_like(seen.mean)
        fold = Fold(shift.reshape(heads // size, -1), into @ basis, basis.transpose(-1, -2) @ back)
        return seen.grouped(size).behind(fold)

    def encode(self, x: Tensor, site: Site) -> Code:
        """The latents [B, G, T, r], in the dtype of x but at least in 32 bits."""
        basis = self._basis(site)
        wide = x.double()
        if (mean := self._tensor(site, "mean")) is not None:
            wide = wide - mean.double()
        joined = _joined(self._metric(site).into(wide), basis.shape[-3])
        # in 64 bits: how many tokens are projected at once moves no code
        latents = joined @ basis.flatten(2, 3).double()
        return Code(latents.to(torch.promote_types(x.dtype, torch.float32)))

    def decode(self, code: Code, site: Site) -> Tensor:
        """Returns x [B, H, T, D] of rank r."""
        basis = self._basis(site)
        wide = code.body.to(torch.promote_types(site.dtype, torch.float32))
        joined = wide @ basis.flatten(2, 3).transpose(-1, -2).to(wide)
        x = self._metric(site).out_of(_parted(joined, basis.shape[-2]))
        mean = self._tensor(site, "mean")
        return (x if mean is None else x + mean.to(x)).to(site.dtype)

    def up(self, site: Site) -> Up:
        """[B or 1, H, r, D] and the mean [B or 1, H, D]."""
        raised = self._basis(site).flatten(1, 2).transpose(-1, -2)
        mean = self._tensor(site, "mean")
        back = self._metric(site).out_of(raised.float()).to(site.dtype)
        return Up(back, None if mean is None else mean[:, :, 0].to(site.dtype))

    def _with(self, site: Site, found: Mapping[str, Tensor]) -> Site:
        named = {f"{self.name()}.{name}": x for name, x in found.items()}
        return replace(site, tensors={**site.tensors, **named})

    def _tensor(self, site: Site, name: str) -> Tensor | None:
        """A tensor of each channel, fitted or learned, as [*, H, 1, D]."""
        found = site.tensors.get(f"{self.name()}.{name}")
        return found[None, :, None] if found is not None and found.ndim == 2 else found

    def _basis(self, site: Site) -> Tensor:
        """[B or 1, G, g, D, r]."""
        found = site.tensors[f"{self.name()}.basis"]
        return found[None] if found.ndim == 4 else found

    def _metric(self, site: Site) -> Metric:
        stem = f"{self.name()}."
        held = (site.tensors.get(f"{stem}{name}") for name in ("root", "back"))
        return Metric(self._tensor(site, "scale"), *held)

    def _metric_of(self, seen: Seen) -> dict[str, Tensor]:
        if self.metric == "kq":
            return rooted(seen.weight)
        if self.metric == "queries":
            return {"scale": reading(torch.diagonal(seen.weight, dim1=1, dim2=2)).half()}
        if (self.metric, self.basis) == ("whitened", "calibrated"):
            spread = torch.diagonal(self._second(seen), dim1=1, dim2=2)
            return {"scale": evened(spread[None])[0].half()}
        return {}

    def _basis_of(self, seen: Seen, found: dict[str, Tensor]) -> Tensor:
        heads, dim = seen.mean.shape
        size = self.size(heads)
        second = self._second(seen.grouped(size))
        nowhere = Site(0, "keys", torch.arange(0), torch.float64)
        turn = _whole(self._metric(self._with(nowhere, found)).into, heads, dim, size)
        basis = top(turn.transpose(-1, -2) @ second @ turn, self.shape(heads, dim)[1])
        by_head: Tensor = basis.unflatten(1, (size, dim))
        return by_head.half().contiguous()

    def _second(self, seen: Seen) -> Tensor:
        """What is least in error: the spread about the mean, or all where it is not removed."""
        if self.centre == "mean":
            return seen.covariance
        return seen.covariance + seen.mean[:, :, None] * seen.mean[:, None]


def _joined(x: Tensor, size: int) -> Tensor:
    """[B, H, T, D] as [B, H / size, T, size * D]."""
    joined: Tensor = x.unflatten(1, (-1, size)).transpose(2, 3).flatten(3)
    return joined


def _parted(x: Tensor, head_dim: int) -> Tensor:
    """Inverse of `_joined`."""
    parted: Tensor = x.unflatten(3, (-1, head_dim)).transpose(2, 3).flatten(1, 2)
    return parted


def _whole(turn: Callable[[Tensor], Tensor], heads: int, head_dim: int, size: int) -> Tensor:
    """What `turn` does to each head, as matrices [H / size, size * D, size * D] of groups."""
    eye = torch.eye(head_dim, dtype=torch.float64).expand(1, heads, -1, -1)
    return blocks(turn(eye)[0], size)
