"""Laws of size of layers that store together: what the allocator holds, and formulas foretell."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from allocator import allocated

from kvtune import recipe as recipes
from kvtune.cache import CompressedCache, load, weigh
from kvtune.grouped import GroupedLayer
from kvtune.models import Facts, LayerFacts, facts
from kvtune.recipe import Recipe

CODES = 'kept.keys = [{ use = "affine", bits = 4, group = 32 }]\n'
BODIES = {
    "xkv": 'share = { use = "xkv", layers = 2, key_rank = 0.125, value_rank = 0.25 }\n',
    "xkv-4-bit": f"sinks = 4\nrecent = 40\n{CODES}"
    'share = { use = "xkv", key_rank = 0.125, value_rank = 0.25, centre = true }\n',
    "minicache": 'sinks = 4\nrecent = 40\nshare = { use = "minicache" }\n',
    "minicache-4-bit": f'{CODES}share = {{ use = "minicache" }}\n',
}
every_body = pytest.mark.parametrize("body", BODIES)


def made(body: str) -> Recipe:
    return recipes.loads(f'kvtune = 1\n[[layers]]\nspan = "all"\n{BODIES.get(body, body)}')


def feed(cache: CompressedCache, model: Any, sizes: list[int]) -> None:
    """Lets bfloat16 keys and values pass through every layer, as a model's forward would."""
    torch.manual_seed(0)
    for size in sizes:
        for known, layer in zip(facts(model.config).layers, cache.layers, strict=True):
            shape = (1, size, known.kv_heads, known.head_dim)
            keys, values = (torch.randn(shape, dtype=torch.bfloat16).transpose(1, 2) for _ in "kv")
            layer.update(keys, values)
            if isinstance(layer, GroupedLayer):
                layer.attend(keys.repeat_interleave(2, 1), None, None, None)


@pytest.mark.parametrize("layers", [2, 4])
def test_the_allocator_holds_what_the_formula_of_xkv_says(layers: int, llama: Any) -> None:
    """CR = 2 T W D / ((r_k + r_v) (T + W D)), of a prompt without exact tokens."""
    ranks = 0.09375, 0.140625
    recipe = made(f'share = {{ use = "xkv", layers = {layers} }}\n')

    def work() -> CompressedCache:
        cache = load(recipe, llama)
        feed(cache, llama, [4096])
        return cache

    load(recipe, llama)
    held, cache = allocated(work)
    width = layers * 128
    kept = sum(round(rank * width / 8) * 8 for rank in ranks)
    formula = 2 * 4096 * width / (kept * (4096 + width))
    dense = 4 * 2 * 2 * 128 * 4096  # layers, sides, bytes, channels, tokens
    assert held == pytest.approx(dense / formula, rel=0.02)
    assert cache.nbytes == pytest.approx(held, rel=0.01)


@every_body
def test_what_is_foretold_is_held_and_the_common_store_counted_once(body: str, llama: Any) -> None:
    known, recipe = facts(llama.config), made(body)
    policies = recipe.policies(known)
    for context in (1, 60, 997, 2048):
        cache = load(recipe, llama)
        feed(cache, llama, [context])
        assert weigh(policies, known, context).bytes == cache.nbytes
        assert weigh(policies, known, context, batch=7).bytes == 7 * cache.nbytes


@every_body
def test_nbytes_is_what_the_allocator_holds_once_a_cache_has_grown(body: str, llama: Any) -> None:
    def work() -> CompressedCache:
        cache = load(made(body), llama)
        feed(cache, llama, [1500, 45, *[1] * 5, 300])
        return cache

    load(made(body), llama)
    held, cache = allocated(work)
    assert abs(cache.nbytes - held) <= 0.01 * held
    assert sum(cache.layers[0].side_bytes) == cache.layers[0].nbytes < 0.3 * cache.nbytes


def test_the_recipe_of_xkv_has_the_ratio_of_its_paper(shipped: Any) -> None:
    """8.03 at 64K tokens of four layers of 1,024 channels, less what stays exact here."""
    layer = LayerFacts("full_attention", 8, 32, 128)
    known = Facts("Llama", (layer,) * 8, 1 << 17, 128256)
    found = weigh(recipes.load(shipped["xkv-4.toml"]).policies(known), known, 1 << 16)
    assert 7.7 < found.ratio < 8.03
    assert found.payload_bits == pytest.approx(16 * (0.09375 + 0.140625) / 2)
    halved = weigh(
        made('share = { use = "minicache", retained = 0.0 }\n').policies(known), known, 1 << 16
    )
    assert halved.ratio == pytest.approx(256 / 130)  # a direction and two lengths of 128 channels
    assert halved.payload_bits == 8
