"""Bench: what a search trial costs, and that it grows with the continuation, not the context."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from kvtune.bank import Sizes, build, text_tokens
from kvtune.calibrate import Say, quiet
from kvtune.measure import Bench
from kvtune.models import facts
from kvtune.recipe import Policy, Recipe
from kvtune.texts import Document

REPEATS = 5
Policies = tuple[Policy, ...]


@dataclass(frozen=True)
class TrialCost:
    """Median seconds at one context length; all of it in one run, one after the other."""

    context: int
    continuation: int
    sequences: int
    dense_pass: float  # once per text: contexts and continuations of all sequences
    first_trial: float  # its layers are encoded
    trial: float  # its layers are memoised
    dense_trial: float  # the same forward on the 16-bit cache


def trial_costs(
    model: Any,
    tokenizer: Any,
    documents: list[Document],
    recipe: Recipe,
    sizes: Sizes,
    contexts: list[int],
    say: Say = quiet,
) -> list[TrialCost]:
    """Times trials of a recipe behind contexts of several lengths.

    Raises:
        MissingInputError: too little text.
        UsageError: a context beyond the model's positions.
    """
    known = facts(model.config)
    policies, dense = recipe.policies(known), (Policy(),) * len(known.layers)
    rows = []
    for done, context in enumerate(contexts):
        say("bench", done, len(contexts))
        tokens = text_tokens(documents, tokenizer, sizes._replace(context=context), "search")
        rows.append(_cost(model, tokens, context, policies, dense))
    return rows


def _cost(
    model: Any, tokens: Tensor, context: int, policies: Policies, dense: Policies
) -> TrialCost:
    began = time.perf_counter()
    bank = build(model, tokens, context)
    spent = time.perf_counter() - began
    bench = Bench(model, bank)
    first = _seconds(lambda: bench.measure(policies))
    again = statistics.median(_seconds(lambda: bench.measure(policies)) for _ in range(REPEATS))
    base = statistics.median(_seconds(lambda: bench.measure(dense)) for _ in range(REPEATS))
    return TrialCost(context, bank.continuation, tokens.shape[0], spent, first, again, base)


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began
