"""How long a run may take, from the model's size and one matrix product on this machine."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from kvtune.cli.options import Text

POINTS, STEPS = 9, 32  # recipes that are proved, and the tokens of each proof
CANDIDATES = 30  # recipes of the study that are measured on held-out text
SHARE = 0.3  # of the product's speed that a whole model reaches
PER_CELL = 5e-8  # seconds per context token and cache value of encoding one cell, on a CPU
PER_STEP = 0.002  # seconds of one layer in one generated token, whatever its size


@dataclass(frozen=True)
class Work:
    """What a verb does."""

    text: Text
    continuation: int
    cells: int
    trials: int
    exact: bool


def seconds(config: Any, device: str, work: Work) -> float:
    """A rough time: forward and backward passes, encoding of cells, and steps of generation."""
    count, context = work.text.sequences, work.text.context
    whole, part = count * (context + work.continuation), count * work.continuation
    passes = whole + 3 * part if work.cells else 0
    passes += work.cells * part if work.exact else 0
    if work.trials:
        proofs = POINTS * count * (context + STEPS)
        passes += 2 * whole + (work.trials + CANDIDATES) * part + proofs
    layers = config.get_text_config(decoder=True).num_hidden_layers
    steps = POINTS * STEPS * layers * PER_STEP if work.trials else 0.0
    values = _values(config) * count * context
    return (
        passes * 2 * _parameters(config) / _speed(device) + work.cells * values * PER_CELL + steps
    )


def _values(config: Any) -> int:
    """Cached values of one layer's keys per token."""
    from kvtune.models import facts

    first = facts(config).layers[0]
    return first.kv_heads * first.head_dim


def _parameters(config: Any) -> int:
    """The model's size, from its shape: no weight is allocated."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return sum(weight.numel() for weight in model.parameters())


def _speed(device: str) -> float:
    """Operations per second that a model may reach on the device."""
    import torch

    from kvtune.models import pick_device, pick_dtype

    place = pick_device(device)
    x = torch.ones(1024, 1024, device=place, dtype=pick_dtype("auto", place))
    best = float("inf")
    for _ in range(4):  # the first one starts threads and loads kernels
        began = time.perf_counter()
        (x @ x).sum().item()
        best = min(best, time.perf_counter() - began)
    return SHARE * 2 * 1024**3 / best
