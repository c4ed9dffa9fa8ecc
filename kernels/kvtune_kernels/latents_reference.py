"""Attention to low-rank keys in plain torch: the definition of right for `latents`."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Rotary(NamedTuple):
    """How the first `width` channels of a key turn with its position (RoPE, arXiv:2104.09864).

    Either a `table` fp16 [P, width] of cosines and sines by position (see `of`), or `frequency`
    fp32 [width / 2] in radians a position, times `factor` (YaRN's attention factor): then nothing
    is read, which is faster. Channel j turns with j + width / 2, or, interleaved, 2 j with 2 j + 1.
    """

    width: int
    table: Tensor | None = None
    frequency: Tensor | None = None
    factor: float = 1.0
    interleaved: bool = False

    @classmethod
    def of(cls, cos: Tensor, sin: Tensor, width: int, interleaved: bool = False) -> Rotary:
        """From a model's tables [P, width / 2], or [P, width] whose first half is read."""
        pair = torch.stack([cos[:, : width // 2], sin[:, : width // 2]], -1)
        return cls(width, pair.flatten(1).half().contiguous(), interleaved=interleaved)

    def cos_sin(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Float32 cosines and sines [..., width / 2] at positions [...].

        Raises:
            ValueError: there is neither table nor frequency.
        """
        if self.table is not None:
            cos, sin = self.table[positions.long()].float().unflatten(-1, (-1, 2)).unbind(-1)
            return cos, sin
        if self.frequency is None:
            raise ValueError("a Rotary needs a table or frequencies")
        angle = positions[..., None].float() * self.frequency.float()
        return angle.cos() * self.factor, angle.sin() * self.factor

    def pairs(self, head_dim: int) -> Tensor:
        """The order of channels [head_dim] in which those that turn together are neighbours."""
        if self.interleaved:
            return torch.arange(head_dim)
        turning = torch.arange(self.width).unflatten(0, (2, -1)).T.flatten()
        return torch.cat([turning, torch.arange(self.width, head_dim)])

    def turn(self, keys: Tensor, positions: Tensor) -> Tensor:
        """Keys [..., T, D] after RoPE, positions [..., T]."""
        first, other = self.pairs(self.width).to(keys.device).unflatten(0, (-1, 2)).unbind(-1)
        cos, sin = (x.to(keys.dtype) for x in self.cos_sin(positions))
        left, right = keys[..., first], keys[..., other]
        turned = keys.clone()
        turned[..., first] = left * cos - right * sin
        turned[..., other] = right * cos + left * sin
        return turned


def reconstruct(
    latents: Tensor, up: Tensor | None, rotary: Rotary | None, mean: Tensor | None,
    positions: Tensor,
) -> Tensor:  # fmt: skip
    """Keys [B, H, S, D] in fp32 of latents [B, H, S, r], up [B, H, r, D], positions [B, H, S]."""
    keys = latents.float() if up is None else latents.float() @ up.float()
    if mean is not None:
        keys = keys + mean.float().unsqueeze(-2)
    return keys if rotary is None else rotary.turn(keys, positions)


def attend_latents(
    query: Tensor, latents: Tensor, up: Tensor | None, values: Tensor | None,
    rotary: Rotary | None = None, mean: Tensor | None = None, index: Tensor | None = None,
    counts: Tensor | None = None, start: int | Tensor = 0, scale: float | None = None,
    value_scales: Tensor | None = None, paired: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See `latents_launch.attend_latents`; every array in fp32, nothing fused."""
    batch, query_heads, dim = query.shape
    heads = head_count(latents, up, values, index)
    tokens, device = latents.shape[-2], query.device
    if index is None:
        index = torch.arange(tokens, device=device).expand(batch, heads, tokens)
    index = index.long()
    seen = torch.arange(index.shape[2], device=device).expand(index.shape)
    if counts is not None:
        seen = seen < (counts if counts.dim() == 2 else counts[:, None])[..., None]
    else:
        seen = torch.ones_like(seen, dtype=torch.bool)
    index = torch.where(seen, index, 0)  # what is not counted may be anything
    first = start[:, None, None] if isinstance(start, Tensor) else start
    if up is not None and paired and rotary is not None:
        up = up[..., rotary.pairs(dim).argsort().to(device)]
    up = up if up is None or up.dim() == 4 else up[None]
    mean = mean if mean is None or mean.dim() == 3 else mean[None]
    own = _of_heads(latents, heads)
    own = own.gather(2, index[..., None].expand(*index.shape, own.shape[-1]))
    keys = reconstruct(own, up, rotary, mean, index + first)
    asked = query.float().unflatten(1, (heads, -1))  # [B, H, share, D]
    logits = asked @ keys.transpose(-1, -2) * (dim**-0.5 if scale is None else scale)
    logits = logits.masked_fill(~seen.unsqueeze(2), -math.inf)
    lse = logits.logsumexp(-1)
    out = query.new_empty(batch, query_heads, 0)
    if values is not None:
        read = _of_heads(values, heads).float()
        if value_scales is not None:
            read = read * value_scales.float()[..., None]
        read = read.gather(2, index[..., None].expand(*index.shape, read.shape[-1]))
        read = torch.where(seen[..., None], read, 0.0)
        weights = (logits - lse.clamp_min(-1e30).unsqueeze(-1)).exp()
        out = (weights @ read).flatten(1, 2).to(query.dtype)
    return out, lse.flatten(1, 2)


def head_count(
    latents: Tensor, up: Tensor | None, values: Tensor | None, index: Tensor | None
) -> int:
    """Kv heads: those that select, else those of `up`, else of the latents or values."""
    if index is not None:
        return index.shape[1]
    if up is not None:
        return up.shape[-3]
    sides = [x.shape[1] for x in (latents, values) if x is not None and x.dim() == 4]
    return max(sides, default=1)


def _of_heads(x: Tensor, heads: int) -> Tensor:
    """Latents or values [B, T, r] or [B, G, T, r] as [B, heads, T, r]; heads of a group share."""
    x = x[:, None] if x.dim() == 3 else x
    return x.repeat_interleave(heads // x.shape[1], 1)
