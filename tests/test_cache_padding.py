"""Laws of padded batches: a padded row is stored and answered as the same row alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kvtune.cache import load
from kvtune.errors import UnsupportedError
from kvtune.layer import CompressedLayer
from kvtune.pages import Pages

LENGTH, STEPS = 60, 45
PADS = [13, 0, 5, 13, 59]  # the last row is one token
TIGHT = {"atol": 1e-9, "rtol": 1e-9}
RECIPES = ["k4v2-windowed", "k2v4-bare", "derope-k4", "layers-apart", "heads-apart"]


def padded(tokens: Tensor, pads: list[int]) -> tuple[Tensor, Tensor]:
    """Returns tokens with padding written over the left, and their mask."""
    mask = torch.arange(tokens.shape[1]) >= torch.tensor(pads)[:, None]
    return tokens.where(mask | (torch.arange(tokens.shape[1]) >= LENGTH), 0), mask.long()


def pages(cache: Any) -> list[tuple[CompressedLayer, int, int, Pages]]:
    """Returns (layer, row of the batch, row within its group, pages) of everything stored."""
    return [
        (layer, row, local, side)
        for layer in cache.layers
        if isinstance(layer, CompressedLayer)
        for index, _, rows in layer.groups
        for local, row in enumerate(index)
        for side in (rows.keys, rows.values)
    ]


def held(found: Pages, row: int) -> list[Tensor]:
    if found._body is None:
        return []
    grown = [found._body, *(more for side in found._sides for more in side)]
    return [each.tensor[row] for each in grown]


@pytest.mark.parametrize("recipe_name", RECIPES)
def test_a_padded_row_equals_the_same_row_alone(
    name: str, model: Any, recipe_name: str, recipe_of: Any, play: Any, draw: Any
) -> None:
    recipe = recipe_of(recipe_name)
    tokens, mask = padded(draw(len(PADS), LENGTH + STEPS), PADS)
    sizes = [LENGTH, *[1] * 20, 25]
    batch = load(recipe, model)
    found = play(model, batch, tokens, sizes, mask)
    assert batch.get_seq_length() == LENGTH + STEPS
    for row, pad in enumerate(PADS):
        alone = load(recipe, model)
        expected = play(model, alone, tokens[row : row + 1, pad:], [LENGTH - pad, *sizes[1:]])
        torch.testing.assert_close(found[row, pad:], expected[0], **TIGHT)
        own = [side for _, at, _, side in pages(batch) if at == row]
        local = [place for _, at, place, _ in pages(batch) if at == row]
        for padded_side, place, (_, _, _, side) in zip(own, local, pages(alone), strict=True):
            assert padded_side.tokens == side.tokens
            for mine, theirs in zip(held(padded_side, place), held(side, 0), strict=True):
                same = {"atol": 0, "rtol": 0} if mine.dtype != torch.float64 else TIGHT
                torch.testing.assert_close(mine, theirs, **same)


@pytest.mark.parametrize("recipe_name", RECIPES)
def test_what_stands_in_the_padding_leaves_no_trace(
    llama: Any, recipe_name: str, recipe_of: Any, play: Any, draw: Any
) -> None:
    recipe = recipe_of(recipe_name)
    tokens, mask = padded(draw(3, LENGTH + STEPS), [17, 4, 0])
    other = tokens.where(mask.bool(), 7)
    caches = [load(recipe, llama) for _ in range(2)]
    for cache, given in zip(caches, (tokens, other), strict=True):
        play(llama, cache, given, [LENGTH, STEPS], mask)
    for (*_, local, one), (*_, two) in zip(pages(caches[0]), pages(caches[1]), strict=True):
        for mine, theirs in zip(held(one, local), held(two, local), strict=True):
            assert torch.equal(mine, theirs)


def test_generation_of_a_padded_row_is_its_generation_alone(
    name: str, model: Any, recipe_of: Any, draw: Any
) -> None:
    recipe, pads = recipe_of("k8v8"), [9, 0, 21]
    tokens, mask = padded(draw(3, LENGTH), pads)
    together = model.generate(
        tokens,
        attention_mask=mask,
        past_key_values=load(recipe, model),
        max_new_tokens=40,
        do_sample=False,
    )
    for row, pad in enumerate(pads):
        alone = model.generate(
            tokens[row : row + 1, pad:],
            attention_mask=mask[row : row + 1, pad:],
            past_key_values=load(recipe, model),
            max_new_tokens=40,
            do_sample=False,
        )
        assert together[row, LENGTH:].tolist() == alone[0, LENGTH - pad :].tolist()


def test_rows_that_are_moved_take_their_padding_along(
    llama: Any, recipe_of: Any, play: Any, draw: Any
) -> None:
    recipe, pads, order = recipe_of("derope-k4"), [11, 0, 11, 3], torch.tensor([3, 0, 0, 1, 2, 3])
    tokens, mask = padded(draw(4, LENGTH + STEPS), pads)
    cache, moved = load(recipe, llama), load(recipe, llama)
    expected = play(llama, cache, tokens, [LENGTH, *[1] * STEPS], mask)[order, LENGTH:]
    play(llama, moved, tokens[:, :LENGTH], [LENGTH], mask)
    moved.batch_select_indices(order)
    found = play(llama, moved, tokens[order, LENGTH:], [1] * 20 + [25], mask[order])
    torch.testing.assert_close(found, expected, **TIGHT)


@pytest.mark.parametrize("changed", [None, [5, 0], [6, 6], [0, 0], [0, 6]])
def test_padding_that_changes_is_refused(
    llama: Any, changed: list[int] | None, recipe_of: Any, play: Any, draw: Any
) -> None:
    cache = load(recipe_of("k8v8"), llama)
    tokens, mask = padded(draw(2, LENGTH + 1), [6, 0])
    play(llama, cache, tokens[:, :LENGTH], [LENGTH], mask)
    other = None if changed is None else padded(tokens, changed)[1]
    with pytest.raises(UnsupportedError, match="padding"):
        play(llama, cache, tokens[:, LENGTH:], [1], other)


def test_padding_on_the_right_or_inside_is_refused(llama: Any, recipe_of: Any, draw: Any) -> None:
    tokens = draw(2, 20)
    for hole in (slice(15, 20), slice(7, 9)):
        mask = torch.ones(2, 20, dtype=torch.long)
        mask[1, hole] = 0
        with pytest.raises(UnsupportedError, match="left padding only"):
            llama(tokens, attention_mask=mask, past_key_values=load(recipe_of("k8v8"), llama))


def test_a_first_chunk_of_padding_alone_is_refused(
    llama: Any, recipe_of: Any, play: Any, draw: Any
) -> None:
    tokens, mask = padded(draw(2, LENGTH), [30, 0])
    with pytest.raises(UnsupportedError, match="all padding"):
        play(llama, load(recipe_of("k8v8"), llama), tokens, [20, 40], mask)
