"""Folded: the linear maps before the codes of one layer, taken out of what kernels do a token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from kvtune_kernels import Map, turn
from torch import Tensor

from kvtune.chains import Chain
from kvtune.pages import MakeSite
from kvtune.parts import Fold
from kvtune.policy import Policy


@dataclass(frozen=True)
class Folded:
    """Keys and values are stored as y = (x - shift) @ turn, exact tokens too; x = y @ back + shift.

    Then q . x = (q @ back^T) . y + q . shift, whose constant softmax does not see but a softcap
    does, and weights that add up to one make out @ back + shift of what is read of the values.
    """

    keys: Fold | None = None
    values: Fold | None = None
    planes: tuple[Tensor | None, Tensor | None] = (None, None)  # of keys, and of values
    maps: tuple[Map | None, Map | None, Map | None, Map | None] = (None, None, None, None)
    shifted: bool = False  # the keys are

    @classmethod
    def of(cls, policy: Policy, sites: tuple[MakeSite, MakeSite] | None, like: Tensor) -> Folded:
        """Of the chains of a layer whose keys are as `like` [B, H, T, D]."""
        if sites is None:
            return cls()
        heads, dim = like.shape[1], like.shape[3]
        nowhere = torch.zeros(0, dtype=torch.long, device=like.device)
        folds, planes = [], []
        chains: tuple[Chain, Chain] = (policy.keys, policy.values)
        for chain, make_site in zip(chains, sites, strict=True):
            site = make_site(nowhere, like.dtype)
            fold, table = chain.fold(site, heads, dim), chain.planes(site)
            folds.append(None if fold is None else Fold(*(_on(x, like) for x in fold)))
            planes.append(None if table is None else table.to(like.device).contiguous())
        k, v = folds
        maps = (_into(k), _into(v), _asking(k), _out_of(v))
        shifted = k is not None and bool(k.shift.any())
        return cls(k, v, (planes[0], planes[1]), maps, shifted)

    def enter(self, query: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query [B, Hq, n, D], and keys and values [B, H, n, D] as they are stored."""
        into_keys, into_values, asking, _ = self.maps
        q, k, v = turn((query, asking), (keys, into_keys), (values, into_values))
        return q, k, v

    def store(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [B, H, n, D] as they are stored."""
        k, v = turn((keys, self.maps[0]), (values, self.maps[1]))
        return k, v

    def leave(self, out: Tensor) -> Tensor:
        """What attention [B, Hq, n, D] to stored values says of the values themselves."""
        (found,) = turn((out, self.maps[3]))
        return found

    def restore(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Inverse of `store`."""
        k, v = turn((keys, _out_of(self.keys)), (values, self.maps[3]))
        return k, v

    def bias(self, query: Tensor, scale: float | None) -> Tensor | None:
        """What logits lack, [B, Hq, n] in fp32, of queries [B, Hq, n, D] before they are turned;
        None where it is zero."""
        if self.keys is None or not self.shifted:
            return None
        wide = query.unflatten(1, (self.keys.shift.shape[0], -1)).float()
        lacking = torch.einsum("bhsnd,hd->bhsn", wide, self.keys.shift.float()).flatten(1, 2)
        return lacking * (query.shape[-1] ** -0.5 if scale is None else scale)


def _on(x: Tensor, like: Tensor) -> Tensor:
    return x.to(like.device)


def _into(fold: Fold | None) -> Map | None:
    if fold is None:
        return None
    shift = torch.einsum("hd,hde->he", fold.shift.float(), fold.turn.float())
    return Map(fold.turn.contiguous(), -shift)


def _out_of(fold: Fold | None) -> Map | None:
    return None if fold is None else Map(fold.back.contiguous(), fold.shift)


def _asking(fold: Fold | None) -> Map | None:
    if fold is None:
        return None
    return Map(fold.back.transpose(-1, -2).contiguous(), torch.zeros_like(fold.shift))
