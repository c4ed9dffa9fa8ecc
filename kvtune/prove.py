"""Prove: a recipe's quality on held-out text by real
generation, with bootstrap confidence intervals."""

from __future__ import annotations

import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor
from transformers.cache_utils import Cache

from kvtune import recipe as recipes
from kvtune.bank import Bank, Sizes, build, text_tokens
from kvtune.cache import Weight, load, weigh
from kvtune.measure import Quality, compare
from kvtune.models import facts
from kvtune.prefill import Draft, asks, read
from kvtune.recipe import Recipe
from kvtune.saving import check_saves
from kvtune.texts import Document

RESAMPLES = 2000


class Forced(LogitsProcessor):
    """Notes how far each step's logits are from the dense
    model's, and lets the held-out text go on behind so many tokens of context."""

    def __init__(self, bank: Bank, context: int) -> None:
        self._bank, self._context = bank, context
        self.steps: list[Quality] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Takes the logits [N, V] after input_ids [N, T]; returns
        logits that force the text's next token."""
        step = (
            input_ids.shape[1] - self._context
        )  # the prompt's own logits, at step 0, are dense by definition
        if step > 0:
            at = slice(step - 1, step)
            self.steps.append(
                compare(self._bank.logp[:, at], scores[:, None], self._bank.targets[:, at])
            )
        forced = torch.full_like(scores, float("-inf"))
        return forced.scatter(1, self._bank.tokens[:, self._bank.context + step, None], 0.0)


@torch.no_grad()
def by_generation(
    model: Any, cache: Cache, bank: Bank, steps: int, context: Tensor | None = None
) -> Quality:
    """Runs `model.generate` with the cache: prefills the bank's contexts, then `steps` tokens.

    A prompt sees itself exactly under every recipe, so a cache that already holds the contexts
    (`Bench.cache`) saves its forward; generation then goes straight on, one token after the other.
    Where these were cut to tokens [N, S], give them as `context`.

    Returns the quality at each of these positions [N, steps], against the same dense
    log-probabilities as a trial.
    """
    steps = min(steps, bank.continuation)
    held = bank.tokens[:, : bank.context] if context is None else context
    forced = Forced(bank, held.shape[1])
    first = 0 if cache.get_seq_length() == 0 else 1  # generate wants at least one new token
    config = GenerationConfig(
        max_new_tokens=steps + 1 - first, do_sample=False, pad_token_id=0, use_cache=True
    )
    prompt = torch.cat([held, bank.tokens[:, bank.context : bank.context + first]], 1)
    model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        generation_config=config,
        logits_processor=[forced],
        past_key_values=cache,
    )
    columns = zip(*((step.kl, step.flips, step.dnll) for step in forced.steps), strict=True)
    return Quality(*(torch.cat(column, 1) for column in columns))


def interval(values: Tensor, seed: int = 0) -> tuple[float, float]:
    """95 % bootstrap interval of the mean of values [N, M]; whole sequences are resampled.

    Positions of one sequence are correlated, so resampling them one by one would claim too much.
    """
    rows = values.double().mean(1)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(rows), (RESAMPLES, len(rows)), generator=generator)
    means = rows[drawn].mean(1)
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


@dataclass(frozen=True)
class Proof:
    """What was measured on held-out text, as it stands in a recipe."""

    kl: float
    kl_low: float
    kl_high: float
    flips: float
    flips_low: float
    flips_high: float
    dnll: float
    positions: int
    context: int
    bytes: int
    bytes_context: int
    batch: int
    ratio: float
    bits: float
    payload_bits: float
    rows: tuple[tuple[float, float], ...] = ()  # mean KL and flips of each sequence

    @classmethod
    def of(
        cls, quality: Quality, weight: Weight, context: int, bytes_context: int, batch: int
    ) -> Proof:
        """Sums up a quality and a weight."""
        means = quality.means()
        kl_low, kl_high = interval(quality.kl)
        flips_low, flips_high = interval(quality.flips)
        return cls(
            means["kl"],
            kl_low,
            kl_high,
            means["flips"],
            flips_low,
            flips_high,
            means["dnll"],
            quality.kl.numel(),
            context,
            weight.bytes,
            bytes_context,
            batch,
            weight.ratio,
            weight.bits,
            weight.payload_bits,
            tuple(zip(_row_means(quality.kl), _row_means(quality.flips), strict=True)),
        )

    def table(self) -> dict[str, Any]:
        """Plain values, rounded to what they can mean; without `rows`."""
        return {name: _rounded(value) for name, value in asdict(self).items() if name != "rows"}


def _row_means(values: Tensor) -> list[float]:
    means: list[float] = values.double().mean(1).tolist()
    return means


def _rounded(value: float) -> float:
    return value if isinstance(value, int) else float(f"{value:.6g}")


def environment(device: torch.device) -> dict[str, str]:
    """Device and versions, for evidence."""
    import transformers

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "device": f"{device.type} {name}",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def prove(
    model: Any,
    tokenizer: Any,
    documents: list[Document],
    recipe: Recipe | Path | str,
    *,
    sizes: Sizes,
    steps: int,
    bytes_context: int,
    batch: int = 1,
    force: bool = False,
    draft: Draft | None = None,
) -> Proof:
    """Measures one recipe by generation on documents, `steps` tokens behind each of the contexts;
    `draft` is a small model, for a recipe that looks ahead or cuts prompts.

    Raises:
        IntegrityError: the recipe is of another model, unless forced.
        MissingInputError: too little text.
        UsageError: settings that do not fit the model, a context beyond its positions, or one at
        which a prompt's own basis saves no bytes.
    """
    cache = load(recipe, model, force)
    known = facts(model.config)
    policies = (recipe if isinstance(recipe, Recipe) else recipes.load(Path(recipe))).policies(
        known
    )
    check_saves(policies, known, min(sizes.context, bytes_context))
    tokens = text_tokens(documents, tokenizer, sizes._replace(continuation=steps), "proof")
    bank = build(model, tokens, sizes.context)
    context = None
    if asks(cache):
        tokens = bank.tokens[:, : bank.context]
        context = read(model, cache, tokens, tokenizer=tokenizer, draft=draft)
    quality = by_generation(model, cache, bank, steps, context)
    weight = weigh(policies, known, bytes_context, batch)
    if cache.shortener and cache.shortener.budget < bytes_context:
        read_at_most = weigh(policies, known, cache.shortener.budget, batch)
        weight = weight._replace(bytes=read_at_most.bytes)  # against a dense prompt, read whole
    return Proof.of(quality, weight, sizes.context, bytes_context, batch)
