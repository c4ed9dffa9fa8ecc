"""Scaling: how the time of calibration and search grows with layers and with context."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from kvtune.calibrate import Say, quiet
from kvtune.models import facts
from kvtune.publish import Settings, Texts
from kvtune.recipe import Recipe
from kvtune.search import Limits
from kvtune.tune import Tuner


@dataclass(frozen=True)
class Cost:
    """Seconds of both stages for one depth and context: of the process where a CPU works, which
    other programs do not lengthen, else of the wall clock."""

    layers: int
    context: int
    calibrate: float
    search: float
    trials: int


def costs(
    model: Any,
    tokenizer: Any,
    texts: Texts,
    template: Recipe,
    settings: Settings,
    depths: Iterable[int],
    contexts: Sequence[int],
    trials: int,
    say: Say = quiet,
) -> list[Cost]:
    """Calibrates and searches the model's first layers behind contexts of several lengths.

    Every search measures as many trials, so the times compare.

    Raises:
        UsageError: a context beyond the model's positions.
        MissingInputError: too little text.
    """
    found = []
    for depth in depths:
        part = first_layers(model, depth)
        for context in contexts:
            say(f"{depth} layers, {context:,} tokens", 0, 1)
            own = replace(settings, sizes=settings.sizes._replace(context=context))
            found.append(_cost(part, tokenizer, texts, template, own, trials))
            say(f"{depth} layers, {context:,} tokens", 1, 1)
    return found


def _cost(
    model: Any, tokenizer: Any, texts: Texts, template: Recipe, settings: Settings, trials: int
) -> Cost:
    with tempfile.TemporaryDirectory() as place:
        limits = Limits(str(Path(place) / "study.db"), trials)
        tuner = Tuner(
            model, tokenizer, texts, template, Path(place), settings=settings, limits=limits
        )
        clock = time.process_time if model.device.type == "cpu" else time.perf_counter
        began = clock()
        profile = tuner.profile()
        middle = clock()
        rows = tuner.search(profile)
        spent = clock() - middle
    depth = len(facts(model.config).layers)
    return Cost(depth, settings.sizes.context, middle - began, spent, len(rows))


def first_layers(model: Any, count: int) -> Any:
    """A model of the first layers alone, sharing their weights."""
    config = type(model.config).from_dict(model.config.to_dict())
    whole = config.num_hidden_layers
    config.num_hidden_layers = count
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:count]
    if count > whole:
        raise ValueError(f"{count} layers of {whole}")
    part = type(model)._from_config(config, dtype=model.dtype).to(model.device)
    part.load_state_dict(model.state_dict(), strict=False, assign=True)
    part.tie_weights()
    return part.eval().requires_grad_(False)


def exponents(found: Sequence[Cost], stage: str) -> tuple[float, float]:
    """The powers of layers and of context in a stage's time: a plane fitted to logarithms.

    A fixed part (start, sampler, head of the model) makes them smaller than 1.
    """
    rows = [[1.0, math.log(cost.layers), math.log(cost.context)] for cost in found]
    times = [math.log(getattr(cost, stage)) for cost in found]
    plane = np.linalg.lstsq(np.array(rows), np.array(times), rcond=None)[0]
    return float(plane[1]), float(plane[2])
