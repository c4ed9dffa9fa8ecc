"""Answers: what a model says to items through a dense and a compressed cache, greedily."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig
from transformers.cache_utils import Cache

from kvtune.cache import CompressedCache
from kvtune.task import Item

ROWS = 8  # items answered together


class Pair(NamedTuple):
    """The last answer to an item of the dense model and, where there is one, of the recipe."""

    dense: str
    compressed: str


@contextmanager
def copied(twin: Cache, dense: Cache) -> Iterator[None]:
    """What layers of `twin` take is given to `dense` as well.

    A prompt sees itself exactly under every recipe, so that one forward fills both.
    """

    def both(layer: Any, other: Any) -> None:
        own = layer.update

        def update(*args: Any, **kwargs: Any) -> Any:
            other.update(*args, **kwargs)
            return own(*args, **kwargs)

        layer.update = update

    for layer, other in zip(twin.layers, dense.layers, strict=True):
        both(layer, other)
    yield
    for layer in twin.layers:
        del layer.update


class Prepared(NamedTuple):
    """An item in tokens."""

    place: int
    context: list[int]
    questions: tuple[list[int], ...]
    new_tokens: tuple[int, ...]


@torch.no_grad()
def answers(
    model: Any, tokenizer: Any, items: Sequence[Item], cache: CompressedCache | None
) -> Iterator[tuple[int, Pair]]:
    """Answers items; yields each one's place and answers, batch by batch.

    A prompt attends to itself exactly in kvtune, whatever the recipe, so a question inside the
    prompt would be answered from exact tokens. Here the context alone is the prompt; the question
    and the start of its answer follow as a second forward on the filled cache, then greedy
    `model.generate` goes on. Both sides get the same treatment. Items whose questions take
    equally many tokens share a batch, their contexts padded on the left.

    Args:
        cache: of `kvtune.load`, used through `fresh()`; None for the dense model alone.
    """
    for batch in _batches(tokenizer, items):
        caches = _filled(model, batch, cache)
        said = [_said(model, tokenizer, batch, filled) for filled in caches]
        for row, one in enumerate(batch):
            yield one.place, Pair(said[0][row], said[-1][row])


def _batches(tokenizer: Any, items: Sequence[Item]) -> list[list[Prepared]]:
    groups: dict[tuple[int, ...], list[Prepared]] = {}
    for place, item in enumerate(items):
        asked = tuple(
            list(tokenizer(turn.question, add_special_tokens=False, verbose=False)["input_ids"])
            for turn in item.turns
        )
        context = list(tokenizer(item.context, verbose=False)["input_ids"])
        news = tuple(turn.new_tokens for turn in item.turns)
        one = Prepared(place, context, asked, news)
        groups.setdefault((*map(len, asked), *news), []).append(one)
    batches = []
    for _, group in sorted(groups.items()):
        group.sort(key=lambda one: (len(one.context), one.place))  # little padding
        batches += [group[start : start + ROWS] for start in range(0, len(group), ROWS)]
    return batches


def _padded(batch: list[Prepared], device: torch.device) -> tuple[Tensor, Tensor]:
    """Contexts [B, T] and their mask, padded on the left."""
    longest = max(len(one.context) for one in batch)
    rows = [[0] * (longest - len(one.context)) + one.context for one in batch]
    mask = [[0] * (longest - len(one.context)) + [1] * len(one.context) for one in batch]
    return torch.tensor(rows, device=device), torch.tensor(mask, device=device)


def _filled(model: Any, batch: list[Prepared], cache: CompressedCache | None) -> list[Cache]:
    """The dense cache with the contexts in it, and the compressed one."""
    ids, mask = _padded(batch, model.device)
    dense = DynamicCache(config=model.config)
    twin = None if cache is None else cache.fresh()
    places = (mask.cumsum(-1) - 1).clamp_min(0)
    given = {"attention_mask": mask, "position_ids": places, "logits_to_keep": 1}
    if twin is None:
        model(ids, past_key_values=dense, **given)
        return [dense]
    with copied(twin, dense):
        model(ids, past_key_values=twin, **given)
    return [dense, twin]


def _said(model: Any, tokenizer: Any, batch: list[Prepared], cache: Cache) -> list[str]:
    """The last answers, after all turns on one cache."""
    ids, mask = _padded(batch, model.device)
    new: Tensor | None = None
    for turn, count in enumerate(batch[0].new_tokens):
        asked = torch.tensor([one.questions[turn] for one in batch], device=model.device)
        ids = torch.cat([ids, asked], 1)
        mask = torch.cat([mask, torch.ones_like(asked)], 1)
        # rows of one batch stay equally long; what follows the end of a text is cut off later
        greedy = GenerationConfig(max_new_tokens=count, do_sample=False, pad_token_id=0)
        out = model.generate(
            ids,
            attention_mask=mask,
            past_key_values=cache,
            generation_config=greedy,
        )
        new = out[:, ids.shape[1] :]
        mask = torch.cat([mask, torch.ones_like(new)], 1)
        ids = out
    assert new is not None
    return [_text(tokenizer, row) for row in new.tolist()]


def _text(tokenizer: Any, row: list[int]) -> str:
    end = tokenizer.eos_token_id
    kept = row[: row.index(end)] if end in row else row
    text: str = tokenizer.decode(kept, skip_special_tokens=True)
    return text
