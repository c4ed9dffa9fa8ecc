"""Factors the keys, or the values, of a group of layers together (xKV, arXiv:2503.18893)."""

from typing import Annotated

import torch
from torch import Tensor

from kvtune.marks import Share
from kvtune.parts import Code, Sharer, Site, Up
from kvtune.spectral import gram, span

PACKED = 8  # channels of any bits that fill whole bytes, so that every rank can be quantised
RANKS = (0.0625, 0.09375, 0.140625, 0.1875, 0.28125, 0.375, 0.5)


class Xkv(Sharer):
    """One row of latents for each token, whatever the number of layers.

    Keys before their rotary embedding, and values, of W layers stand side by side, X [T, W*H*D],
    and X is stored as A = X V [T, r].

    V [W*H*D, r] are the strongest directions of the first tokens of each sequence, which a sum of
    outer products finds: nothing is ever as large as T x T. Later tokens are stored on the same V.
    Ranks are parts of the width W*H*D, in whole eights; values want half as much again as keys.
    With `centre` the mean of the first tokens is kept beside V and taken off first.
    """

    key_rank: Annotated[float, Share(RANKS)] = 0.09375
    value_rank: Annotated[float, Share(RANKS)] = 0.140625
    centre: bool = False
    needs = frozenset({"rope"})

    def shape(self, side: str, layers: int, heads: int, head_dim: int) -> tuple[int, int]:
        """One head of `rank` channels."""
        width = layers * heads * head_dim
        return 1, min(width, max(1, round(self._rank(side) * width / PACKED)) * PACKED)

    def part(self, side: str) -> float:
        """The rank, as a part of the width."""
        return self._rank(side)

    def least(self, layers: int, heads: int, head_dim: int) -> int:
        """From how many tokens on the factors save bytes: T (w - r) > r w."""
        width, found = layers * heads * head_dim, 0
        for side in ("keys", "values"):
            rank = self.shape(side, layers, heads, head_dim)[1]
            found = max(found, rank if rank == width else rank * width // (width - rank) + 1)
        return found

    def learn(self, layers: tuple[Tensor, ...], sites: tuple[Site, ...]) -> dict[str, Tensor]:
        """The right factor [B, W, H, D, r] of each layer, and the mean [B, W, H, D] of its
        tokens."""
        dtype = layers[0].dtype
        batch, heads, _, head_dim = layers[0].shape
        shape = batch, len(layers), heads, head_dim
        flat = _side_by_side(layers, sites)
        found: dict[str, Tensor] = {}
        if self.centre:
            mean = flat.mean(1, keepdim=True)
            flat = flat - mean
            found["mean"] = mean.to(dtype).reshape(shape)
        _, rank = self.shape(sites[0].side, len(layers), heads, head_dim)
        basis = span(gram(flat), rank).to(dtype).contiguous()
        return found | {"basis": basis.reshape(*shape, rank)}

    def fold(self, layers: tuple[Tensor, ...], sites: tuple[Site, ...]) -> Code:
        """Coordinates [B, 1, T, r] that all layers share."""
        # in 64 bits: how many tokens are projected at once moves no code
        flat, dtype = _side_by_side(layers, sites).double(), layers[0].dtype
        held = {name: x.double() for name, x in sites[0].tensors.items()}
        if self.centre:
            flat = flat - held["xkv.mean"].flatten(1)[:, None]
        return Code((flat @ held["xkv.basis"].flatten(1, 3))[:, None].to(dtype))

    def up(self, index: int, site: Site) -> Up:
        """The layer's right factor [B, H, r, D], and its mean."""
        factor = site.tensors["xkv.basis"][:, index].transpose(-1, -2).to(site.dtype)
        return Up(factor, site.tensors["xkv.mean"][:, index] if self.centre else None)

    def unfold(self, code: Code, index: int, site: Site) -> Tensor:
        """The layer's channels of A V^T, and keys turned by that layer's own embedding."""
        basis = site.tensors["xkv.basis"][:, index].to(site.dtype)
        x = torch.einsum("btr,bhdr->bhtd", code.body[:, 0].to(site.dtype), basis)
        if self.centre:
            x = x + site.tensors["xkv.mean"][:, index, :, None].to(site.dtype)
        if site.side != "keys":
            return x
        assert site.rope is not None, "load() gives every sharer that needs it a rope"
        return site.rope.turn(x, site.positions)

    def _rank(self, side: str) -> float:
        return self.key_rank if side == "keys" else self.value_rank


def _side_by_side(layers: tuple[Tensor, ...], sites: tuple[Site, ...]) -> Tensor:
    """Layers [B, H, T, D] as [B, T, W*H*D] in float32 at least, keys before their embedding."""
    return torch.cat([_flat(x, site) for x, site in zip(layers, sites, strict=True)], -1)


def _flat(x: Tensor, site: Site) -> Tensor:
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    if site.side == "keys":
        assert site.rope is not None, "load() gives every sharer that needs it a rope"
        x = site.rope.unturn(x, site.positions)
    return x.transpose(1, 2).flatten(2)
