"""Laws of cskv: its ranks, its closed form, its bias, and what it is in a whole cache."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from method_cases import HEADS, seen
from tiny_fits import fits_of
from torch import Tensor

from kvtune import parts
from kvtune.cache import load
from kvtune.errors import UsageError
from kvtune.methods.cskv import Cskv
from kvtune.models import facts
from kvtune.parts import Site


def site_of(tensors: dict[str, Tensor], tokens: int) -> Site:
    named = {f"cskv.{name}": x for name, x in tensors.items()}
    return Site(0, "keys", torch.arange(tokens), torch.float64, None, named)


def error(codec: Cskv, tensors: dict[str, Tensor], x: Tensor, weight: Tensor) -> float:
    """The mean of e^T weight e over the errors e of tokens."""
    site = site_of(tensors, x.shape[2])
    e = codec.decode(codec.encode(x, site), site).double() - x.double()
    return float(torch.einsum("bhtd,hde,bhte->", e, weight, e)) / x.shape[2]


@pytest.mark.parametrize("shrink", [0.25, 0.5, 0.8, 0.875])
@pytest.mark.parametrize(("heads", "dim"), [(3, 64), (8, 128), (1, 80), (2, 16)])
def test_ranks_are_whole_bytes_of_codes(shrink: float, heads: int, dim: int) -> None:
    groups, rank = Cskv(shrink=shrink).shape(heads, dim)
    assert (groups, rank % 8) == (1, 0)
    assert abs(rank - (1 - shrink) * heads * dim) <= 4 or rank == 8


def test_nothing_left_out_changes_nothing(llama: Any, written: Any, draw: Any, play: Any) -> None:
    whole = 'use = "cskv", shrink = 0.0'
    recipe = written(keys=f'use = "derope" > {whole}', values=whole, sinks=3, recent=7)
    cache = load(recipe, llama, tensors=fits_of(recipe, llama))
    empty = load(written(), llama)
    tokens = draw(2, 60)
    found, exact = (play(llama, own, tokens, [40, 10, 10]) for own in (cache, empty))
    torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("side", ["keys", "values"])
@pytest.mark.parametrize("shrink", [0.5, 0.8])
def test_no_other_maps_of_a_rank_cost_less(side: str, shrink: float) -> None:
    codec, known = Cskv(shrink=shrink), seen(64, side)
    if side == "values":  # whose bias is what attention gives out on average
        known = replace(known, readers=known.readers + 0.3 * known.mean[:, None])
    own, x = codec.fit(known), known.sample[None]
    least = error(codec, own, x, known.weight)
    generator = torch.Generator().manual_seed(4)
    for name in ("down", "up"):
        for size in (0.01, 0.1):
            noise = torch.randn(own[name].shape, generator=generator) * own[name].float().std()
            moved = {**own, name: own[name] + size * noise.half()}
            assert error(codec, moved, x, known.weight) > least
    alike = codec.fit(replace(known, weight=torch.eye(64).double().expand(HEADS, -1, -1)))
    assert error(codec, alike, x, known.weight) > least


@pytest.mark.parametrize("large", [0.0, 20.0])
def test_a_large_bias_costs_no_channel(large: float) -> None:
    """As key projections of Qwen2 have; without a place for it, it would take a direction and the
    precision of all codes."""
    codec, known = Cskv(shrink=0.8), seen(64, "keys")
    shift = large * torch.randn(HEADS, 64, generator=torch.Generator().manual_seed(2)).double()
    mean = known.mean + shift
    biased = replace(known, mean=mean, sample=known.sample + shift[:, None])
    x = biased.sample[None]
    flat = mean.flatten()
    none = torch.zeros_like(mean)
    together = known.together
    assert together is not None
    about_zero = replace(biased, mean=none, together=together + flat[:, None] * flat)
    with_bias = error(codec, codec.fit(biased), x, known.weight)
    assert with_bias <= error(codec, codec.fit(about_zero), x, known.weight)
    still = error(codec, codec.fit(known), known.sample[None], known.weight)
    assert with_bias == pytest.approx(still, rel=1e-2)


def test_what_follows_sees_the_channels_that_are_kept() -> None:
    codec, known = Cskv(shrink=0.75), seen(64, "keys")
    site = site_of(codec.fit(known), known.sample.shape[1])
    kept = codec.encode(known.sample[None], site).body[0].double()
    behind = codec.behind(known, site)
    assert behind.mean.shape == (1, 64)
    torch.testing.assert_close(behind.sample, kept, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(behind.mean, kept.mean(1), rtol=1e-4, atol=1e-2)
    centred = kept - kept.mean(1, keepdim=True)
    spread = centred.transpose(1, 2) @ centred / kept.shape[1]
    torch.testing.assert_close(behind.covariance, spread, rtol=1e-3, atol=1e-3)


def test_a_share_is_one_of_those_that_papers_name() -> None:
    with pytest.raises(ValueError, match=r"0\.9 is not one of"):
        parts.parse({"use": "cskv", "shrink": 0.9})


def test_groups_of_four_heads_do_not_part_three(model_of: Any, written: Any) -> None:
    """Palu's groups on the demo model's heads: refused in words, and one group of all is taken."""
    known = facts(model_of("llama", num_key_value_heads=3, num_attention_heads=3).config)
    svd = 'use = "svd", rank = 0.5, basis = "calibrated", heads = '
    with pytest.raises(UsageError, match="svd takes 4 heads together, which do not part 3 kv"):
        written(values=f"{svd}4").policies(known)
    assert written(values=f'{svd}"all"').policies(known)
