"""The body of a packed cache: each span's exact tokens and coded components."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kvtune.allotting import Group
from kvtune.errors import IntegrityError, UnsupportedError
from kvtune.packing import coding, kvtc
from kvtune.packing.span import Span

CLOSE = 0.01  # of the bits that are asked for
TRIES = 8
Pair = tuple[Span, Span]


@dataclass(frozen=True)
class Scheme:
    """How components are coded: by entropy at a step, or by KVTC's groups.

    Args:
        step: of the entropy coder, in roots of nats a token; KVTC's unit otherwise.
        groups: of each span's components, keys' then values'; none for the entropy coder.
        first, last: tokens at both ends that are kept exact, in 16 bits.
    """

    step: float
    groups: tuple[tuple[Group, ...], ...] = ()
    first: int = 0
    last: int = 0

    def coded(self, tokens: int) -> slice:
        """The tokens that are not exact."""
        start = min(self.first, tokens)
        return slice(start, max(start, tokens - self.last))


@torch.no_grad()
def components(pair: Pair, keys: Tensor, values: Tensor, step: float) -> Tensor:
    """z [T, Rk + Rv] of tokens of both sides [T, W]."""
    return torch.cat([pair[0].forward(keys, step), pair[1].forward(values, step)], 1)


def encode(z: Tensor, scheme: Scheme, number: int) -> bytes:
    """Codes the components z [T, R] of the span of a number."""
    if not len(z):
        return b""
    if scheme.groups:
        return kvtc.encode(z, scheme.groups[number], scheme.step)
    return coding.encode(z, scheme.step)


@torch.no_grad()
def decode(data: bytes, scheme: Scheme, number: int, pair: Pair, tokens: int) -> Tensor:
    """Both sides [T, 2 W] of one span's coded tokens, keys first."""
    if not tokens:
        return torch.empty(0, sum(span.width for span in pair))
    cut = pair[0].rank
    rank = cut + pair[1].rank
    if scheme.groups:
        z = kvtc.decode(data, tokens, scheme.groups[number], scheme.step)
        live = torch.arange(rank)
    else:
        z, live = coding.decode(data, tokens, rank, scheme.step)
    keys = live < cut
    step = scheme.step
    sides = (
        pair[0].back(z[:, keys], live[keys], step),
        pair[1].back(z[:, ~keys], live[~keys] - cut, step),
    )
    return torch.cat(sides, 1)


def exact(x: Tensor, dtype: torch.dtype) -> bytes:
    """Tokens in 16 bits.

    Raises:
        UnsupportedError: 16 bits of this kind cannot hold them.
    """
    found = x.to(dtype)
    if not torch.isfinite(found).all():
        what = f"The cache's first tokens hold values that {dtype} cannot."
        raise UnsupportedError(what, "Load the model with --dtype bfloat16.")
    return found.contiguous().view(torch.uint8).numpy().tobytes()


def inexact(data: bytes, rows: int, width: int, dtype: torch.dtype) -> Tensor:
    """The inverse of `exact`: [rows, width] in 32 bits."""
    if len(data) != rows * width * 2:
        raise IntegrityError(f"The packed cache's exact tokens have {len(data)} bytes.")
    raw = torch.from_numpy(np.frombuffer(data, dtype=np.uint8).copy())
    found = raw.view(dtype).view(rows, width).float()
    if not torch.isfinite(found).all():
        raise IntegrityError("The packed cache holds values that are not finite.")
    return found


def step_for(wanted: float, start: float, nbytes: Callable[[float], int]) -> float:
    """The step at which a file takes `wanted` bytes, by secants of log bytes over log step."""
    step, slope = start, -1.0
    known: tuple[float, float] | None = None
    for _ in range(TRIES):
        size = float(nbytes(step))
        if abs(size / wanted - 1) < CLOSE:
            break
        here = (math.log(step), math.log(size))
        if known and here[0] != known[0]:
            slope = min(-0.1, max(-4.0, (here[1] - known[1]) / (here[0] - known[0])))
        known = here
        step *= math.exp(max(-2.0, min(2.0, math.log(wanted / size) / slope)))
    return step
