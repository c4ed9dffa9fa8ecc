"""Ragged: attention to heads that keep unequal shares of their tokens, against all of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from kvtune_kernels import PAGE, Format, Workspace, implementation
from kvtune_kernels.ragged_launch import Ragged, attend_ragged
from torch import Tensor

from kvtune.bench.cases import RECENT, SINKS, Shape, pair, side_bytes
from kvtune.bench.kernels import Lab, finite
from kvtune.bench.store import DTYPE, packed

GROUP = 128  # tokens of a channel of keys that share a scale
QUARTER, GOAL = 0.25, 3.0  # of the tokens in the mean: so many times faster than all of them
SPREAD = (0.25, 2.5)  # the shortest and the longest head, in mean lengths


@dataclass(frozen=True)
class Case:
    """Heads that keep `share` of the context in the mean, in so many bits."""

    shape: Shape
    bits: int  # 16, 8, 4 or 2
    share: float = 1.0
    spread: tuple[float, float] = SPREAD
    seed: int = 0

    @property
    def name(self) -> str:
        """4 bits, 25 %."""
        return f"{self.bits} bits, {self.share:.0%}"

    @property
    def formats(self) -> tuple[Format | None, Format | None]:
        """Keys per channel and values per token; None of 16 bits."""
        if self.bits == 16:
            return None, None
        both = pair(self.bits, GROUP, self.shape)
        return both.keys, both.values

    def lengths(self) -> Tensor:
        """Tokens [B, H] of each head: equal ones of the whole context, else as even in their
        logarithm as the spread says, with the wanted mean and none above the context."""
        shape = self.shape
        size = (shape.batch, shape.kv_heads)
        if self.share >= 1:
            return torch.full(size, shape.context)
        generator = torch.Generator().manual_seed(self.seed)
        low, high = (math.log(x) for x in self.spread)
        drawn = (low + (high - low) * torch.rand(size, generator=generator).double()).exp()
        mean = self.share * shape.context
        for _ in range(64):  # what the longest lose, the others get
            drawn = (drawn * (mean / drawn.mean())).clamp_max(shape.context)
        return drawn.round().long().clamp_min(1)

    def head_bytes(self) -> int:
        """What the heads store one by one, summed up: whole blocks of each."""
        dim, total = self.shape.head_dim, 0
        for format in self.formats:
            block = PAGE if format is None else format.block
            for length in self.lengths().flatten().tolist():
                tokens = -(-length // block) * block
                total += 2 * dim * tokens if format is None else side_bytes(format, tokens, dim)
        return total

    def floor_bytes(self) -> int:
        """What has to move: the stored bytes, and the exact window of each head."""
        heads = self.shape.batch * self.shape.kv_heads
        return self.head_bytes() + heads * (SINKS + RECENT) * 4 * self.shape.head_dim


@dataclass(frozen=True)
class Timing:
    """Attention of one layer, its merge included."""

    case: Case
    microseconds: float
    full_microseconds: float  # of the same kernel when every head keeps all tokens
    rectangle_microseconds: float | None  # of the kernel of equal lengths to all tokens, if packed
    dense_microseconds: float  # of the best bf16 attention to all tokens
    floor_microseconds: float  # at the copy rate of the run
    stored: int  # bytes that are held
    head_bytes: int  # the sum over heads
    longest: int  # tokens of a head
    error: float  # relative, of two rows, against fp32
    captured: bool  # timed as a CUDA graph

    @property
    def ratio(self) -> float:
        """Times faster than with all tokens: than the faster of both kernels."""
        return min(self.full_microseconds, self.rectangle_microseconds or math.inf) / (
            self.microseconds
        )

    @property
    def dense_ratio(self) -> float:
        """Times faster than bf16 attention to all tokens."""
        return self.dense_microseconds / self.microseconds

    @property
    def floor_share(self) -> float:
        """How much of the time reading alone would take."""
        return self.floor_microseconds / self.microseconds

    @property
    def met(self) -> bool | None:
        """Whether a quarter of the tokens is read as fast as it should; None of other shares."""
        return None if self.case.share != QUARTER else self.ratio >= GOAL

    def table(self) -> dict[str, Any]:
        """Plain values."""
        own = {name: value for name, value in asdict(self).items() if name != "case"}
        names = ("ratio", "dense_ratio", "floor_share", "met")
        more = {name: getattr(self, name) for name in names}
        return {"name": self.case.name, **asdict(self.case), **finite(own | more)}


@dataclass(frozen=True)
class Layer:
    """A random layer in the formats of a case, and one query token for each row."""

    query: Tensor  # [B, Hq, 1, D]
    keys: Ragged
    values: Ragged
    exact_keys: Tensor  # [B, H, sinks + recent, D]
    exact_values: Tensor

    @classmethod
    def random(cls, case: Case, device: torch.device) -> Layer:
        """Keys and values of standard deviation 1, never zeros."""
        shape, lengths = case.shape, case.lengths()
        keys, values = (_pool(format, lengths, shape.head_dim, device) for format in case.formats)
        exact = (shape.batch, shape.kv_heads, SINKS + RECENT, shape.head_dim)
        held = [torch.randn(exact, dtype=DTYPE, device=device) for _ in range(2)]
        query = (shape.batch, shape.heads, 1, shape.head_dim)
        return cls(torch.randn(query, dtype=DTYPE, device=device), keys, values, *held)

    def attend(self, workspace: Workspace) -> Tensor:
        """Attention, its merge included: [B, Hq, 1, D]."""
        exact = self.exact_keys, self.exact_values
        return attend_ragged(self.query, self.keys, self.values, *exact, workspace=workspace)

    def first(self, rows: int) -> Layer:
        """The first batch rows, in the same pool."""
        keys, values = (
            replace(side, offsets=side.offsets[:rows], lengths=side.lengths[:rows], plans={})
            for side in (self.keys, self.values)
        )
        exact = self.exact_keys[:rows], self.exact_values[:rows]
        return Layer(self.query[:rows], keys, values, *exact)


def _pool(format: Format | None, lengths: Tensor, dim: int, device: torch.device) -> Ragged:
    found = Ragged.empty(format, lengths, dim, device, dtype=DTYPE)
    if format is None:
        found.codes.normal_()
        return found
    made = packed(format, (1, 1, found.codes.shape[2] * PAGE, dim), device)
    found.codes.copy_(made.codes)
    found.meta.copy_(made.meta)
    return found


@torch.no_grad()
def time(lab: Lab, shape: Shape, bits: int, cases: Sequence[Case]) -> Iterator[Timing]:
    """Times all tokens in so many bits first, then the cases, which have those bits."""
    full, workspace = None, Workspace()
    for case in (Case(shape, bits), *cases):
        layer = Layer.random(case, lab.device)
        out = layer.first(2).attend(workspace)
        with implementation("reference"):
            true = layer.first(2).attend(workspace).float()
        took = lab.clock.measure(partial(layer.attend, workspace))
        full = took.microseconds if full is None else full
        yield Timing(
            case,
            took.microseconds,
            full,
            None if bits == 16 else lab.attention(pair(bits, GROUP, shape)).microseconds,
            lab.dense(shape)[0],
            1e6 * case.floor_bytes() / lab.copy_rate,
            layer.keys.nbytes + layer.values.nbytes,
            case.head_bytes(),
            int(case.lengths().max()),
            float((out.float() - true).norm() / true.norm()),
            took.captured,
        )
