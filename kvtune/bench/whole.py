"""Whole: the wall time of each stage of a tuning run, and the most memory it took."""

from __future__ import annotations

import resource
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kvtune.tune import Tuner

FIRST_TOKEN = 10  # lower ones have a meaning of their own


class ByteTokenizer:
    """A token for each byte: text for models of random weights, which come without a tokenizer."""

    def __call__(self, text: list[str], **options: Any) -> Mapping[str, Sequence[Sequence[int]]]:
        """Returns `input_ids`, one list for each text."""
        return {"input_ids": [[FIRST_TOKEN + byte for byte in one.encode()] for one in text]}


@dataclass(frozen=True)
class Whole:
    """One run: seconds of each stage, their sum, the peak, and how many points were proved."""

    stages: dict[str, float]
    seconds: float
    peak_bytes: int  # allocated on the GPU; elsewhere resident
    points: int
    trials: int


def whole(tuner: Tuner) -> Whole:
    """Runs all stages in the tuner's folder, which holds nothing yet."""
    device = tuner.model.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    summary = tuner.run() or {}
    stages: dict[str, float] = summary["stages"]
    points, trials = len(summary["points"]), summary["search"]["trials"]
    return Whole(stages, sum(stages.values()), _peak(device), points, trials)


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
