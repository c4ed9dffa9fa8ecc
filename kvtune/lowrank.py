"""Low rank: attention to latents as they lie, where kernels run, without making keys of them."""

from __future__ import annotations

from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from kvtune_kernels.latents_launch import Rotary, attend_latents, unsupported_latents
from torch import Tensor, nn

from kvtune.rope import Rope

STEP = 4096  # positions by which a table of cosines and sines grows
_tables: WeakKeyDictionary[nn.Module, dict[tuple[str | None, torch.device], Rotary]] = (
    WeakKeyDictionary()
)


class Up(NamedTuple):
    """The way back from latents to heads: x = latents @ up + mean."""

    up: Tensor  # [H, r, D], or [B, H, r, D] where each row has its own
    mean: Tensor | None = None  # [H, D], or [B, H, D]


class Latents(NamedTuple):
    """One side of a layer as it is stored, [B, G, T, r] of groups of kv heads, and the way back;
    without one the heads themselves, G = H and r = D. Keys turn by `rope` on the way."""

    body: Tensor
    back: Up | None = None
    rope: Rope | None = None


class Exact(NamedTuple):
    """Tokens that are kept as they are, [B, H, T, D] of each side."""

    keys: Tensor
    values: Tensor


def reads(query: Tensor, keys: Latents, values: Latents) -> bool:
    """Whether kernels read latent keys, and values, for query [B, Hq, 1, D]."""
    if keys.back is None:
        return False
    return unsupported_latents(query[:, :, 0], keys.body, keys.back.up, values.body) is None


def attend(
    query: Tensor, keys: Latents, values: Latents, exact: Exact, start: int, scale: float | None
) -> Tensor:
    """Answers query [B, Hq, 1, D] over latents, of which the first token is at position `start`,
    and exact tokens; partial answers meet in the softmax."""
    asked, factor = query[:, :, 0], query.shape[-1] ** -0.5 if scale is None else scale
    assert keys.back is not None, "see `reads`"
    length = start + keys.body.shape[2]
    rotary = None if keys.rope is None else rotary_of(keys.rope, length, query.device)
    up, mean = keys.back
    parts = [
        attend_latents(
            asked, keys.body, up, values.body, rotary, mean=mean, start=start, scale=factor
        )
    ]
    if values.back is not None:
        parts[0] = _raised(parts[0][0], values.back), parts[0][1]
    if exact.keys.shape[2]:
        parts.append(attend_latents(asked, exact.keys, None, exact.values, scale=factor))
    weights = torch.stack([lse for _, lse in parts]).softmax(0)
    found = sum(w[..., None] * out.float() for w, (out, _) in zip(weights, parts, strict=True))
    assert isinstance(found, Tensor)
    return found.to(query.dtype)[:, :, None]


def _raised(out: Tensor, back: Up) -> Tensor:
    """Attention's answers [B, Hq, r] in latents of values, as answers [B, Hq, D]."""
    up = back.up if back.up.ndim == 4 else back.up[None]
    heads = up.shape[1]
    grouped = out.unflatten(1, (heads, -1)).float()
    found = grouped @ up.float()
    if back.mean is not None:
        mean = back.mean if back.mean.ndim == 3 else back.mean[None]
        found = found + mean.float()[:, :, None]
    raised: Tensor = found.flatten(1, 2)
    return raised


def rotary_of(rope: Rope, length: int, device: torch.device) -> Rotary:
    """A model's own cosines and sines of the positions below a length, kept between tokens."""
    held = _tables.setdefault(rope.module, {})
    place = rope.layer_type, device
    if place not in held or len(_table(held[place])) < length:
        positions = torch.arange(-(-length // STEP) * STEP, device=device)
        cos, sin = rope.tables(positions)
        held[place] = Rotary.of(cos, sin, 2 * cos.shape[-1], rope.interleaved)
    return held[place]


def _table(rotary: Rotary) -> Tensor:
    assert rotary.table is not None, "it was made of tables"
    return rotary.table
