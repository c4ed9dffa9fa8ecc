"""Kernels: our attention, packing and append against their byte floors and torch's attention."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from kvtune_kernels import Packed, Workspace, append, encode_into, unsupported
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from kvtune.bench.cases import Case, Goal, Row, Shape, side_bytes
from kvtune.bench.clock import ENOUGH, Clock, copy_rate
from kvtune.bench.store import DTYPE, Store, errors
from kvtune.errors import UnsupportedError

RIVALS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}


@dataclass(frozen=True)
class Timing:
    """Attention of one layer to the cache of a case."""

    case: Case
    microseconds: float
    dense_microseconds: float  # the best bf16 attention to as many tokens
    dense_by: str  # which that was
    floor_microseconds: float  # what reading the stored bytes takes at the copy rate
    error: float  # relative, against fp32 attention on the dequantised cache
    dense_error: float  # of bf16 flash attention on the same cache in bf16
    captured: bool  # timed as a CUDA graph

    @property
    def ratio(self) -> float:
        """Times faster than bf16."""
        return self.dense_microseconds / self.microseconds

    @property
    def floor_share(self) -> float:
        """How much of the time reading alone would take."""
        return self.floor_microseconds / self.microseconds

    @property
    def error_ratio(self) -> float:
        """Times the error of bf16 flash."""
        return self.error / self.dense_error

    def table(self) -> dict[str, Any]:
        """Plain values."""
        case = self.case
        shape = asdict(case.shape)
        own = {name: value for name, value in asdict(self).items() if name != "case"}
        derived = {name: getattr(self, name) for name in ("ratio", "floor_share", "error_ratio")}
        formats = {"keys": case.keys._asdict(), "values": case.values._asdict()}
        return {"name": case.name, **shape, **formats, **finite({**own, **derived})}


def finite(values: dict[str, Any]) -> dict[str, Any]:
    """The same with None for numbers that JSON does not know, which a broken kernel may give."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in values.items()
    }


class Lab:
    """Times cases on one device in one run, each of them once."""

    def __init__(self, device: torch.device, seconds: float = 0.05, copied: int = ENOUGH) -> None:
        self.device = device
        self.clock = Clock(device, seconds)
        self.copy_rate = copy_rate(self.clock, copied)  # bytes a second
        self.timings: dict[Case, Timing] = {}
        self._dense: dict[Shape, tuple[float, str]] = {}
        self._workspace = Workspace()

    @torch.no_grad()
    def attention(self, case: Case) -> Timing:
        """Times packed attention, its merge and a folded layer's turning included, and the best
        bf16 attention."""
        if case not in self.timings:
            store = Store.random(case, self.device)
            found = errors(store, store.attend(self._workspace))
            took = self.clock.measure(lambda: store.step(self._workspace))
            floor = 1e6 * case.floor_bytes() / self.copy_rate
            del store
            dense, by = self.dense(case.shape)
            self.timings[case] = Timing(
                case, took.microseconds, dense, by, floor, *found, took.captured
            )
        return self.timings[case]

    @torch.no_grad()
    def dense(self, shape: Shape) -> tuple[float, str]:
        """Microseconds of the best bf16 attention to a shape, all rows of the longest length."""
        if shape not in self._dense:
            size = (shape.batch, shape.kv_heads, shape.context, shape.head_dim)
            keys, values = (torch.randn(size, dtype=DTYPE, device=self.device) for _ in range(2))
            query = torch.randn(shape.batch, shape.heads, 1, shape.head_dim, dtype=DTYPE)
            self._dense[shape] = self._best(query.to(self.device), keys, values)
        return self._dense[shape]

    def _best(self, query: Tensor, keys: Tensor, values: Tensor) -> tuple[float, str]:
        def work() -> Tensor:
            return scaled_dot_product_attention(query, keys, values, enable_gqa=True)

        if self.device.type != "cuda":
            return self.clock.measure(work).microseconds, "torch"
        found = []
        for name, backend in RIVALS.items():
            # a backend that does not know the shape says so in warnings, then raises
            with warnings.catch_warnings(), sdpa_kernel(backend):
                warnings.simplefilter("ignore")
                try:
                    found.append((self.clock.measure(work).microseconds, name))
                except RuntimeError:
                    continue
        if not found:
            raise UnsupportedError("Neither flash nor cuDNN attention of torch runs here.")
        return min(found)

    @torch.no_grad()
    def encode(self, case: Case) -> tuple[float, float]:
        """Microseconds of packing keys and values of all tokens, and of moving the bytes alone."""
        shape, block = case.shape, case.window.block
        tokens = shape.context // block * block
        size = (shape.batch, shape.kv_heads, tokens, shape.head_dim)
        sides = [
            (
                Packed.empty(format, *size, self.device),
                torch.randn(size, dtype=DTYPE, device=self.device),
                is_keys,
            )
            for format, is_keys in ((case.keys, True), (case.values, False))
        ]

        def work() -> None:
            for packed, x, is_keys in sides:
                encode_into(packed, x, 0, is_keys)

        lines = shape.batch * shape.kv_heads
        moved = 4 * lines * tokens * shape.head_dim
        for format in (case.keys, case.values):
            moved += lines * side_bytes(format, tokens, shape.head_dim)
        return self.clock.measure(work).microseconds, 1e6 * moved / self.copy_rate

    @torch.no_grad()
    def append(self, case: Case) -> dict[str, float]:
        """Microseconds of one appended token, mean over as many steps as close one block a row.

        Also the bytes that a step allocated, and whether the steps ran as a CUDA graph.
        """
        shape, window = case.shape, case.window
        store = Store.random(case, self.device, shape.context + 2 * window.block)
        size = (shape.batch, shape.kv_heads, 1, shape.head_dim)
        key, value = (torch.randn(size, dtype=DTYPE, device=self.device) for _ in range(2))
        states = store.state.clone(), store.state.clone()
        sides = store.exact, store.keys, store.values

        def steps() -> None:
            for step in range(window.block):
                # each reads what the other wrote: a block has an even number of steps
                old, new = states[step % 2], states[1 - step % 2]
                append(key, value, *sides, old, new, window)

        def back() -> None:
            states[0].copy_(store.state)

        took = self.clock.measure(steps, back)
        back()
        held = self._allocated()
        steps()
        return {
            "microseconds": took.microseconds / window.block,
            "allocated": float(self._allocated() - held),
            "captured": float(took.captured),
        }

    def _allocated(self) -> int:
        return torch.cuda.memory_allocated(self.device) if self.device.type == "cuda" else 0


Measures = dict[str, float]


def _attention(lab: Lab, row: Row) -> Measures:
    """The worst of a row's cases; with `layers`, of their mean."""
    found = [lab.attention(case) for case in row.cases]
    weights = row.layers or (1,) * len(found)
    ours, dense = (
        sum(w * getattr(one, name) for w, one in zip(weights, found, strict=True)) / sum(weights)
        for name in ("microseconds", "dense_microseconds")
    )
    measures = {
        "microseconds": ours,
        "ratio": dense / ours if row.layers else min(one.ratio for one in found),
        "floor_share": min(one.floor_share for one in found),
        "error_ratio": max(one.error_ratio for one in found),
    }
    if row.rival:
        rival = lab.attention(row.rival).microseconds
        measures["speedup"] = min(rival / one.microseconds for one in found)
    return measures


def _encode(lab: Lab, row: Row) -> Measures:
    found = [lab.encode(case) for case in row.cases]
    multiple = max(took / floor for took, floor in found)
    return {"microseconds": max(took for took, _ in found), "floor_multiple": multiple}


def _append(lab: Lab, row: Row) -> Measures:
    found = [lab.append(case) for case in row.cases]
    worst = {name: max(one[name] for one in found) for name in ("microseconds", "allocated")}
    return {**worst, "captured": min(one["captured"] for one in found)}


def _errors(lab: Lab, row: Row) -> Measures:
    found = [lab.attention(case) for case in row.cases] or list(lab.timings.values())
    if not found:
        raise ValueError("no row with attention ran before this one")
    return {"error_ratio": max(one.error_ratio for one in found)}


MEASURES: dict[str, Callable[[Lab, Row], Measures]] = {
    "attention": _attention,
    "encode": _encode,
    "append": _append,
    "errors": _errors,
}


@dataclass(frozen=True)
class Verdict:
    """What a row of the acceptance table came to."""

    number: int
    name: str
    goals: tuple[Goal, ...]
    measured: Measures
    failed: str = ""  # why nothing was measured

    @property
    def met(self) -> bool:
        """Whether every goal is reached."""
        return not self.failed and all(goal.met(self.measured[goal.what]) for goal in self.goals)

    def table(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "measured": finite(self.measured), "met": self.met}


def judge(lab: Lab, rows: Iterable[Row]) -> Iterator[Verdict]:
    """Measures rows one after the other."""
    for row in rows:
        try:
            measured, failed = MEASURES[row.measure](lab, row), ""
        except Exception as error:
            # Triton and CUDA raise all kinds; what the other rows took must not be lost
            measured, failed = {}, f"{type(error).__name__}: {error}".splitlines()[0][:300]
        yield Verdict(row.number, row.name, row.goals, measured, failed)


def check_device() -> torch.device:
    """The GPU that kernels are timed on.

    Raises:
        UnsupportedError: there is none, or no Triton.
    """
    if not torch.cuda.is_available():
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "a CPU build"
        raise UnsupportedError(
            f"kvtune bench kernels needs a CUDA device; torch {torch.__version__}, {built}, "
            "finds none.",
            "Run it on a machine with an NVIDIA GPU, or try: kvtune bench decode --model demo",
        )
    device = torch.device("cuda", torch.cuda.current_device())
    if reason := unsupported(128, DTYPE, device):
        raise UnsupportedError(f"Kernels do not run here: {reason}.", "Run: kvtune doctor")
    return device
