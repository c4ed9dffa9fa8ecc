"""Laws of size: `nbytes` is what the allocator holds, and `weigh` foretells it exactly."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from allocator import allocated
from torch import Tensor

from kvtune.cache import CompressedCache, layer_bytes, load, weigh
from kvtune.layer import CompressedLayer
from kvtune.models import facts

CONTEXT = 1200  # beyond all windows and budgets


def feed(cache: CompressedCache, model: Any, sizes: list[int]) -> None:
    """Lets bfloat16 keys and values pass through every layer, as a model's forward would."""
    torch.manual_seed(0)
    for size in sizes:
        for known, layer in zip(facts(model.config).layers, cache.layers, strict=True):
            # a model hands out views: [B, T, H * D] seen as [B, H, T, D]
            shape = (1, size, known.kv_heads, known.head_dim)
            keys, values = (torch.randn(shape, dtype=torch.bfloat16).transpose(1, 2) for _ in "kv")
            layer.update(keys, values)
            if isinstance(layer, CompressedLayer):
                layer.attend(keys.repeat_interleave(2, 1), None, None, None)


def test_the_allocator_is_really_asked() -> None:
    def work() -> Tensor:
        torch.ones(5000, dtype=torch.uint8)
        kept = torch.zeros(3, 1000, dtype=torch.uint8)
        return kept[:1]

    held, kept = allocated(work)
    assert held == 3000
    assert kept.nbytes == 1000


def test_nbytes_is_what_the_allocator_holds(llama_case: Any) -> None:
    model, make = llama_case

    def work() -> CompressedCache:
        cache = make()
        feed(cache, model, [CONTEXT - 50, 45, *[1] * 5])
        return cache

    make()  # what the first call of all leaves behind is not the cache's
    held, cache = allocated(work)
    assert abs(cache.nbytes - held) <= 0.01 * held
    assert cache.get_seq_length() == CONTEXT


@pytest.mark.parametrize(
    "recipe_name", ["k4v2-windowed", "k2v4-bare", "v3-only", "layers-apart", "heads-apart"]
)
@pytest.mark.parametrize("name", ["llama", "yi"])
def test_weigh_foretells_what_a_filled_cache_holds(
    name: str, model: Any, recipe_name: str, recipe_of: Any
) -> None:
    """With one kv head a slice of the prompt is contiguous, so it must be copied on purpose."""
    known, recipe = facts(model.config), recipe_of(recipe_name)
    for context in (1, 60, 997, 2100):
        cache = load(recipe, model)
        feed(cache, model, [context])
        assert weigh(recipe.policies(known), known, context).bytes == cache.nbytes
        batch = weigh(recipe.policies(known), known, context, batch=7)
        assert batch.bytes == 7 * cache.nbytes


@pytest.mark.parametrize("recipe_name", ["k4v2-windowed", "k2v4-bare", "derope-k4", "v3-only"])
def test_a_cache_that_grew_token_by_token_holds_little_more_than_one_of_a_prompt(
    llama: Any, recipe_name: str, recipe_of: Any
) -> None:
    recipe, known = recipe_of(recipe_name), facts(llama.config)
    grown = load(recipe, llama)
    feed(grown, llama, [300, *[1] * 70, 600])
    least = weigh(recipe.policies(known), known, 970).bytes
    assert least <= grown.nbytes <= least * (1 + 1 / 32)


def test_k4v2_with_windows_and_scales_holds_less_than_30_percent(
    llama: Any, recipe_of: Any
) -> None:
    known, recipe = facts(llama.config), recipe_of("k4v2-windowed")
    found = weigh(recipe.policies(known), known, 4096)
    assert found.bytes < 0.3 * found.dense_bytes
    layers, heads, sides, two_bytes = 4, 2, 2, 2
    assert found.dense_bytes == layers * heads * 4096 * 64 * sides * two_bytes
    assert found.payload_bits == 3
    assert found.bits == pytest.approx(16 / found.ratio)
    assert found.bits > found.payload_bits


def test_an_empty_recipe_weighs_the_16_bit_cache(name: str, model: Any, written: Any) -> None:
    known = facts(model.config)
    for context in (10, 500):
        found = weigh(written().policies(known), known, context)
        assert found.bytes == found.dense_bytes
        assert found.ratio == 1
        cache = load(written(), model)
        feed(cache, model, [context])
        assert cache.nbytes >= found.bytes
        sliding = sum(layer.window is not None for layer in known.layers)
        assert cache.nbytes == found.bytes or (sliding and context == 500)


def test_a_head_of_one_group_costs_its_codes_and_two_numbers(written: Any, llama: Any) -> None:
    recipe = written(keys='use = "affine", bits = 3, group = "head"')
    policy = recipe.policies(facts(llama.config))[0]
    keys, values = layer_bytes(policy, 2, 64, 100)
    assert keys == 2 * 64 * (64 * 3 // 8 + 4) + 2 * 36 * 64 * 2  # one page, and what fills none
    assert values == 2 * 100 * 64 * 2


def test_the_dense_prompt_is_freed(llama: Any, recipe_of: Any) -> None:
    """No code may keep the prompt alive by being a view of it."""
    known, recipe = facts(llama.config), recipe_of("k2v4-bare")
    load(recipe, llama)

    def work() -> CompressedCache:
        cache = load(recipe, llama)
        feed(cache, llama, [3000])
        return cache

    held, _ = allocated(work)
    expected = weigh(recipe.policies(known), known, 3000)
    assert held <= 1.01 * expected.bytes < 0.3 * expected.dense_bytes
