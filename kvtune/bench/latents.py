"""Latents: attention to low-rank keys, of selected tokens and of all, against its byte floor."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from kvtune_kernels import Workspace, implementation
from kvtune_kernels.latents_launch import attend_latents, paired_basis
from kvtune_kernels.latents_reference import Rotary
from torch import Tensor

from kvtune.bench.cases import Shape, pair
from kvtune.bench.kernels import Lab, finite
from kvtune.bench.store import DTYPE

Reads = Literal["own", "shared", "all"]  # tokens: of each kv head, of all heads alike, every one
Values = Literal["16 bits", "8 bits", "none", "latents"]

CHUNK = 8  # neighbours that are selected together (ShadowKV, arXiv:2410.21465)
BASE = 500000.0  # of the rotary embedding of Llama-3
GOAL = 65.0  # microseconds of the first row


@dataclass(frozen=True)
class Case:
    """Joint latents of all kv heads, and who reads which of their tokens."""

    shape: Shape
    rank: int
    reads: Reads = "all"
    tokens: int = 0  # that a head reads, when not all
    values: Values = "16 bits"
    goal: float | None = None  # microseconds at most

    @property
    def name(self) -> str:
        """rank 160, own 2048 of 122880, values in 16 bits, B=24."""
        s = self.shape
        read = f"all {s.context}" if self.reads == "all" else f"{self.reads} {self.tokens}"
        of = "" if self.reads == "all" else f" of {s.context}"
        kinds = {"none": "keys alone", "latents": "absorbed, values as latents"}
        return (
            f"rank {self.rank}, {read}{of}, {kinds.get(self.values, f'values in {self.values}')}, "
            f"B={s.batch}"
        )

    def floor_bytes(self) -> int:
        """What has to move: latents once for each token that heads read, values of each head."""
        s, count = self.shape, self.tokens if self.reads != "all" else self.shape.context
        own = s.kv_heads if self.reads == "own" else 1
        latents = s.batch * own * count * self.rank * 2
        each = {"16 bits": 2 * s.head_dim, "8 bits": s.head_dim + 2, "none": 0, "latents": 0}
        values = s.batch * s.kv_heads * count * each[self.values]
        return latents * (2 if self.values == "latents" else 1) + values


@dataclass(frozen=True)
class Timing:
    """Attention of one layer, its merge included."""

    case: Case
    microseconds: float
    floor_microseconds: float  # at the copy rate of the run
    error: float  # relative, of two rows, against fp32; of keys alone of the log-sum-exp

    @property
    def floor_share(self) -> float:
        """How much of the time reading alone would take."""
        return self.floor_microseconds / self.microseconds

    @property
    def met(self) -> bool | None:
        """Whether the goal is reached, where there is one."""
        return None if self.case.goal is None else self.microseconds <= self.case.goal

    def table(self) -> dict[str, Any]:
        """Plain values."""
        own = {"us": self.microseconds, "floor_us": self.floor_microseconds, "error": self.error}
        more = {"floor_share": self.floor_share, "met": self.met}
        return {"name": self.case.name, **asdict(self.case), **finite(own | more)}


def selected(context: int, rank: int = 160, tokens: int = 2048, batch: int = 24) -> list[Case]:
    """The rows of ShadowKV's decoding step, then its parts."""
    case = Case(Shape(batch, context), rank, "own", tokens, goal=GOAL)
    plain = replace(case, goal=None)
    return [
        case,
        replace(plain, values="8 bits"),
        replace(plain, reads="shared"),
        replace(plain, values="none"),
        replace(plain, reads="all", tokens=0, shape=Shape(batch, tokens)),
    ]


def dense(shape: Shape, ranks: tuple[int, ...]) -> list[Case]:
    """All tokens, in both kinds of values; then absorbed into latent values, without RoPE."""
    found = [Case(shape, rank, values=v) for rank in ranks for v in ("16 bits", "8 bits")]
    return found + [Case(shape, rank, values="latents") for rank in ranks]


@torch.no_grad()
def time(lab: Lab, case: Case) -> Timing:
    """Times a case on random tensors of spread 1, and checks two rows of it."""
    given, workspace = arguments(case, lab.device), Workspace()
    out, lse = attend_latents(**given, workspace=workspace)
    few = {name: _rows(name, x, 2) for name, x in given.items()}
    with implementation("reference"):
        true, true_lse = attend_latents(**few)
    found, true = (lse[:2], true_lse) if case.values == "none" else (out[:2], true)
    error = float((found.float() - true.float()).norm() / true.float().norm())
    took = lab.clock.measure(lambda: attend_latents(**given, workspace=workspace))
    return Timing(case, took.microseconds, 1e6 * case.floor_bytes() / lab.copy_rate, error)


def _rows(name: str, x: Any, count: int) -> Any:
    shared = ("up",)  # one basis for all rows
    return x[:count] if isinstance(x, Tensor) and name not in shared else x


def arguments(case: Case, device: torch.device) -> dict[str, Any]:
    """What `attend_latents` takes."""
    s, rank = case.shape, case.rank
    generator = torch.Generator(device=device).manual_seed(0)

    def random(*size: int) -> Tensor:
        return torch.randn(size, dtype=DTYPE, device=device, generator=generator)

    latents = random(s.batch, s.context, rank)
    if case.values == "latents":  # queries that took the basis in; spread as of usual logits
        query = random(s.batch, s.heads, rank)
        own = {"up": None, "values": random(s.batch, s.context, rank), "scale": rank**-0.5}
        return {"query": query, "latents": latents, **own}
    frequency = BASE ** -(torch.arange(0, s.head_dim, 2, device=device) / s.head_dim)
    rotary = Rotary(s.head_dim, frequency=frequency)
    up = random(s.kv_heads, rank, s.head_dim) / rank**0.5
    found: dict[str, Any] = {
        "query": random(s.batch, s.heads, s.head_dim),
        "latents": latents,
        "up": paired_basis(up, rotary),
        "paired": True,
        "rotary": rotary,
        "index": _selection(case, device),
    }
    size = (s.batch, s.kv_heads, s.context, s.head_dim)
    if case.values == "8 bits":
        codes = torch.randint(-127, 128, size, dtype=torch.int8, device=device)
        scales = torch.rand(size[:3], device=device, generator=generator).half() / 64
        return found | {"values": codes, "value_scales": scales}
    return found | {"values": None if case.values == "none" else random(*size)}


def _selection(case: Case, device: torch.device) -> Tensor | None:
    """Random chunks of neighbours, [B, H, tokens]."""
    if case.reads == "all":
        return None
    s = case.shape
    heads = s.kv_heads if case.reads == "own" else 1
    scores = torch.rand(s.batch, heads, s.context // CHUNK, device=device)
    chunks = scores.topk(case.tokens // CHUNK, -1).indices.expand(s.batch, s.kv_heads, -1)
    tokens = chunks[..., None] * CHUNK + torch.arange(CHUNK, device=device)
    return tokens.flatten(-2).int()


@dataclass(frozen=True)
class Rival:
    """Packed or 16-bit attention to as many tokens."""

    name: str
    microseconds: float


def rivals(lab: Lab, shape: Shape) -> list[Rival]:
    """Keys and values in 2 and 4 bits, and torch's best 16-bit attention."""
    found = [lab.attention(pair(bits, 128, shape)) for bits in (2, 4)]
    named = [Rival(timing.case.name, timing.microseconds) for timing in found]
    took, by = lab.dense(shape)
    return [*named, Rival(f"16 bits ({by})", took)]
