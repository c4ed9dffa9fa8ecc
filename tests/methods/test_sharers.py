"""Laws of sharers: xkv and minicache, on tensors; and what groups weigh."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from kvtune import parts
from kvtune.chains import Chain
from kvtune.methods.derope import Derope
from kvtune.methods.minicache import Minicache, slerp
from kvtune.methods.svd import Svd
from kvtune.methods.xkv import Xkv
from kvtune.pages import Pages
from kvtune.parts import Code, Sharer, Site

HEADS, DIM, TOKENS = 2, 16, 192
SIDES = ("keys", "values")
SHARERS = [Xkv(), Xkv(centre=True), Minicache(), Minicache(retain="similar", retained=0.2)]
every_sharer = pytest.mark.parametrize("sharer", SHARERS, ids=str)
every_side = pytest.mark.parametrize("side", SIDES)


def draw(layers: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """Layers [3, H, T, D] that have much, not all, in common."""
    g = torch.Generator().manual_seed(seed)
    common = torch.randn(3, HEADS, TOKENS, DIM, dtype=torch.float64, generator=g)
    own = torch.randn(layers, 3, HEADS, TOKENS, DIM, dtype=torch.float64, generator=g)
    return tuple((common + 0.3 * x).to(dtype) for x in own)


@pytest.fixture
def sites_of(rope_of: Any) -> Any:
    """Makes the sites of a group's layers."""

    def make(side: Any, layers: int, first: int = 5, count: int = TOKENS) -> tuple[Site, ...]:
        positions, rope = torch.arange(first, first + count), rope_of(DIM)
        return tuple(Site(i, side, positions, torch.float64, rope) for i in range(layers))

    return make


def learned(
    sharer: Sharer, layers: tuple[Tensor, ...], sites: tuple[Site, ...]
) -> tuple[Site, ...]:
    found = sharer.learn(layers, sites)
    named = {f"{sharer.name()}.{name}": x for name, x in found.items()}
    return tuple(replace(site, tensors=named) for site in sites)


def back(sharer: Sharer, code: Code, sites: tuple[Site, ...]) -> list[Tensor]:
    return [sharer.unfold(code, i, site) for i, site in enumerate(sites)]


@every_side
@pytest.mark.parametrize("count", [1, 2])
@every_sharer
def test_equal_layers_lose_nothing_that_a_full_rank_keeps(
    sharer: Sharer, count: int, side: str, sites_of: Any
) -> None:
    if isinstance(sharer, Xkv):
        sharer = sharer.model_copy(update={"key_rank": 1.0, "value_rank": 1.0})
    layers, sites = draw(1) * count, sites_of(side, count)
    sites = learned(sharer, layers, sites)
    for found in back(sharer, sharer.fold(layers, sites), sites):
        torch.testing.assert_close(found, layers[0], atol=1e-5, rtol=1e-5)


@every_side
@every_sharer
def test_the_body_has_the_shape_that_was_foretold(sharer: Sharer, side: str, sites_of: Any) -> None:
    layers = draw(2)
    sites = learned(sharer, layers, sites_of(side, 2))
    code = sharer.fold(layers, sites)
    heads, channels = sharer.shape(side, 2, HEADS, DIM)
    assert code.body.shape == (3, heads, TOKENS, channels)
    for x, found in zip(layers, back(sharer, code, sites), strict=True):
        assert found.shape == x.shape
        assert found.dtype == torch.float64
        assert 0.01 < (found - x).norm() / x.norm() < 0.9


@every_side
@every_sharer
def test_rows_do_not_know_each_other(sharer: Sharer, side: str, sites_of: Any) -> None:
    layers, other = draw(2), draw(2)
    other[1][1] += 9.0
    read = []
    for given in (layers, other):
        sites = learned(sharer, given, sites_of(side, 2))
        read.append(back(sharer, sharer.fold(given, sites), sites))
    for one, two in zip(*read, strict=True):
        torch.testing.assert_close(one[[0, 2]], two[[0, 2]], atol=0, rtol=0)
        assert not torch.equal(one[1], two[1])


@every_side
@pytest.mark.parametrize("rank", [8, 16, 24])
def test_one_layer_is_stored_as_its_own_svd_stores_it(rank: int, side: str, sites_of: Any) -> None:
    share = rank / (HEADS * DIM)
    (x,), sites = draw(1), sites_of(side, 1)
    xkv = Xkv(layers=1, key_rank=share, value_rank=share)
    sites = learned(xkv, (x,), sites)
    (found,) = back(xkv, xkv.fold((x,), sites), sites)
    svd = Svd(rank=share, heads="all", centre="none")
    chain = Chain((Derope(), svd) if side == "keys" else (svd,))
    pages = Pages(chain, lambda *_: replace(sites[0], tensors={}), 5)
    pages.append(x)
    torch.testing.assert_close(found, pages.read(torch.float64), atol=2e-4, rtol=1e-4)


@every_side
def test_no_factors_of_a_rank_come_nearer(side: str, sites_of: Any, rope_of: Any) -> None:
    """As the theorem of Eckart and Young says of a full SVD of what stands side by side."""
    layers, xkv = draw(2), Xkv(layers=2, key_rank=0.25, value_rank=0.25)
    sites = learned(xkv, layers, sites_of(side, 2))
    read = back(xkv, xkv.fold(layers, sites), sites)

    def flat(found: Any) -> Tensor:
        turned = [
            rope_of(DIM).unturn(x, sites[0].positions) if side == "keys" else x for x in found
        ]
        return torch.cat([x.transpose(1, 2).flatten(2) for x in turned], -1)

    error = (flat(read) - flat(layers)).square().sum((1, 2))
    left = torch.linalg.svdvals(flat(layers))[:, 16:].square().sum(1)
    torch.testing.assert_close(error, left, rtol=1e-4, atol=1e-6)


def test_later_tokens_are_stored_on_the_same_factors(sites_of: Any) -> None:
    layers, xkv = draw(2), Xkv(layers=2, centre=True)
    sites = learned(xkv, layers, sites_of("keys", 2))
    whole = xkv.fold(layers, sites).body
    cut = [
        xkv.fold(
            tuple(x[:, :, a : a + 64] for x in layers),
            tuple(replace(site, positions=site.positions[a : a + 64]) for site in sites),
        ).body
        for a in range(0, TOKENS, 64)
    ]
    torch.testing.assert_close(torch.cat(cut, 2), whole, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("t", [0.0, 0.3, 0.6, 1.0])
def test_slerp_goes_along_the_arc_at_an_even_pace(t: float) -> None:
    g = torch.Generator().manual_seed(1)
    one, two = torch.nn.functional.normalize(torch.randn(2, 40, 8, generator=g).double(), dim=-1)
    cosine = (one * two).sum(-1, keepdim=True)
    found = slerp(one, two, cosine, t)
    torch.testing.assert_close(found.norm(dim=-1), torch.ones(40).double())
    along = (found * one).sum(-1).clamp(-1, 1).acos()
    torch.testing.assert_close(along, t * cosine[:, 0].acos(), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("scale", [0.0, 1e-12, 1e-6])
def test_directions_that_are_near_parallel_stay_finite(scale: float) -> None:
    one = torch.nn.functional.normalize(torch.randn(40, 8).double(), dim=-1)
    two = torch.nn.functional.normalize(one + scale * torch.randn(40, 8), dim=-1)
    found = slerp(one, two, (one * two).sum(-1, keepdim=True).clamp(-1, 1), 0.6)
    torch.testing.assert_close(found, one, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.norm(dim=-1), torch.ones(40).double())


@pytest.mark.parametrize("retain", ["dissimilar", "similar"])
def test_retained_tokens_are_exact_in_both_layers_and_those_of_extreme_angles(
    retain: Any, sites_of: Any
) -> None:
    part = Minicache(retained=0.1, retain=retain)
    layers, sites = draw(2), sites_of("values", 2)
    read = back(part, part.fold(layers, sites), sites)
    exact = [(one == two).all(-1) for one, two in zip(layers, read, strict=True)]
    assert torch.equal(exact[0], exact[1])
    assert (exact[0].sum(-1) == round(0.1 * TOKENS)).all()
    cosine = torch.nn.functional.cosine_similarity(*layers, dim=-1)
    for head, kept in zip(cosine.flatten(0, 1), exact[0].flatten(0, 1), strict=True):
        if retain == "dissimilar":
            assert head[kept].max() <= head[~kept].min()
        else:
            assert head[kept].min() >= head[~kept].max()


def test_lengths_stay_with_their_layers(sites_of: Any) -> None:
    part, sites = Minicache(retained=0.0), sites_of("values", 2)
    layers = tuple(x * scale for x, scale in zip(draw(2), (1.0, 7.0), strict=True))
    for x, found in zip(layers, back(part, part.fold(layers, sites), sites), strict=True):
        torch.testing.assert_close(found.norm(dim=-1), x.norm(dim=-1))


def test_a_vector_of_zeros_is_merged_to_something_finite(sites_of: Any) -> None:
    part, sites, layers = Minicache(), sites_of("values", 2), draw(2)
    layers[0][0, 0] = 0.0
    for found in back(part, part.fold(layers, sites), sites):
        assert found.isfinite().all()


@pytest.mark.parametrize(
    ("table", "why"),
    [
        ({"use": "xkv", "layers": 3}, "layers"),
        ({"use": "xkv", "key_rank": 0.1}, "0.1 is not a share"),
        ({"use": "xkv", "key_rank": 0.0}, "not a share"),
        ({"use": "xkv", "value_rank": 1.5}, "not a share"),
        ({"use": "xkv", "block": 48}, "block"),
        ({"use": "minicache", "layers": 4}, "layers"),
        ({"use": "minicache", "t": 0.55}, "t"),
        ({"use": "owner", "layer": -1}, "layer"),
    ],
    ids=str,
)
def test_settings_that_cannot_be_are_refused(table: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        parts.parse(table)


@pytest.mark.parametrize("layers", [1, 2, 4, 8])
def test_a_group_wants_as_many_tokens_as_make_it_smaller(layers: int) -> None:
    """Factors of r (T + w) values are fewer than T w from there on."""
    for share, width in itertools.product((4 / 64, 0.25, 0.75), (32, 1024)):
        xkv = Xkv(layers=layers, key_rank=share, value_rank=share)
        least, wide = xkv.least(layers, 1, width), layers * width
        rank = xkv.shape("keys", layers, 1, width)[1]
        assert rank * (least + wide) < least * wide
        assert rank * (least - 1 + wide) >= (least - 1) * wide
