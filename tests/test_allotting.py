"""Laws of the bits of a token's components: exact, within the budget, no worse than one choice."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pytest

from kvtune.allotting import SIDE, SIZES, TYPES, Floats, Group, allot, expected, total
from kvtune.errors import UsageError

SMALL = {"sizes": (1, 2, 4), "types": (0, 2, 4), "side": 3}


def falling(width: int, seed: int = 0) -> Floats:
    """Energies that fall steeply, with bumps."""
    generator = np.random.default_rng(seed)
    return np.exp(-4 * np.arange(width) / width) * generator.uniform(0.3, 3.0, width)


def cost(energies: Floats, groups: list[Group]) -> float:
    """The expected error of all groups."""
    error, start = 0.0, 0
    for size, bits in groups:
        if bits:
            error += float(expected(energies, size, bits)[start])
        else:
            error += float(energies[start : start + size].sum())
        start += size
    return error


def every(width: int) -> Iterator[list[Group]]:
    """All ways to part so many components into SMALL's groups."""
    if not width:
        yield []
    for size, bits in itertools.product(SMALL["sizes"], SMALL["types"]):
        if size <= width and (bits or size == 1):
            yield from ([Group(size, bits), *rest] for rest in every(width - size))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("bits", [0, 4, 9, 14, 25, 60])
def test_no_other_groups_leave_less(bits: int, seed: int) -> None:
    energies = falling(6, seed)
    legal = [groups for groups in every(6) if total(groups, SMALL["side"]) <= bits]
    found = allot(energies, bits, **SMALL)
    assert total(found, SMALL["side"]) <= bits
    best = min(cost(energies, groups) for groups in legal)
    assert cost(energies, found) == pytest.approx(best, rel=1e-9)


@pytest.mark.parametrize("bits", [0, 31, 100, 700, 2000])
def test_groups_cover_all_components_once_within_the_budget(bits: int) -> None:
    found = allot(falling(300), bits)
    assert sum(size for size, _ in found) == 300
    assert total(found) <= bits
    assert all(size in SIZES and kind in TYPES for size, kind in found if kind)
    assert not any(a.bits == b.bits == 0 for a, b in itertools.pairwise(found))


@pytest.mark.parametrize("size", [16, 64, 256])
@pytest.mark.parametrize("kind", [2, 4, 8])
def test_one_size_and_one_type_for_all_is_never_better(size: int, kind: int) -> None:
    energies = falling(256)
    uniform = [Group(size, kind)] * (256 // size)
    bits = total(uniform)
    assert cost(energies, allot(energies, bits)) <= cost(energies, uniform) * (1 + 1e-9)


def test_more_bits_never_leave_more_error() -> None:
    energies = falling(128)
    errors = [cost(energies, allot(energies, bits)) for bits in range(0, 1200, 100)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < errors[0] / 50


def test_weak_components_behind_strong_ones_are_dropped() -> None:
    energies = np.concatenate([np.full(16, 100.0), np.full(64, 1e-6)])
    assert allot(energies, 16 * 8 + SIDE) == [Group(16, 8), Group(64, 0)]


def test_measured_errors_replace_expected_ones() -> None:
    energies = np.ones(32)
    useless = allot(energies, 500, errors=lambda x, size, bits: np.full(33 - size, 1e9))
    assert useless == [Group(32, 0)]


def test_a_thousand_normal_values_are_coded_as_expected() -> None:
    values = np.random.default_rng(0).standard_normal((200, 1024))
    low, high = values.min(1, keepdims=True), values.max(1, keepdims=True)
    step = (high - low) / 15
    error = float((((values - low) / step).round() * step + low - values).__pow__(2).sum(1).mean())
    assert float(expected(np.ones(1024), 1024, 4)[0]) == pytest.approx(error, rel=0.25)


@pytest.mark.parametrize("size", [1, 16, 48, 256])
def test_what_is_expected_of_weak_components_does_not_depend_on_strong_ones(size: int) -> None:
    weak = falling(256) * 1e-9
    behind = expected(np.concatenate([np.ones(40), weak]), size, 2)[40:]
    np.testing.assert_allclose(behind, expected(weak, size, 2), rtol=1e-6)


@pytest.mark.parametrize("width", [0, 1])
def test_hardly_any_components_are_fine(width: int) -> None:
    assert sum(size for size, _ in allot(np.ones(width), 100)) == width


@pytest.mark.parametrize(
    "wrong", [{"energies": [-1.0]}, {"energies": [float("nan")]}, {"bits": -1}, {"sizes": (0,)}]
)
def test_what_cannot_be_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        allot(**{"energies": [1.0, 2.0], "bits": 40, **wrong})  # type: ignore[arg-type]
