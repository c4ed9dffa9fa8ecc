"""Decode: tokens a second and memory of `generate`, on a compressed cache and on a 16-bit one."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig

from kvtune.bench.cases import Goal
from kvtune.cache import load, weigh
from kvtune.errors import ResourceError, UnsupportedError
from kvtune.models import Facts, facts
from kvtune.policy import Policy
from kvtune.recipe import Recipe, loads
from kvtune.view import Observed

COMPRESSED, DENSE = "compressed", "dense"
LARGEST = 0  # stands for the batch that fits
WARM, REPEATS = 4, 3  # steps before the clock starts, and runs of which the median counts
FIRST_TOKEN = 10  # lower ones have a meaning of their own

USUAL = """kvtune = 1
name = "k4v4"
[[layers]]
span = "all"
sinks = 4
recent = 64
kept.keys = [{ use = "affine", bits = 4, group = 128, axis = "channel" }]
kept.values = [{ use = "affine", bits = 4, group = "head", axis = "token" }]
"""

# row 12 of the acceptance table of issue 3
GOALS = (Goal("batch_ratio", 3), Goal("speed_ratio_largest", 2.5), Goal("speed_ratio_one", 1))


def usual_recipe() -> Recipe:
    """4 bits: keys in groups of 128 tokens per channel, values of a whole head per token."""
    return loads(USUAL, "the recipe of bench decode")


def llama_8b() -> LlamaConfig:
    """The shape of Llama-3.1-8B."""
    return LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=128256,
        max_position_embeddings=131072,
        bos_token_id=1,
        eos_token_id=2,
    )


def random_model(config: Any, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> Any:
    """A model with random weights, made on the device itself, where 8B take seconds."""
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    return model.eval().requires_grad_(False)


@dataclass(frozen=True)
class Run:
    """Decoding on one cache at one batch."""

    cache: str  # "compressed" or "dense"
    largest: bool  # the batch is the largest that fits
    batch: int
    context: int
    steps: int
    tokens_per_second: float  # of all rows, the median of the runs
    peak_bytes: int | None  # of the whole process on the GPU, weights included, while decoding
    cache_bytes: int  # by `weigh`, behind the context


class Decoding:
    """Decodes behind a random context with one model and one recipe."""

    def __init__(self, model: Any, recipe: Recipe, context: int, steps: int) -> None:
        self.model, self.recipe, self.context, self.steps = model, recipe, context, steps
        self.facts: Facts = facts(model.config)
        weight = weigh(recipe.policies(self.facts), self.facts, context)
        wide = torch.finfo(model.dtype).bits // 16  # `weigh` counts 16-bit caches
        self._row = {COMPRESSED: weight.bytes, DENSE: weight.dense_bytes * wide}
        self._on_gpu = model.device.type == "cuda"

    @torch.no_grad()
    def run(self, kind: str, batch: int, largest: bool = False) -> Run:
        """Decodes `batch` rows on a cache of a kind."""
        release()
        cache = self._filled(kind, batch)
        if self._on_gpu:
            torch.cuda.reset_peak_memory_stats()
        size = (batch, self.context + 1)
        vocab = self.facts.vocab
        tokens = torch.randint(min(FIRST_TOKEN, vocab - 1), vocab, size, device=self.model.device)
        tokens = self._generated(tokens, cache, WARM)
        spans = []
        for _ in range(REPEATS):
            began = self._now()
            tokens = self._generated(tokens, cache, self.steps)
            spans.append(self._now() - began)
        rate = batch * self.steps / statistics.median(spans)
        peak = torch.cuda.max_memory_allocated() if self._on_gpu else None
        return Run(
            kind, largest, batch, self.context, self.steps, rate, peak, batch * self._row[kind]
        )

    def largest(self, kind: str) -> Run:
        """Decodes the largest batch that fits the GPU.

        Raises:
            ResourceError: not even one row fits.
        """
        for batch in self._candidates(kind):
            if (found := self._attempt(kind, batch)) is not None:
                return found
        raise ResourceError(
            f"One row of {self.context:,} tokens does not fit the GPU.", "Give a smaller --context."
        )

    def _candidates(self, kind: str) -> Iterator[int]:
        """From what free memory could hold if nothing else were needed, down to 1."""
        release()
        free, _ = torch.cuda.mem_get_info()
        batch = max(1, free // self._row[kind])
        while batch:
            yield batch
            batch -= max(1, batch // 32)

    def _attempt(self, kind: str, batch: int) -> Run | None:
        try:
            return self.run(kind, batch, largest=True)
        except RuntimeError as error:
            if not exhausted(error):
                raise
            return None  # the next run clears up: here the traceback still holds the tensors

    def _filled(self, kind: str, batch: int) -> Any:
        """A cache that holds a random context. All rows hold the same one: each stores it for
        itself, but the 16-bit original takes the memory of one row of one layer."""
        if kind == COMPRESSED:
            cache: Any = load(self.recipe, self.model)
        else:
            self.model.set_attn_implementation("sdpa")
            cache = DynamicCache(config=self.model.config)
        for index, layer in enumerate(self.facts.layers):
            size = (1, layer.kv_heads, self.context, layer.head_dim)
            keys, values = (self._drawn(size).expand(batch, -1, -1, -1) for _ in range(2))
            if hasattr(cache.layers[index], "fill"):
                policy = cache.policies[index]
                observed = self._observed(policy, keys, layer.query_heads)
                cache.layers[index].fill(keys, values, observed)
            else:
                cache.update(keys, values, index)
        return cache

    def _observed(self, policy: Policy, keys: Tensor, query_heads: int) -> Observed | None:
        """What a selector is told of a random context [B, H, T, D]: queries and attention that say
        nothing, so it keeps as many tokens as ever, anywhere.

        Raises:
            UnsupportedError: it wants to know more, of a draft model or of the text itself.
        """
        if policy.select is None:
            return None
        needs, (batch, heads, count, dim) = policy.needs, keys.shape
        if odd := sorted(needs & {"ahead", "kinds"}):
            raise UnsupportedError(
                f"{policy.select.name()} needs {odd[0]}, which a random context does not have.",
                "Give a recipe with another selector.",
            )
        found = Observed()
        if needs & {"attention", "replay"}:
            got = torch.rand(1, heads, count, device=keys.device)
            found = found._replace(attention=got.expand(batch, -1, -1))
        if "queries" in needs:
            size = (1, query_heads, min(count, policy.observed), dim)
            found = found._replace(queries=self._drawn(size).expand(batch, -1, -1, -1))
        return found

    def _drawn(self, size: tuple[int, ...]) -> Tensor:
        return torch.randn(size, dtype=self.model.dtype, device=self.model.device)

    def _generated(self, tokens: Tensor, cache: Any, steps: int) -> Tensor:
        """Goes on from tokens [B, T], the last of which the cache has not seen."""
        found: Tensor = self.model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            past_key_values=cache,
            max_new_tokens=steps,
            min_new_tokens=steps,
            do_sample=False,
        )
        return found

    def _now(self) -> float:
        if self._on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter()


def exhausted(error: RuntimeError) -> bool:
    """Whether memory ran out; libraries below torch have words of their own for it."""
    words = str(error).lower()
    known = ("out of memory", "alloc_failed")
    return isinstance(error, torch.OutOfMemoryError) or any(word in words for word in known)


def release() -> None:
    """Gives memory that nobody uses any more back to the GPU."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def compare(decoding: Decoding, batches: list[int], say: Any) -> list[Run]:
    """Decodes on both caches at every batch; LARGEST is the batch that fits each."""
    own = decoding.model.config._attn_implementation
    wanted = [(batch, kind) for batch in batches for kind in (DENSE, COMPRESSED)]
    runs = []
    try:
        for done, (batch, kind) in enumerate(wanted):
            say("decode", done, len(wanted))
            found = decoding.run(kind, batch) if batch else decoding.largest(kind)
            runs.append(found)
        say("decode", len(wanted), len(wanted))
    finally:
        decoding.model.set_attn_implementation(own)
    return runs


def verdict(runs: list[Run]) -> dict[str, Any]:
    """How the compressed cache compares: ratios, and the goals that they were measured for."""
    sides = {(run.cache, _label(run)): run for run in runs}
    ratios = {}
    for (kind, label), ours in sides.items():
        dense = sides.get((DENSE, label))
        if kind == DENSE or dense is None:
            continue
        ratios[f"speed_ratio_{label}"] = ours.tokens_per_second / dense.tokens_per_second
        if ours.largest:
            ratios["batch_ratio"] = ours.batch / dense.batch
    goals = [
        {**asdict(goal), "value": ratios[goal.what], "met": goal.met(ratios[goal.what])}
        for goal in GOALS
        if goal.what in ratios
    ]
    return {"ratios": ratios, "goals": goals}


def _label(run: Run) -> str:
    return "largest" if run.largest else "one" if run.batch == 1 else str(run.batch)
