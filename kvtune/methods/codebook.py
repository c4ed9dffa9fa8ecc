"""A codebook for each kv head, fitted by weighted k-means
(KVQuant, arXiv:2401.18079)."""

from typing import Annotated, Literal

import torch
from kvtune_kernels import PAGE
from torch import Tensor

from kvtune import levels
from kvtune.marks import OneOf
from kvtune.parts import Code, Quantizer, Seen, Site

ROUNDS = 50


class Codebook(Quantizer):
    """x = level * scale (+ zero) with fitted levels between -1 and 1.

    `axis = "token"`: groups are all channels of a token, and the scale is unbiased. `axis =
    "channel"`: groups are 64 or 128 tokens of a channel about the middle of their range. Levels are
    fitted to a sample of the layer and side, each value weighing what its channel's errors cost
    (KVQuant weighs by Fisher information). Kernels do not read it.
    """

    bits: Annotated[int, OneOf((2, 3, 4))] = 2
    axis: Literal["token", "channel"] = "token"
    group: Annotated[int, OneOf((64, 128))] = 128  # tokens, per channel

    fits = True

    @property
    def payload_bits(self) -> float:
        """The code bits."""
        return float(self.bits)

    @property
    def block(self) -> int:
        """Whole pages, and whole groups of tokens."""
        return max(PAGE, self.group) if self.axis == "channel" else PAGE

    def check(self, head_dim: int, side: str) -> None:
        """Pages hold whole bytes."""
        if head_dim % 8:
            raise ValueError(f"codebook packs whole bytes: head_dim {head_dim} is no multiple of 8")

    def blanks(self, heads: int, head_dim: int) -> dict[str, Tensor]:
        """Levels of each head in 16 bits."""
        shape = (heads, 2**self.bits)
        return {f"levels{self.bits}": torch.empty(shape, dtype=torch.float16, device="meta")}

    def fit(self, seen: Seen) -> dict[str, Tensor]:
        """Finds the levels of each head."""
        weight = torch.diagonal(seen.weight, dim1=1, dim2=2)[:, None]
        x = seen.sample
        # a sample's tokens lie far apart: their range is about that of a group
        middle, reach = self._range(x, 1 if self.axis == "channel" else 2)
        rows = zip((x - middle) / reach, (weight * reach.square()).expand_as(x), strict=True)
        found = [_k_means(one.flatten(), w.flatten(), 2**self.bits) for one, w in rows]
        return {f"levels{self.bits}": torch.stack(found).half()}

    def _range(self, x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        if self.axis == "token":
            reach = x.abs().amax(dim, keepdim=True)
            return torch.zeros_like(reach), reach.clamp_min(1e-30)
        low, high = x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
        return (low + high) / 2, ((high - low) / 2).clamp_min(1e-30)

    def encode(self, x: Tensor, site: Site) -> Code:
        """Pages of codes, and the scale of each group; per channel its middle as well."""
        book = self._book(site)
        limit = torch.finfo(torch.float16).max
        wide = x.float().clamp(-limit, limit)
        size = x.shape[-1] if self.axis == "token" else self.group
        groups = levels.grouped(wide, self.axis, size)
        middle, reach = self._range(groups, -1)
        middle = middle.half().float()
        codes = levels.nearest((groups - middle) / reach, book)
        if self.axis == "token":
            scale = levels.unbiased(groups, levels.looked_up(codes, book), -1)
            side: tuple[Tensor, ...] = (scale.squeeze(-1),)
        else:
            side = (reach.clamp_max(limit).half().squeeze(-1), middle.half().squeeze(-1))
        flat = levels.whole(codes, self.axis)
        return Code(levels.stored(flat, self.bits, site.side == "keys"), side)

    def decode(self, code: Code, site: Site) -> Tensor:
        """Returns level * scale + middle."""
        codes = levels.restored(code.body, self.bits, site.side == "keys")
        size = codes.shape[-1] if self.axis == "token" else self.group
        read = levels.grouped(levels.looked_up(codes, self._book(site)), self.axis, size)
        scale, *middle = (x.float().unsqueeze(-1) for x in code.side)
        read = read * scale + (middle[0] if middle else 0.0)
        return levels.whole(read, self.axis).to(site.dtype)

    def _book(self, site: Site) -> Tensor:
        return site.tensors[f"codebook.levels{self.bits}"].float()


def _k_means(x: Tensor, weight: Tensor, count: int) -> Tensor:
    """The weighted means [count], ascending, that Lloyd's rounds lead to from even quantiles."""
    order = x.argsort()
    x, weight = x[order], weight[order].clamp_min(1e-30)
    share = weight.cumsum(0) / weight.sum()
    places = torch.searchsorted(share, (torch.arange(count, dtype=x.dtype) + 0.5) / count)
    found = x[places.clamp_max(x.numel() - 1)]
    for _ in range(ROUNDS):
        own = torch.bucketize(x, (found[1:] + found[:-1]) / 2)
        mass = torch.zeros_like(found).scatter_add(0, own, weight)
        total = torch.zeros_like(found).scatter_add(0, own, weight * x)
        found = torch.where(mass > 0, total / mass.clamp_min(1e-30), found).sort().values
    return found
