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
from kvtune.placement import input_device
from kvtune.prefill import Draft, asks, read
from kvtune.task import Item

ROWS, TOKENS = 8, 32_768  # items answered together, and tokens of their contexts, padding included


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


class Side(NamedTuple):
    """Items with a cache that holds their contexts."""

    batch: list[Prepared]
    cache: Cache


@torch.no_grad()
def answers(
    model: Any,
    tokenizer: Any,
    items: Sequence[Item],
    cache: CompressedCache | None,
    draft: Draft | None = None,
) -> Iterator[tuple[int, Pair]]:
    """Answers items; yields each one's place and answers, batch by batch.

    A prompt attends to itself exactly in kvtune, whatever the recipe, so a question inside the
    prompt would be answered from exact tokens. Here the context alone is the prompt; the question
    and the start of its answer follow as a second forward on the filled cache, then greedy
    `model.generate` goes on. Both sides get the same treatment. Items whose questions take
    equally many tokens share a batch, their contexts padded on the left; each is alone where the
    recipe wants more of a context than a forward (see `kvtune.prefill`), which sees no question.

    Args:
        cache: of `kvtune.load`, used through `fresh()`; None for the dense model alone.
        draft: a small model, for a recipe that looks ahead or cuts prompts.

    Raises:
        UsageError: no draft where one is needed, or one with another tokenizer.
    """
    wants = cache is not None and bool(asks(cache))
    for batch in _batches(tokenizer, items, 1 if wants else ROWS):
        if cache is not None and wants:
            sides = [
                Side(batch, _filled(model, batch, None)[0]),
                _alone(model, tokenizer, batch, cache, draft),
            ]
        else:
            sides = [Side(batch, filled) for filled in _filled(model, batch, cache)]
        said = [_said(model, tokenizer, *side) for side in sides]
        for row, one in enumerate(batch):
            yield one.place, Pair(said[0][row], said[-1][row])


def _batches(tokenizer: Any, items: Sequence[Item], most: int) -> list[list[Prepared]]:
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
        rows = max(1, min(most, TOKENS // max(1, len(group[-1].context))))
        batches += [group[start : start + rows] for start in range(0, len(group), rows)]
    return batches


def _padded(batch: list[Prepared], device: torch.device) -> tuple[Tensor, Tensor]:
    """Contexts [B, T] and their mask, padded on the left."""
    longest = max(len(one.context) for one in batch)
    rows = [[0] * (longest - len(one.context)) + one.context for one in batch]
    mask = [[0] * (longest - len(one.context)) + [1] * len(one.context) for one in batch]
    return torch.tensor(rows, device=device), torch.tensor(mask, device=device)


def _filled(model: Any, batch: list[Prepared], cache: CompressedCache | None) -> list[Cache]:
    """The dense cache with the contexts in it, and the compressed one."""
    ids, mask = _padded(batch, input_device(model))
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


def _alone(
    model: Any,
    tokenizer: Any,
    batch: list[Prepared],
    cache: CompressedCache,
    draft: Draft | None,
) -> Side:
    """One item, its context read as a recipe asks, which may cut it."""
    (one,), twin = batch, cache.fresh()
    tokens = torch.tensor([one.context], device=input_device(model))
    kept = read(model, twin, tokens, tokenizer=tokenizer, draft=draft)
    return Side([one._replace(context=kept[0].tolist())], twin)


def _said(model: Any, tokenizer: Any, batch: list[Prepared], cache: Cache) -> list[str]:
    """The last answers, after all turns on one cache."""
    ids, mask = _padded(batch, input_device(model))
    ends, last = _ends(model, tokenizer), len(batch[0].new_tokens) - 1
    start = ids.shape[1]
    for turn, count in enumerate(batch[0].new_tokens):
        ids = torch.cat([ids, ids.new_tensor([one.questions[turn] for one in batch])], 1)
        mask = _longer(mask, ids)
        start = ids.shape[1]
        ids = model.generate(
            ids,
            attention_mask=mask,
            past_key_values=cache,
            generation_config=_greedy(count, ends, whole=turn < last),
        )
        mask = _longer(mask, ids)
    return [_text(tokenizer, row, ends) for row in ids[:, start:].tolist()]


def _longer(mask: Tensor, ids: Tensor) -> Tensor:
    return torch.cat([mask, mask.new_ones(len(ids), ids.shape[1] - mask.shape[1])], 1)


def _greedy(count: int, ends: frozenset[int], whole: bool) -> GenerationConfig:
    """How `count` tokens are said; a `whole` answer, behind which a question comes, ends no
    earlier, so that no row waits on padding and none depends on its neighbours.

    What a model's own generation config asks beside this is switched off: a penalty on repeating
    would forbid to say what the context holds.
    """
    return GenerationConfig(
        max_new_tokens=count,
        min_new_tokens=count if whole else 0,
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        eos_token_id=sorted(ends) or None,
        pad_token_id=min(ends, default=0),
    )


def _ends(model: Any, tokenizer: Any) -> frozenset[int]:
    """Every token that ends a text: chat models have several."""
    own = model.generation_config.eos_token_id
    several = own if isinstance(own, list) else [own]
    return frozenset(end for end in (tokenizer.eos_token_id, *several) if end is not None)


def _text(tokenizer: Any, row: list[int], ends: frozenset[int]) -> str:
    end = next((place for place, token in enumerate(row) if token in ends), len(row))
    text: str = tokenizer.decode(row[:end], skip_special_tokens=True)
    return text
