"""Laws of kvtune/rows.py and kvtune/pages.py: what is exact, what is paged, who shares groups."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_fits import fits_of
from torch import Tensor

from kvtune.cache import sites
from kvtune.models import facts, ropes
from kvtune.pages import Grown
from kvtune.recipe import Policy
from kvtune.rows import Rows

HEADS, DIM = 2, 64


@pytest.fixture
def policy_of(llama: Any, recipe_of: Any) -> Callable[[str], Policy]:
    """Returns the policy of the last layer of a recipe of the list."""
    return lambda name: recipe_of(name).policies(facts(llama.config))[-1]


@pytest.fixture
def rows_of(
    llama: Any, policy_of: Callable[[str], Policy], recipe_of: Any
) -> Callable[[str], Rows]:
    """Makes empty rows under a recipe of the list."""
    rope, last = ropes(llama)[0], len(facts(llama.config).layers) - 1

    def make(name: str) -> Rows:
        return Rows(policy_of(name), sites(last, rope, fits_of(recipe_of(name), llama)))

    return make


def draw(rows: int, count: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, HEADS, count, DIM, dtype=torch.float64, generator=generator).to(dtype)


def stored(rows: Rows) -> list[Tensor]:
    """Returns all that rows hold, [B, *] each: pages, metadata, bases, sinks and window."""
    found = [x for pair in (rows._sinks, rows._recent) if pair for x in pair]
    for pages in (rows.keys, rows.values):
        if pages._body is not None:
            held = [pages._body, *(grown for side in pages._sides for grown in side)]
            found += [*(grown.tensor for grown in held), *pages._learned.values()]
    return found


def learns(policy: Policy) -> bool:
    return any(codec.learns for chain in policy.chains for codec in chain.codecs)


@pytest.mark.parametrize("side", ["keys", "values"])
def test_a_group_never_crosses_heads_or_rows(
    recipe_name: str, side: str, rows_of: Any, policy_of: Any
) -> None:
    apart = all(chain.apart for chain in policy_of(recipe_name).chains)
    x = {"keys": draw(3, 130), "values": draw(3, 130, seed=1)}
    plain, other = rows_of(recipe_name), rows_of(recipe_name)
    plain.fill(**x)
    x[side] = x[side].clone()
    x[side][1, 0] = 100 * x[side][1, 0] + 7
    other.fill(**x)
    changed = 0
    for one, two in zip(stored(plain), stored(other), strict=True):
        same = (one == two).flatten(2).all(-1)
        changed += int((~same).sum())
        same[1, 0 if apart else slice(None)] = True
        assert same.all()
    assert changed > 0


def test_a_group_never_crosses_blocks(recipe_name: str, rows_of: Any, policy_of: Any) -> None:
    policy = policy_of(recipe_name)
    if learns(policy):
        pytest.skip("a basis is of all tokens of a prompt")
    count = policy.sinks + policy.recent + 3 * policy.block
    keys, values = draw(1, count), draw(1, count, seed=1)
    plain, other = rows_of(recipe_name), rows_of(recipe_name)
    plain.fill(keys, values)
    token = policy.sinks + policy.block  # the first of the second block
    keys, values = keys.clone(), values.clone()
    keys[:, :, token], values[:, :, token] = 50.0, -50.0
    other.fill(keys, values)
    for one, two in zip(plain.read(torch.float64), other.read(torch.float64), strict=True):
        same = (one == two).all(-1).all(0).all(0)
        assert same[:token].all()
        assert same[token + policy.block :].all()
        assert not same[token]


@pytest.mark.parametrize("count", [1, 2, 3, 40, 75, 99, 100, 163, 164, 300])
def test_what_is_not_paged_is_exact(
    recipe_name: str, count: int, rows_of: Any, policy_of: Any
) -> None:
    policy, rows = policy_of(recipe_name), rows_of(recipe_name)
    keys, values = draw(2, count), draw(2, count, seed=1)
    rows.fill(keys, values)
    paged = slice(policy.sinks, policy.sinks + policy.due(count))
    for found, exact in zip(rows.read(torch.float64), (keys, values), strict=True):
        assert found.shape == exact.shape
        same = (found == exact).all(-1).all(0).all(0)
        same[paged] = True
        assert same.all()
        fits = any(codec.fits for chain in policy.chains for codec in chain.codecs)
        if policy.due(count) and not fits:  # a fit suits what it was fitted to, and this is noise
            error = (found - exact)[:, :, paged].norm() / exact[:, :, paged].norm()
            assert error < 0.5
    assert rows.keys.tokens == rows.values.tokens == policy.due(count)


def test_rows_grow_as_if_they_had_been_filled_at_once(
    recipe_name: str, rows_of: Any, policy_of: Any
) -> None:
    if learns(policy_of(recipe_name)):
        pytest.skip("a basis is of the tokens that came first")
    keys, values = draw(2, 260), draw(2, 260, seed=1)
    whole, grown = rows_of(recipe_name), rows_of(recipe_name)
    whole.fill(keys, values)
    end = 0
    for size in (70, 1, 1, 31, 90, 1, 66):
        start, end = end, end + size
        k, v = keys[:, :, start:end], values[:, :, start:end]
        grown.attend(k, k, v, None, None)
    for one, two in zip(stored(whole), stored(grown), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("heads", [1, HEADS])
def test_rows_hold_no_more_than_they_store(
    recipe_name: str, heads: int, rows_of: Any, policy_of: Any
) -> None:
    """With one row and one head a slice of the prompt is contiguous, and still must be copied."""
    apart = all(chain.apart for chain in policy_of(recipe_name).chains)
    if heads < HEADS and not apart:
        pytest.skip("a calibrated basis is of all heads")
    rows = rows_of(recipe_name)
    keys, values = draw(1, 200)[:, :heads].clone(), draw(1, 200, seed=1)[:, :heads].clone()
    rows.fill(keys, values)
    assert sum(rows.nbytes) == sum(x.nbytes for x in stored(rows))


def test_what_happens_to_a_fork_leaves_its_trunk(recipe_name: str, rows_of: Any) -> None:
    trunk = rows_of(recipe_name)
    trunk.fill(draw(2, 130), draw(2, 130, seed=1))
    twin = trunk.fork()
    before = [x.clone() for x in stored(trunk)]
    for seed in range(2, 6):
        x = draw(2, 40, seed=seed)
        twin.attend(x, x, x, None, None)
    assert all(map(torch.equal, stored(trunk), before))
    x = draw(2, 40, seed=9)
    again = rows_of(recipe_name)
    again.fill(draw(2, 130), draw(2, 130, seed=1))
    assert torch.equal(trunk.attend(x, x, x, None, None), again.attend(x, x, x, None, None))


def test_what_happens_to_a_trunk_leaves_its_fork(recipe_name: str, rows_of: Any) -> None:
    trunk = rows_of(recipe_name)
    trunk.fill(draw(2, 130), draw(2, 130, seed=1))
    for seed in range(2, 4):  # the trunk now has slack to write into
        x = draw(2, 40, seed=seed)
        trunk.attend(x, x, x, None, None)
    twin = trunk.fork()
    before = [x.clone() for x in stored(twin)]
    x = draw(2, 80, seed=5)
    trunk.attend(x, x, x, None, None)
    assert all(map(torch.equal, stored(twin), before))


def test_selected_rows_are_the_rows(recipe_name: str, rows_of: Any) -> None:
    rows, index = rows_of(recipe_name), torch.tensor([2, 0, 2, 2])
    rows.fill(draw(3, 150), draw(3, 150, seed=1))
    twin = rows.select(index)
    for one, two in zip(stored(rows), stored(twin), strict=True):
        assert torch.equal(one[index], two)
    x = draw(3, 40, seed=2)
    expected = rows.attend(x, x, x, None, None)[index]
    torch.testing.assert_close(twin.attend(x[index], x[index], x[index], None, None), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("count", [1, 2, 33, 150])
def test_outliers_and_constants_stay_finite(
    recipe_name: str, count: int, dtype: torch.dtype, rows_of: Any
) -> None:
    keys, values = draw(2, count, dtype=dtype), draw(2, count, seed=1, dtype=dtype)
    keys[0, 0, :, 3], values[0, 1] = 1e4, 0.25
    keys[1, 0, 0, :], values[1, 1, -1, 5] = -1e4, 1e4
    rows = rows_of(recipe_name)
    rows.fill(keys, values)
    for found in rows.read(dtype):
        assert found.dtype == dtype
        assert found.isfinite().all()
    more = draw(2, 70, seed=3, dtype=dtype)
    assert rows.attend(more, more, more, None, None).isfinite().all()


@pytest.mark.parametrize("offset", [0.0, 30.0, 300.0])
def test_keys_with_a_large_bias_keep_the_accuracy_of_8_bits(offset: float, rows_of: Any) -> None:
    """Statistics are taken after subtracting the minimum, so that only the spread counts."""
    keys = draw(2, 135)
    biased = keys + offset * torch.linspace(-1, 1, DIM, dtype=torch.float64)
    rows = rows_of("k8v8")
    rows.fill(biased, draw(2, 135, seed=1))
    error = (rows.read(torch.float64)[0] - biased).abs().max()
    assert error < 0.02


def test_a_grown_tensor_keeps_little_slack_and_old_content() -> None:
    first = torch.arange(2 * 3 * 5 * 4).reshape(2, 3, 5, 4)
    grown, expected = Grown(first), [first]
    for step in range(1, 200):
        more = torch.full((2, 3, 1 + step % 3, 4), step)
        grown.append(more)
        expected.append(more)
        whole = torch.cat(expected, 2)
        assert torch.equal(grown.tensor, whole)
        assert whole.nbytes <= grown.nbytes <= whole.nbytes * (1 + 1 / 32)


def test_growing_copies_seldom() -> None:
    """With no slack at all, every token would copy the whole store."""
    grown, moves = Grown(torch.zeros(1, 1, 2000, 4)), 0
    for _ in range(400):
        before = grown._held.data_ptr()
        grown.append(torch.ones(1, 1, 1, 4))
        moves += grown._held.data_ptr() != before
    assert 1 <= moves <= 8
