"""Moments of keys and queries under the rotary embedding, averaged over the positions of a context.

Post-RoPE keys of a long context are distributed unlike those of a short one: slow channel pairs
turn on. Their moments follow from pre-RoPE moments, so a short calibration fits any context.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kvtune.rope import Rope

POSITIONS = 512  # of a context, evenly spread, that stand for all
AT_ONCE = 64


def mean(rope: Rope, first: Tensor, context: int) -> Tensor:
    """The mean [H, D] of x turned to every position below `context`, from the mean [H, D] of x."""
    places = _places(context, first.device)
    x = first[None, :, None].expand(-1, -1, len(places), -1)
    turned: Tensor = rope.turn(x, places)[0].mean(1)
    return turned


def moment(rope: Rope, second: Tensor, context: int, inverse: bool = False) -> Tensor:
    """The second moment [H, D, D] of x turned to every position below `context`, or turned back."""
    root = _root(second)  # second = sum over rows r of r^T r
    total = torch.zeros_like(second)
    for places in _places(context, second.device).split(AT_ONCE):
        rows = root.flatten(0, 1)[None, :, None].expand(-1, -1, len(places), -1)
        turned = (rope.unturn if inverse else rope.turn)(rows, places)[0].unflatten(
            0, root.shape[:2]
        )
        total += torch.einsum("hrnd,hrne->hde", turned, turned)
    return total / min(context, POSITIONS)


def together(rope: Rope, second: Tensor, heads: int, context: int) -> Tensor:
    """As `moment`, of all heads at once: from the second moment [H * D, H * D] of x.

    A turn mixes a channel with one other, so its mean is four products of means with the moment.
    """
    dim = second.shape[0] // heads
    eye = torch.eye(dim, dtype=second.dtype, device=second.device)
    places = _places(context, second.device)
    own: list[Tensor] = []
    other: list[Tensor] = []
    partner = torch.arange(dim, device=second.device)
    for some in places.flip(0).split(AT_ONCE):  # the far ones first: these tell what mixes
        turned = rope.turn(eye[None, :, None].expand(-1, -1, len(some), -1), some)[0]
        matrix = turned.permute(1, 2, 0)  # [n, D, D]: a channel, of which channels it is made
        own.append(torch.diagonal(matrix, dim1=1, dim2=2))
        rest = matrix - torch.diag_embed(own[-1])
        if not other:
            partner = rest.abs().sum(0).argmax(-1)
        other.append(rest.gather(-1, partner.expand(len(some), -1)[..., None])[..., 0])
    factors = [torch.cat(part).repeat(1, heads) for part in (own, other)]
    every = torch.arange(heads, device=second.device)[:, None] * dim
    sources = [
        (every + index).flatten() for index in (torch.arange(dim, device=every.device), partner)
    ]
    total = torch.zeros_like(second)
    for left, rows in zip(factors, sources, strict=True):
        for right, columns in zip(factors, sources, strict=True):
            total += left.T @ right * second[rows][:, columns]
    return total / len(places)


def sample(rope: Rope, x: Tensor, context: int) -> Tensor:
    """Vectors x [H, n, D] turned to positions spread over a context, each to another one."""
    # neighbours in x are neighbours in a text: a step that shares no factor with n parts them
    count = x.shape[1]
    order = torch.arange(count, device=x.device) * _coprime(count) % count
    turned: Tensor = rope.turn(x[None], order * context // count)[0]
    return turned


def _places(context: int, device: torch.device) -> Tensor:
    count = min(context, POSITIONS)
    return torch.arange(count, device=device) * context // count


def _root(second: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(second)
    root: Tensor = values.clamp_min(0).sqrt()[..., None] * vectors.transpose(-1, -2)
    return root


def _coprime(count: int) -> int:
    step = max(1, int(count * 0.618))
    while math.gcd(step, count) > 1:
        step += 1
    return step
