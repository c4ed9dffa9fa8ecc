"""Retrieval: which query heads look at a fact in the context while the model tells it."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache

from kvtune import task as tasks
from kvtune.attention import NAME
from kvtune.errors import UsageError
from kvtune.models import facts
from kvtune.placement import input_device
from kvtune.task import Item
from kvtune.view import Spot, View, looked
from kvtune.watched import Sight, going_on

ROW = "retrieval.scores"  # of a profile, [L, Hq]
RUNS, LENGTH = 16, 512
ENOUGH = 4  # runs whose answer is right; with fewer, all count
Say = Callable[[int, int], None]


class Run(NamedTuple):
    """A context with a needle and a question about it, and the answer behind it, in tokens."""

    read: list[int]  # context and question
    answer: list[int]
    needle: slice  # where it stands in the context


class Found(NamedTuple):
    """What a run says: mass [L, Hq] that each query head gives the needle, for each token of the
    answer that stands in it, and whether the model's own answer is right."""

    mass: Tensor
    right: bool


def retrieval_scores(
    model: Any,
    tokenizer: Any,
    prose: str,
    *,
    runs: int = RUNS,
    length: int = LENGTH,
    seed: int = 0,
    say: Say = lambda done, total: None,
) -> tuple[Tensor, dict[str, Any]]:
    """How much attention each query head [L, Hq] of the compressible layers gives a needle while
    the model tells it (semantic retrieval heads of CompressKV, arXiv:2508.02401).

    One number in prose per run, at depths and in places that are drawn. The answer is given, not
    generated: where the model is right these are the same. Runs count whose answer is right; all of
    them where these are too few, which the second value says, as it stands in a profile's meta.

    Raises:
        MissingInputError: there is no prose.
        UsageError: `length` is too short for the task, or beyond the model's positions.
    """
    limit = facts(model.config).max_positions
    if length > limit:
        what = f"Needle runs of {length:,} tokens exceed the model's {limit:,} positions."
        raise UsageError(what, f"Give at most {limit}.")

    def count(text: str) -> int:
        return len(_ids(tokenizer, text))

    task, found = tasks.find("needle"), []
    for place in range(runs):
        item = task.make(random.Random(f"{seed}:retrieval:{place}"), count, length, prose)
        found.append(looked_up(model, to_run(tokenizer, item)))
        say(place + 1, runs)
    right = [one.mass for one in found if one.right]
    chosen = right if len(right) >= ENOUGH else [one.mass for one in found]
    said = {"runs": runs, "length": length, "right": len(right), "used": len(chosen)}
    return torch.stack(chosen).mean(0), {**said, "only_right": len(right) >= ENOUGH}


def to_run(tokenizer: Any, item: Item) -> Run:
    """An item whose reference is a part of one sentence of its context, in tokens."""
    said, context = item.references[0], item.context
    at = context.index(said)
    first = max(context.rfind(stop, 0, at) for stop in (". ", "! ", "? ")) + 1  # 0 at the start
    last = context.index(".", at + len(said)) + 1
    whole = list(tokenizer(context, verbose=False)["input_ids"])
    ends = [len(tokenizer(context[:end], verbose=False)["input_ids"]) for end in (first, last)]
    read = whole + _ids(tokenizer, item.turns[-1].question)
    return Run(read, _ids(tokenizer, f" {said}"), slice(*ends))


@torch.no_grad()
def looked_up(model: Any, run: Run) -> Found:
    """Reads context and question plainly, and then the rows that tell the answer, on layers that
    show their queries: no row but these is ever held."""
    model.set_attn_implementation(NAME)
    count, layers = len(run.answer), facts(model.config).compressible()
    tokens = torch.tensor([run.read + run.answer[:-1]], device=input_device(model))
    answer = torch.tensor(run.answer, device=tokens.device)
    held_there = set(run.read[run.needle])
    rows = [row for row, token in enumerate(run.answer) if token in held_there] or [*range(count)]
    mass: dict[int, Tensor] = {}

    def show(layer: int, sight: Sight) -> None:
        spot = Spot(scale=sight.scale, softcap=sight.softcap)
        seen = looked(View(sight.keys, sight.keys, queries=sight.query, spot=spot), count)
        mass[layer] = seen[0][:, rows, run.needle].sum(-1).mean(-1).float().cpu()

    cache = DynamicCache(config=model.config)
    model(tokens[:, :-count], past_key_values=cache, logits_to_keep=1)
    held = {i: (cache.layers[i].keys, cache.layers[i].values) for i in layers}
    out = model(tokens[:, -count:], past_key_values=going_on(cache.layers, held, show))
    right = torch.equal(out.logits[0].argmax(-1), answer)
    return Found(torch.stack([mass[i] for i in layers]), right)


def _ids(tokenizer: Any, text: str) -> list[int]:
    found: list[int] = list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    return found
