"""Low rank: attention to latents as they lie, where kernels run, without making keys of them."""

from __future__ import annotations

from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from kvtune_kernels.latents_launch import attend_latents, paired_basis, unsupported_latents
from kvtune_kernels.latents_reference import Rotary
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from kvtune.rope import Rope

STEP = 4096  # positions by which a table of cosines and sines grows
TRIED = (1, 63, 4095)  # positions at which frequencies are compared with a model's own turns
_turns: WeakKeyDictionary[nn.Module, dict[tuple[str | None, torch.device], Rotary]] = (
    WeakKeyDictionary()
)
_paired: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


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
    if rotary is not None:
        up = _in_pairs(up, rotary)
    parts = [
        attend_latents(
            asked, keys.body, up, values.body, rotary, mean=mean, start=start, scale=factor,
            paired=rotary is not None,
        )
    ]  # fmt: skip
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
    """How a model's keys turn at the positions below a length, kept between tokens: by its own
    frequencies where these tell its cosines and sines, else by a table of them."""
    held = _turns.setdefault(rope.module, {})
    place = rope.layer_type, device
    found = held.get(place) or _by_frequency(rope, device)
    if found is None or (found.table is not None and len(found.table) < length):
        positions = torch.arange(-(-length // STEP) * STEP, device=device)
        cos, sin = rope.tables(positions)
        found = Rotary.of(cos, sin, 2 * cos.shape[-1], rope.interleaved)
    held[place] = found
    return found


def _by_frequency(rope: Rope, device: torch.device) -> Rotary | None:
    name = "inv_freq" if rope.layer_type is None else f"{rope.layer_type}_inv_freq"
    own = getattr(rope.module, name, None)
    cos, sin = rope.tables(torch.tensor(TRIED, device=device))
    if not isinstance(own, Tensor) or own.shape != cos.shape[1:]:
        return None
    factor = float((cos[0, 0] ** 2 + sin[0, 0] ** 2).sqrt())
    found = Rotary(2 * len(own), None, own.float().to(device), factor, rope.interleaved)
    told = found.cos_sin(torch.tensor(TRIED, device=device))
    near = all(torch.allclose(x, y, atol=1e-3) for x, y in zip(told, (cos, sin), strict=True))
    return found if near else None


def _in_pairs(up: Tensor, rotary: Rotary) -> Tensor:
    """A basis in the order that kernels read, made once."""
    if up not in _paired:
        _paired[up] = paired_basis(up, rotary)
    found: Tensor = _paired[up]
    return found
