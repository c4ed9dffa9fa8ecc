"""Codecs: what compositions cost in KL at equal true bytes, and what each part of them is worth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from kvtune.bank import Sizes, build, text_tokens
from kvtune.bench.compositions import RECENT, SINKS, Row, spread
from kvtune.biased import biased
from kvtune.calibrate import Say, calibrate, find_ropes, quiet
from kvtune.fit import Fitter
from kvtune.measure import Bench
from kvtune.parts import Table
from kvtune.policy import LayerPolicy, Tier
from kvtune.recipe import Recipe
from kvtune.texts import Document

CALIBRATED = Sizes()  # the text that fits are made of: as `kvtune calibrate` takes it
PLAIN: Table = {"use": "affine", "bits": 8, "group": "head", "axis": "token"}
# a fit wants moments, not prices: one setting is the least that calibration prices
TEMPLATE = Recipe(
    layers=(
        LayerPolicy(
            span="all", sinks=SINKS, recent=(RECENT,), kept=Tier(keys=(PLAIN,), values=(PLAIN,))
        ),
    )
)
Texts = dict[str, list[Document]]


@dataclass(frozen=True, eq=False)
class Subject:
    """A model that was calibrated, and its bank on held-out text."""

    bench: Bench
    perplexity: float  # of the dense model, on the continuations


@dataclass(frozen=True)
class Cost:
    """What a row costs: KL in nats and flips, means over all positions; and the KL in parts of that
    of the whole composition."""

    kl: float
    flips: float
    ratio: float


def subject(
    model: Any, tokenizer: Any, texts: Texts, sizes: Sizes, seed: int = 0, say: Say = quiet
) -> Subject:
    """Calibrates a model, and runs it over held-out text.

    Raises:
        MissingInputError: too little text.
        UsageError: a context beyond the model's positions.
    """
    profile = calibrate(
        model,
        tokenizer,
        texts["calibrate"],
        TEMPLATE,
        sizes=_calibrated(sizes),
        seed=seed,
        say=say,
    )
    say("held-out text", 0, 1)
    tokens = text_tokens(texts["proof"], tokenizer, sizes, "proof")
    bank = build(model, tokens, sizes.context)
    say("held-out text", 1, 1)
    # the whole next-token distribution is in the bank already
    nll = -bank.logp.gather(-1, bank.targets[..., None]).double().mean()
    bench = Bench(model, bank, find_ropes(model), Fitter(profile).layer)
    return Subject(bench, float(nll.exp()))


def _calibrated(sizes: Sizes) -> Sizes:
    """Never more text than is measured on, so that a tiny run is a tiny run."""
    return Sizes(
        *map(min, zip(CALIBRATED, sizes._replace(sequences=CALIBRATED.sequences), strict=True))
    )


def with_biases(model: Any, tokenizer: Any, texts: Texts, sizes: Sizes) -> Any:
    """A copy of a model with large key biases, measured on one sequence of calibration text."""
    own = Sizes(1, min(CALIBRATED.context, sizes.context), 0)
    tokens: Tensor = text_tokens(texts["calibrate"], tokenizer, own, "calibrate")
    return biased(model, tokens)


def measure(subject: Subject, rows: Sequence[Row], say: Say = quiet, stage: str = "") -> list[Cost]:
    """Measures every row, in order; the first of a family is its whole composition."""
    costs: list[Cost] = []
    whole = 0.0
    for row in rows:
        policies = spread(row.policy, subject.bench.bank.facts)
        means = subject.bench.measure(policies).means()
        if not row.without:
            whole = means["kl"]
        costs.append(Cost(means["kl"], means["flips"], means["kl"] / max(whole, 1e-12)))
        say(stage or "compositions", len(costs), len(rows))
    return costs
