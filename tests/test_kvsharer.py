"""Laws of KVSharer's search: which pairs come first, what a map may hold, and what it costs."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from kvtune.errors import UsageError
from kvtune.kvsharer import (
    Pair,
    allowed,
    averages,
    last_hidden,
    neighbours,
    policies_of,
    ranked,
    search,
)
from kvtune.models import facts


@pytest.fixture(scope="module")
def small(model_of: Any) -> Any:
    return model_of("llama", num_hidden_layers=5, head_dim=16)


def test_averages_are_those_of_the_texts(small: Any, draw: Any) -> None:
    tokens = draw(3, 20)
    found = averages(small, tokens)
    apart = [averages(small, row) for row in tokens.split(1)]
    for index, both in found.items():
        assert both.shape == (2, 2, 20, 16)
        mean = torch.stack([one[index] for one in apart]).mean(0)
        torch.testing.assert_close(both, mean, atol=1e-5, rtol=1e-5)


def test_the_largest_distance_comes_first_and_owners_come_before_borrowers() -> None:
    layers = {i: torch.full((2, 1, 3, 4), float(value)) for i, value in enumerate((0, 5, 1, 9))}
    found = ranked(layers)
    assert [pair.distance for pair in found] == sorted(
        (pair.distance for pair in found), reverse=True
    )
    assert (found[0].owner, found[0].borrower) == (0, 3)
    assert len(found) == 6
    assert all(pair.owner < pair.borrower for pair in found)
    odd = {**layers, 4: torch.zeros(2, 1, 3, 8)}
    assert ranked(odd) == found, "heads of another shape cannot be read"


def test_a_layer_borrows_once_and_never_lends_what_it_borrows() -> None:
    for (a, b), (c, d) in itertools.product(itertools.combinations(range(4), 2), repeat=2):
        taken = allowed({b: a}, Pair(c, d, 1.0))
        assert taken == (d != b and c != b and d != a)


@pytest.mark.parametrize("shares", [1, 2])
def test_each_step_shares_one_layer_more(small: Any, shares: int, draw: Any) -> None:
    tokens = draw(2, 24)
    steps = search(small, tokens, shares, threshold=-1.0)
    assert [len(step.owners) for step in steps] == list(range(1, shares + 1))
    first = ranked(averages(small, tokens))[0]
    assert steps[0].pair == first
    for before, after in itertools.pairwise(steps):
        assert before.owners.items() < after.owners.items()
    policies = policies_of(steps[-1].owners, 5)
    assert sum(policy.borrower is not None for policy in policies) == shares


def test_a_map_that_changes_too_much_is_not_taken(small: Any, draw: Any) -> None:
    tokens = draw(2, 24)
    (free,) = search(small, tokens, 1, threshold=-1.0)
    strict = search(small, tokens, 1, threshold=free.cosine)[0]
    assert strict.pair != free.pair
    assert strict.cosine > free.cosine
    with pytest.raises(UsageError, match="Only 0 of 1 layers can share with a cosine above 1"):
        search(small, tokens, 1, threshold=1.0)


def test_hidden_states_without_a_map_are_the_models(small: Any, draw: Any) -> None:
    tokens = draw(2, 24)
    found = last_hidden(small, tokens, {})
    with torch.no_grad():
        dense = small(tokens, output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(found, dense.float(), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(last_hidden(small, tokens, {3: 1}), found, atol=1e-2)


def test_neighbours_are_all_pairs_within_reach(small: Any) -> None:
    found = neighbours(facts(small.config).compressible(), 2)
    assert found == [{1: 0}, {2: 0}, {2: 1}, {3: 1}, {3: 2}, {4: 2}, {4: 3}]
