"""Laws of the price table: one backward pass prices what isolated forwards measure."""

from typing import Any

import pytest
import torch

from kvtune.bank import build
from kvtune.calibrate import price_cells, spearman
from kvtune.distortion import distortions
from kvtune.measure import Bench
from kvtune.models import ropes
from kvtune.moments import Moments, attention_mass
from kvtune.prices import exact, pulls, table
from kvtune.recipe import Recipe, loads
from kvtune.space import opened

CONTEXT, MORE = 200, 64
TEMPLATE = """
kvtune = 1
[[layers]]
span = "all"
sinks = 2
recent = 16
kept.keys = [{ use = "affine", bits = "search", group = 32, axis = "channel" }]
kept.values = [{ use = "affine", bits = "search", group = "head", axis = "token" }]
"""


@pytest.fixture
def template() -> Recipe:
    """Opens the bits of keys and values."""
    return loads(TEMPLATE)


@pytest.fixture
def bench(llama: Any, draw: Any) -> Bench:
    """Four sequences of a tiny Llama."""
    return Bench(llama, build(llama, draw(4, CONTEXT + MORE + 1), CONTEXT), ropes(llama))


def quiet(done: int, total: int) -> None:
    """Says nothing."""


def test_prices_rank_cells_as_isolated_forwards_do(bench: Bench, template: Recipe) -> None:
    cells = [
        (cell.layer, policy) for cell, policy in price_cells(opened(template, bench.bank.facts))
    ]
    priced = table(bench, cells, pulls(bench.model, bench.bank, 0), quiet)
    measured = exact(bench, cells, quiet)
    assert len(cells) == 4 * 2 * 4
    assert spearman(priced[:, 0], measured) > 0.9
    assert 0.3 < float(priced[:, 0].sum() / measured.sum()) < 3


def test_pulls_repeat_with_their_seed_and_change_with_it(bench: Bench) -> None:
    first, again, other = (pulls(bench.model, bench.bank, seed)[1].gradient for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_pull_is_the_gradient_at_the_attention_output(bench: Bench) -> None:
    pull = pulls(bench.model, bench.bank, 0)[3]
    # the expected score is zero, so over many positions the mean is small beside its spread
    assert pull.gradient.mean().abs() < 0.1 * pull.gradient.std()
    assert pull.gradient.shape == pull.out.shape == pull.query.shape


def test_more_bits_never_distort_more(bench: Bench, template: Recipe) -> None:
    own = opened(template, bench.bank.facts)[""][0]
    errors = distortions(bench, 0, own)
    assert errors.shape == (4, 4, 4)
    e_k, e_v, e_a, e_o = errors.unbind(-1)
    assert (e_k.diff(dim=0) < 0).all()
    assert (e_v.diff(dim=1) < 0).all()
    assert (e_a.diff(dim=0) < 0).all()
    assert e_o[-1, -1] == e_o.min()


def test_moments_are_those_of_pre_rope_keys(llama: Any, draw: Any) -> None:
    moments = Moments(ropes(llama))
    bank = build(llama, draw(3, CONTEXT + MORE + 1), CONTEXT, observe=moments.observe)
    found = moments.tensors(CONTEXT)
    rope = ropes(llama)[0]
    plain = rope.unturn(bank.keys[1], torch.arange(CONTEXT))
    expected = torch.einsum("bhtd,bhte->hde", plain, plain) / (3 * CONTEXT)
    torch.testing.assert_close(found["moments.keys"][1], expected.float(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["means.values"][2], bank.values[2].mean((0, 2)).float())
    assert found["moments.queries"].shape == (4, 2, 64, 64)


def test_attention_mass_is_shared_out(bench: Bench) -> None:
    mass = attention_mass(bench.bank, sinks=CONTEXT, recent=CONTEXT)
    torch.testing.assert_close(mass["mass.recent"], torch.ones_like(mass["mass.recent"]))
    assert ((mass["mass.coverage90"] > 0) & (mass["mass.coverage90"] < 1)).all()
    assert (mass["mass.entropy"] > 0).all()
