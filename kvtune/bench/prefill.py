"""Bench: the most memory that a prompt takes which is read in chunks, beside the 16-bit cache."""

from __future__ import annotations

import ctypes
import gc
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from kvtune.cache import load
from kvtune.placement import input_device
from kvtune.recipe import Recipe

EVERY = 0.002  # seconds between two looks at a process's memory
DENSE = "the model's own cache"


@dataclass(frozen=True)
class Row:
    """What reading one prompt took."""

    name: str
    peak: int  # bytes beyond those of the model, at most
    held: int  # bytes of the cache afterwards
    seconds: float


def rows(
    model: Any, tokens: Tensor, chunk: int, recipes: Sequence[tuple[str, Recipe]]
) -> list[Row]:
    """Reads tokens [1, T] in chunks: into the model's own cache, and into one of each recipe."""
    found = [_row(DENSE, model, tokens, chunk, lambda: DynamicCache(config=model.config))]
    for name, recipe in recipes:
        made = load(recipe, model, force=True)  # what it keeps beside layers is the model's
        found.append(_row(name, model, tokens, chunk, made.fresh))
    return found


@torch.no_grad()
def _row(name: str, model: Any, tokens: Tensor, chunk: int, make: Callable[[], Any]) -> Row:
    device = input_device(model)
    read = tokens.to(device)
    model(read[:, :chunk], past_key_values=make(), logits_to_keep=1)  # what is made once is made
    cache = make()
    with Watch(device) as watch:
        began = time.perf_counter()
        for piece in read.split(chunk, 1):
            model(piece, past_key_values=cache, logits_to_keep=1)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - began
    return Row(name, watch.peak, _held(cache), seconds)


def _held(cache: Any) -> int:
    if hasattr(cache, "nbytes"):
        return int(cache.nbytes)
    held = [x for layer in cache.layers for x in (layer.keys, layer.values)]
    return sum(x.untyped_storage().nbytes() for x in held)


class Watch:
    """The most memory that is taken meanwhile, beyond what was: of a GPU's allocator, or of the
    process, looked at again and again."""

    def __init__(self, device: torch.device) -> None:
        self._device, self.peak = device, 0
        self._stop = threading.Event()

    def __enter__(self) -> Watch:
        _let_go()
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)
            self._before = torch.cuda.memory_allocated(self._device)
        else:
            self._before = _resident()
            self._thread = threading.Thread(target=self._look, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._device.type == "cuda":
            self.peak = torch.cuda.max_memory_allocated(self._device) - self._before
            return
        self._stop.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._stop.is_set():
            self.peak = max(self.peak, _resident() - self._before)
            self._stop.wait(EVERY)


def _let_go() -> None:
    """Gives back what was freed, so that it does not count as taken before."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # only glibc has it
    if trim is not None:
        trim(0)


def _resident() -> int:
    """Bytes of this process that are in memory."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * 4096
