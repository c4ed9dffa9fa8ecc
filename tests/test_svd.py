"""Laws of low rank in a layer: full rank is dense, and bases are prompts' own and save bytes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import COMPRESSIBLE
from recipes_made import DEROPE
from tiny_fits import cloned, fits_of
from torch import Tensor
from transformers import DynamicCache

from kvtune.cache import load, weigh
from kvtune.chains import Chain
from kvtune.layer import CompressedLayer
from kvtune.methods.svd import Svd
from kvtune.models import facts
from kvtune.parts import Site, parse
from kvtune.policy import Policy

METRICS = ("plain", "whitened", "queries", "kq")
BASES = ("prompt", "calibrated")
PROMPT = 150  # more than any width of the tiny models but Llama's, whose rank stays below it


def low_rank(**settings: Any) -> str:
    shown = (f'"{x}"' if isinstance(x, str) else str(x) for x in settings.values())
    return ", ".join(f"{name} = {x}" for name, x in zip(settings, shown, strict=True))


def svd(**settings: Any) -> str:
    return f'use = "svd", {low_rank(**settings)}'


@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("name", COMPRESSIBLE)
def test_full_rank_is_dense(
    name: str, model: Any, metric: str, basis: str, written: Any, play: Any, draw: Any
) -> None:
    """With biases, QK-norm, partial rotary widths, one kv head or many, and behind RoPE."""
    own = svd(rank=1.0, metric=metric, basis=basis)
    recipe = written(keys=f"{DEROPE} > {own}", values=own, sinks=2, recent=5)
    cache = load(recipe, model, tensors=cloned(fits_of(recipe, model)))
    tokens, sizes = draw(2, PROMPT + 8), [PROMPT, 1, 1, 3, 1, 2]
    found = play(model, cache, tokens, sizes)
    dense = play(model, DynamicCache(config=model.config), tokens, sizes)
    held = [x for x in cache.layers if isinstance(x, CompressedLayer)]
    assert held and all(layer.groups[0].rows.keys.tokens for layer in held)
    # fitted matrices are kept in 16 bits, whose rounding biases of 20 make felt
    exact = basis == "prompt" and metric in ("plain", "whitened")
    close = {"atol": 1e-5, "rtol": 1e-5} if exact else {"atol": 0.15, "rtol": 0.05}
    torch.testing.assert_close(found.log_softmax(-1), dense.log_softmax(-1), **close)


def test_fewer_directions_lose_more(llama: Any, written: Any, play: Any, draw: Any) -> None:
    tokens, sizes = draw(2, PROMPT + 4), [PROMPT, 1, 1, 1, 1]
    dense = play(llama, DynamicCache(config=llama.config), tokens, sizes)[:, PROMPT:]
    lost = []
    for rank in (0.125, 0.375, 0.625, 1.0):
        recipe = written(keys=f"{DEROPE} > {svd(rank=rank)}", values=svd(rank=rank))
        found = play(llama, load(recipe, llama), tokens, sizes)[:, PROMPT:]
        lost.append(float((found.log_softmax(-1) - dense.log_softmax(-1)).abs().mean()))
    assert lost == sorted(lost, reverse=True)
    assert lost[0] > 10 * lost[-1]


def test_a_truncated_basis_is_that_of_a_full_svd() -> None:
    x = torch.randn(2, 3, 90, 16, dtype=torch.float64) * torch.logspace(0, -2, 16).double()
    codec = Svd(rank=0.25, centre="none")
    site = Site(0, "values", torch.arange(90), x.dtype)
    found = decoded(codec, x, site)
    joined = x.transpose(1, 2).flatten(2)
    u, s, v = torch.linalg.svd(joined, full_matrices=False)
    kept = (u[..., :12] * s[:, None, :12]) @ v[:, :12]
    torch.testing.assert_close(found.transpose(1, 2).flatten(2), kept, atol=1e-9, rtol=1e-6)


def decoded(codec: Svd, x: Tensor, site: Site) -> Tensor:
    chain = Chain((codec,))
    code, learned = chain.begin(x, site)
    return chain.decode(code, replace(site, tensors=learned))


@pytest.mark.parametrize("centre", ["mean", "none"])
def test_a_bias_costs_no_rank_once_the_mean_is_removed(centre: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 2, 64, 4, generator=generator) @ torch.randn(4, 16, generator=generator)
    biased = x + 50 * torch.randn(1, 2, 1, 16, generator=generator)
    codec = Svd(rank=0.25, heads=1, centre=centre)  # four directions of sixteen
    site = Site(0, "values", torch.arange(64), x.dtype)
    error = (decoded(codec, biased, site) - biased).norm() / x.norm()
    assert (error < 1e-3) == (centre == "mean")


def test_rows_have_bases_of_their_own_and_padding_enters_none(
    llama: Any, recipe_of: Any, play: Any, draw: Any
) -> None:
    long, short = draw(1, 120), draw(1, 90, seed=1)
    tokens = torch.cat([long, torch.cat([torch.zeros(1, 30, dtype=torch.long), short], 1)])
    mask = torch.ones_like(tokens)
    mask[1, :30] = 0
    more = draw(2, 20, seed=2)
    mask = torch.cat([mask, torch.ones_like(more)], 1)
    make: Callable[[], Any] = lambda: load(recipe_of("svd"), llama)  # noqa: E731
    sizes = [120, *[1] * 20]
    both = play(llama, make(), torch.cat([tokens, more], 1), sizes, mask)
    alone = play(llama, make(), torch.cat([short, more[1:]], 1), [90, *[1] * 20])
    torch.testing.assert_close(both[1, 120:], alone[0, 90:], atol=1e-6, rtol=1e-6)


def test_nothing_is_stored_before_a_basis_pays(
    llama: Any, recipe_of: Any, play: Any, draw: Any
) -> None:
    """A rank of 32 of 128 pays from 43 tokens on, and values' 32 of 64 from 65."""
    recipe, tokens = recipe_of("svd"), draw(1, 130)
    cache = load(recipe, llama)
    dense = play(llama, DynamicCache(config=llama.config), tokens[:, :74], [30, *[1] * 44])
    found = play(llama, cache, tokens[:, :74], [30, *[1] * 44])
    torch.testing.assert_close(found, dense, atol=1e-9, rtol=1e-9)
    assert {layer.groups[0].rows.keys.tokens for layer in cache.layers} == {0}
    play(llama, cache, tokens[:, 74:], [1] * 56)
    assert {layer.groups[0].rows.keys.tokens for layer in cache.layers} == {120}


def test_a_second_turn_goes_on_on_the_first_ones_basis(
    llama: Any, recipe_of: Any, play: Any, draw: Any
) -> None:
    tokens = draw(2, 240)
    expected = play(llama, load(recipe_of("svd"), llama), tokens, [100, *[1] * 140])
    found = play(llama, load(recipe_of("svd"), llama), tokens, [100, 20, 90, 1, 29])
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("rank", [0.25, 0.5])
@pytest.mark.parametrize("kv_heads", [2, 4])
def test_stored_bytes_are_those_of_the_formula(rank: float, kv_heads: int, model_of: Any) -> None:
    """T r of latents and r w of a basis, of each side, as xKV (arXiv:2503.18893) counts them."""
    model = model_of("llama", num_key_value_heads=kv_heads, num_hidden_layers=1)
    known = facts(model.config)
    width, length = kv_heads * 16 if model.config.head_dim == 16 else kv_heads * 64, 4096
    codec = parse({"use": "svd", "rank": rank, "centre": "none"})
    chain = Chain((codec,))  # type: ignore[arg-type]
    policy = Policy(keys=chain, values=chain).of_shape(kv_heads, model.config.head_dim)
    kept = round(rank * width)
    formula = 2 * length * width / (2 * kept * (length + width))
    assert weigh((policy,), known, length).ratio == pytest.approx(formula, rel=0.02)
    x = torch.randn(1, kv_heads, length, model.config.head_dim, dtype=torch.bfloat16)
    from kvtune.fitted import sites
    from kvtune.heads import make_layer

    layer = make_layer(policy, sites(0, None, {}))
    layer.fill(x, x.clone())
    assert 4 * width * length / layer.nbytes == pytest.approx(formula, rel=0.02)


def test_heads_that_do_not_part_are_refused_in_words() -> None:
    with pytest.raises(ValueError, match="4 heads together, which do not part 3 kv heads"):
        Chain((Svd(heads=4),)).check(3, 64, "values")


def test_a_share_that_is_no_64th_is_refused() -> None:
    with pytest.raises(ValueError, match="not a share of 1/64"):
        parse({"use": "svd", "rank": 0.3})
