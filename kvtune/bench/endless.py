"""Bench: text without end behind caches of a set size: what is lost, held and spent on the way."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import LogitsProcessor, LogitsProcessorList

from kvtune.calibrate import Say, quiet
from kvtune.errors import UsageError
from kvtune.recipe import LayerPolicy, Recipe


@dataclass(frozen=True)
class Stretch:
    """Some tokens in a row that a cache has read, or a model has said with it."""

    cache: str
    does: str  # "reads" or "says"
    tokens: int  # up to here
    nll: float | None  # of each of its tokens, in nats, on average; None of what is said
    finite: bool  # no logit was NaN or infinite
    bytes: int  # that the cache holds at its end
    allocated: int | None  # bytes of all tensors on the GPU at its end
    seconds: float  # per token


def budgeted(recipe: Recipe, budget: int) -> Recipe:
    """The same recipe, whose layers hold so many tokens each.

    Raises:
        UsageError: a layer that holds all tokens.
    """
    if not recipe.layers or any(entry.select is None for entry in recipe.layers):
        raise UsageError(
            f"{recipe.name or 'The recipe'} holds all tokens of some layers, and endless text has "
            "no end of them.",
            "Give --recipes lacache, or a recipe with `select` in all its layers.",
        )
    layers = tuple(_budgeted(entry, budget) for entry in recipe.layers)
    return recipe.model_copy(update={"layers": layers})


def _budgeted(entry: LayerPolicy, budget: int) -> LayerPolicy:
    select = {name: x for name, x in (entry.select or {}).items() if name != "share"}
    return LayerPolicy.model_validate({**dict(entry), "select": {**select, "budget": budget}})


def held(cache: Any) -> int:
    """Bytes that a cache holds, of ours or of transformers' own."""
    if (own := getattr(cache, "nbytes", None)) is not None:
        return int(own)
    pairs = [(layer.keys, layer.values) for layer in cache.layers if layer.is_initialized]
    return sum(x.untyped_storage().nbytes() for pair in pairs for x in pair)


class Watch:
    """Cuts what a cache sees into stretches of so many tokens."""

    def __init__(self, name: str, does: str, cache: Any, device: torch.device, size: int) -> None:
        self.name, self.does, self.size = name, does, size
        self.found: list[Stretch] = []
        self._cache, self._device = cache, device
        self._tokens, self._start = 0, 0
        self._loss, self._odd = 0.0, torch.zeros((), dtype=torch.bool, device=device)
        self._began = time.perf_counter()

    def saw(self, tokens: int, odd: Tensor, loss: float | None = None) -> None:
        """Takes note of some tokens more: whether a logit was odd, and their loss in all."""
        self._tokens += tokens
        self._odd = self._odd | odd
        self._loss += loss or 0.0
        if self._tokens - self._start >= self.size:
            self.end()

    def end(self) -> None:
        """Ends a stretch, if it has tokens."""
        count = self._tokens - self._start
        if not count:
            return
        odd, on_gpu = bool(self._odd), self._device.type == "cuda"  # waits for the device
        now = time.perf_counter()
        nll = self._loss / count if self.does == "reads" else None
        self.found.append(
            Stretch(
                self.name,
                self.does,
                self._tokens,
                nll,
                not odd,
                held(self._cache),
                torch.cuda.memory_allocated(self._device) if on_gpu else None,
                (now - self._began) / count,
            )
        )
        self._start, self._loss = self._tokens, 0.0
        self._odd = torch.zeros_like(self._odd)
        self._began = time.perf_counter()


@torch.no_grad()
def read_on(
    model: Any, cache: Any, name: str, tokens: Tensor, size: int, chunk: int, say: Say = quiet
) -> list[Stretch]:
    """Reads tokens [1, N + 1] in chunks, each token predicted by those before it."""
    watch, count = Watch(name, "reads", cache, tokens.device, size), tokens.shape[1] - 1
    for start, end in _chunks(count, size, chunk):
        logits = model(tokens[:, start:end], past_key_values=cache).logits[0].float()
        loss = cross_entropy(logits, tokens[0, start + 1 : end + 1], reduction="sum")
        watch.saw(end - start, ~logits.isfinite().all(), float(loss))
        say(f"{name} reads", end, count)
    watch.end()
    return watch.found


def _chunks(count: int, size: int, chunk: int) -> Iterator[tuple[int, int]]:
    """Pieces of a text that never reach over the end of a stretch."""
    start = 0
    while start < count:
        end = min(start + chunk, count, (start // size + 1) * size)
        yield start, end
        start = end


class _Listener(LogitsProcessor):
    """Sees the logits of every step of `generate`, and leaves them as they are."""

    def __init__(self, watch: Watch, count: int, say: Say) -> None:
        self._watch, self._count, self._say, self._done = watch, count, say, 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Takes note of one token; a forbidden one is -inf, so only NaN is odd."""
        self._done += 1
        self._watch.saw(1, scores.isnan().any())
        self._say(f"{self._watch.name} says", self._done, self._count)
        return scores


@torch.no_grad()
def say_on(
    model: Any, cache: Any, name: str, prompt: Tensor, count: int, size: int, say: Say = quiet
) -> list[Stretch]:
    """Lets `generate` say so many tokens after a prompt [1, T], the likeliest each time."""
    watch = Watch(name, "says", cache, prompt.device, size)
    model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        past_key_values=cache,
        min_new_tokens=count,
        max_new_tokens=count,
        do_sample=False,
        pad_token_id=0,
        logits_processor=LogitsProcessorList([_Listener(watch, count, say)]),
    )
    watch.end()
    return watch.found
