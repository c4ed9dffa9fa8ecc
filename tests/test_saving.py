"""Laws of a prompt's own basis: it takes what is known of it, and is refused where that is more."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from kvtune.bank import Sizes
from kvtune.cache import CompressedCache, weigh
from kvtune.chains import Chain
from kvtune.errors import UsageError
from kvtune.methods.affine import Affine
from kvtune.methods.svd import Svd
from kvtune.models import facts
from kvtune.policy import Policy
from kvtune.prove import prove
from kvtune.saving import check_saves, saving
from kvtune.space import Opened
from kvtune.texts import Document

SHARES = ((0.25, 0.375), (0.09375, 0.140625), (0.5, 0.5))  # of keys and values


def own(rank: float, **settings: Any) -> Chain:
    """A basis of each prompt, of all heads together."""
    return Chain((Svd(rank=rank, **settings),))


def policies_of(model: Any, **settings: Any) -> tuple[Policy, ...]:
    """One policy in all layers of a tiny model."""
    known = facts(model.config)
    made = [Policy(**settings).of_shape(layer.kv_heads, layer.head_dim) for layer in known.layers]
    return tuple(made)


def filled(model: Any, policies: tuple[Policy, ...], context: int) -> CompressedCache:
    """A cache that holds a random prompt in bfloat16."""
    cache = CompressedCache(policies, model.config, {}, {})
    generator = torch.Generator().manual_seed(0)
    for known, layer in zip(facts(model.config).layers, cache.layers, strict=True):
        shape = (2, 1, known.kv_heads, context, known.head_dim)
        keys, values = torch.randn(shape, generator=generator).bfloat16()
        layer.fill(keys, values)
    return cache


@pytest.mark.parametrize("shares", SHARES, ids=str)
def test_the_allocator_holds_what_the_formula_of_a_factorised_layer_says(
    shares: tuple[float, float], model_of: Any
) -> None:
    """A ratio of 2 T D / ((r_k + r_v) (T + D)): xKV, arXiv:2503.18893, of groups of one layer."""
    heads, head_dim, tokens = 4, 64, 4096
    model = model_of("llama", num_hidden_layers=1, num_key_value_heads=heads)
    width = heads * head_dim
    keys, values = (own(share, centre="none") for share in shares)
    policies = policies_of(model, keys=keys, values=values)
    held = filled(model, policies, tokens).nbytes
    ranks = sum(round(share * width) for share in shares)
    ratio = 2 * tokens * width / (ranks * (tokens + width))
    assert 4 * tokens * width / held == pytest.approx(ratio, rel=0.02)
    assert weigh(policies, facts(model.config), tokens).bytes == held


@pytest.mark.parametrize("context", [40, 150, 200, 300, 700])
@pytest.mark.parametrize("window", [(0, 0), (4, 32)], ids=["bare", "windowed"])
@pytest.mark.parametrize("rank", [0.25, 0.5, 1.0])
def test_what_is_not_refused_is_smaller_than_16_bits_and_what_is_refused_is_not(
    rank: float, window: tuple[int, int], context: int, model_of: Any
) -> None:
    model = model_of("llama", num_hidden_layers=1)
    known = facts(model.config)
    sinks, recent = window
    policies = policies_of(model, keys=own(rank), sinks=sinks, recent=recent)
    dense = weigh((Policy(),), known, context).bytes
    saves = filled(model, policies, context).nbytes < dense
    try:
        check_saves(policies, known, context)
    except UsageError:
        assert not saves
    else:
        assert saves


def test_a_refusal_names_rank_width_and_the_tokens_that_it_takes(llama: Any) -> None:
    known = facts(llama.config)
    policies = policies_of(llama, keys=own(0.25), sinks=4, recent=32)
    enough = policies[0].first + 36  # (32 + 1) x 128 / 96 of them, and the window
    with pytest.raises(UsageError, match="32 of 128 directions") as caught:
        check_saves(policies, known, enough - 1)
    assert f"takes {enough} tokens to save bytes; the context has {enough - 1}" in str(caught.value)
    assert "layer 0, keys" in str(caught.value)
    check_saves(policies, known, enough)


def test_ranks_of_as_many_directions_as_tokens_are_refused(llama: Any) -> None:
    policies = policies_of(llama, values=own(0.5))
    with pytest.raises(UsageError, match="layer 0, values"):
        check_saves(policies, facts(llama.config), 64)


def test_a_calibrated_basis_is_nobody_s_prompt(llama: Any) -> None:
    policies = policies_of(llama, keys=own(0.5, basis="calibrated"))
    check_saves(policies, facts(llama.config), 1)


def test_codes_behind_a_full_basis_may_save_what_it_alone_does_not(llama: Any) -> None:
    known = facts(llama.config)
    coded = Chain((Svd(rank=1.0), Affine(bits=4, group="head")))
    check_saves(policies_of(llama, keys=coded), known, 512)
    with pytest.raises(UsageError, match="16 bits take"):
        check_saves(policies_of(llama, keys=own(1.0)), known, 512)


def test_a_search_leaves_out_what_saves_nothing_and_says_why_once(llama: Any) -> None:
    known = facts(llama.config)
    chains = (own(0.25), own(0.75), own(0.75, basis="calibrated"))
    made = Opened(4, 32, chains, (Chain((Affine(),)),), shape=(2, 64))
    found, reasons = saving({"": dict.fromkeys(range(4), made)}, known, 300)
    assert {own.keys for own in found[""].values()} == {(chains[0], chains[2])}
    assert len(reasons) == 1
    assert "96 of 128 directions" in reasons[0]


def test_a_side_without_any_setting_that_saves_is_refused(llama: Any) -> None:
    made = Opened(0, 0, (own(0.75),), (Chain((Affine(),)),), shape=(2, 64))
    with pytest.raises(UsageError, match="No setting of layer 0's keys saves bytes"):
        saving({"": {0: made}}, facts(llama.config), 128)


def test_a_proof_at_too_short_a_context_is_refused_before_the_model_runs(
    llama: Any, written: Any
) -> None:
    recipe = written(keys='use = "svd", rank = 0.5')
    with pytest.raises(UsageError, match="64 of 128 directions"):
        prove(llama, None, [Document("a", "b")], recipe, sizes=Sizes(1, 96, 4), steps=4,
              bytes_context=4096)  # fmt: skip


def test_a_frontier_at_too_short_a_context_is_refused(llama: Any, draw: Any, tmp_path: Path,
                                                      written: Any) -> None:  # fmt: skip
    from kvtune.bank import build
    from kvtune.bench.frontier import Frontier

    path = tmp_path / "recipe.toml"
    written(keys='use = "svd", rank = 0.5').save(path)
    bank = build(llama, draw(1, 100), 96)
    with pytest.raises(UsageError, match="64 of 128 directions"):
        Frontier(llama, bank, 4096).point("own", path)
