"""Basis: what a prompt's own low-rank bases cost beside the prefill that they follow."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kvtune import spectral

GOAL = 0.05  # of the prefill
CHUNK = 8192  # tokens of a prefill that run at once
FIRST_TOKEN = 10  # lower ones have a meaning of their own


@dataclass(frozen=True)
class Shape:
    """Groups of layers whose kv heads share a basis (xKV, arXiv:2503.18893)."""

    layers: int = 32
    group: int = 4
    width: int = 1024  # numbers of a token in one layer's keys
    key_rank: int = 384
    value_rank: int = 576
    tokens: int = 32768

    @property
    def groups(self) -> int:
        """How many groups there are; the last may be smaller, and is counted as a whole one."""
        return -(-self.layers // self.group)


@dataclass(frozen=True)
class Cost:
    """Seconds of all groups' keys and values."""

    gram: float
    top: float
    project: float
    prefill: float
    kept: float  # of what eigenvectors keep, the least of keys and values

    @property
    def seconds(self) -> float:
        """Of the bases, projection included."""
        return self.gram + self.top + self.project

    @property
    def share(self) -> float:
        """Of the prefill."""
        return self.seconds / self.prefill

    def table(self) -> dict[str, Any]:
        """Plain values."""
        met = self.share <= GOAL
        return {**asdict(self), "seconds": self.seconds, "share": self.share, "met": met}


def measure(model: Any, shape: Shape, say: Callable[..., None], repeats: int = 3) -> Cost:
    """Times both on the model's device, one after the other; medians of some repeats."""
    device = model.device
    say("prefill", 0, 2)
    prefill = _seconds(lambda: _prefill(model, shape.tokens), device, repeats)
    say("prefill", 1, 2)
    spent = {"gram": 0.0, "top": 0.0, "project": 0.0}
    kept = 1.0
    for rank, slope in ((shape.key_rank, 1.0), (shape.value_rank, 0.5)):
        x = prompt(shape, slope, device, model.dtype)
        gram = spectral.gram(x)
        basis = spectral.top(gram, rank)
        narrow = basis.to(x.dtype)
        work: dict[str, Callable[[], object]] = {
            "gram": partial(spectral.gram, x),
            "top": partial(spectral.top, gram, rank),
            "project": partial(torch.matmul, x, narrow),
        }
        for name, call in work.items():
            spent[name] += shape.groups * _seconds(call, device, repeats)
        best = torch.linalg.eigvalsh(gram)[0, -rank:].sum()
        kept = min(kept, float((basis[0] * (gram[0] @ basis[0])).sum() / best))
    say("prefill", 2, 2)
    return Cost(**spent, prefill=prefill, kept=kept)


def prompt(shape: Shape, slope: float, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Random tokens [1, T, w] of a group: directions i are as strong as i^-slope."""
    width = shape.group * shape.width
    generator = torch.Generator(device=device).manual_seed(0)
    strengths = torch.arange(1, width + 1, device=device) ** -(slope / 2)
    x = torch.randn(shape.tokens, width, device=device, generator=generator) * strengths
    turn = torch.randn(width, width, device=device, generator=generator) / width**0.5
    found: Tensor = (x @ turn).to(dtype)[None]
    return found


@torch.no_grad()
def _prefill(model: Any, tokens: int) -> None:
    from transformers import DynamicCache

    high = model.config.vocab_size
    prompt = torch.randint(FIRST_TOKEN, high, (1, tokens), device=model.device)
    cache = DynamicCache(config=model.config)
    for piece in prompt.split(CHUNK, 1):
        model(piece, past_key_values=cache, use_cache=True, logits_to_keep=1)


def _seconds(work: Callable[[], object], device: torch.device, repeats: int) -> float:
    """The median of some runs behind one that warms up."""
    spent = []
    for _ in range(repeats + 1):
        _wait(device)
        began = time.perf_counter()
        work()
        _wait(device)
        spent.append(time.perf_counter() - began)
    return statistics.median(spent[1:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
