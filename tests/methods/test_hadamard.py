"""Laws of kvtune/methods/hadamard.py: an orthonormal turn for heads of many sizes."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from kvtune import parts
from kvtune.chains import Chain
from kvtune.methods.hadamard import Hadamard
from kvtune.orthogonal import paley
from kvtune.parts import Codec, Site

SIZES = (1, 2, 12, 16, 20, 24, 40, 48, 64, 80, 96, 128, 160, 192, 256, 320)
OTHER = (0, 3, 6, 10, 28, 36, 60, 72, 100, 112, 144, 200)


def site(count: int, side: Literal["keys", "values"] = "keys") -> Site:
    return Site(0, side, torch.arange(count), torch.float64)


def matrix(size: int) -> Tensor:
    """Returns what the turn multiplies by: where each unit vector goes."""
    units = torch.eye(size, dtype=torch.float64)[None, None]
    return Hadamard().encode(units, site(size)).body[0, 0]


@pytest.mark.parametrize("order", [12, 20])
def test_paley_gives_signs_of_orthogonal_rows(order: int) -> None:
    rows = torch.tensor(paley(order))
    assert rows.shape == (order, order)
    assert torch.equal(rows.abs(), torch.ones_like(rows))
    assert torch.equal(rows @ rows.T, order * torch.eye(order, dtype=rows.dtype))


@pytest.mark.parametrize("size", SIZES)
def test_the_turn_is_orthonormal_and_spreads_evenly(size: int) -> None:
    Hadamard().check(size, "keys")
    Hadamard().check(size, "values")
    found = matrix(size)
    torch.testing.assert_close(found @ found.T, torch.eye(size, dtype=torch.float64))
    torch.testing.assert_close(found.abs(), torch.full_like(found, size**-0.5))


@pytest.mark.parametrize("size", SIZES)
def test_the_way_back_is_the_transpose(size: int) -> None:
    x = torch.randn(2, 3, 5, size, dtype=torch.float64, generator=torch.manual_seed(0))
    code = Hadamard().encode(x, site(5))
    torch.testing.assert_close(code.body, x @ matrix(size))
    torch.testing.assert_close(Hadamard().decode(code, site(5)), x)


@pytest.mark.parametrize("size", SIZES)
def test_turned_queries_score_turned_keys_as_before(size: int) -> None:
    keys, queries = torch.randn(2, 1, 1, 7, size, dtype=torch.float64)
    turned = [Hadamard().encode(x, site(7)).body for x in (queries, keys)]
    torch.testing.assert_close(turned[0] @ turned[1].mT, queries @ keys.mT)


@pytest.mark.parametrize("size", OTHER)
def test_a_size_without_a_matrix_is_refused_in_words(size: int) -> None:
    with pytest.raises(ValueError, match=f"head_dim {size} is none of them"):
        Hadamard().check(size, "keys")


def chain(*tables: dict[str, Any]) -> Chain:
    codecs = [parts.parse(table) for table in tables]
    return Chain(tuple(codec for codec in codecs if isinstance(codec, Codec)))


@pytest.mark.parametrize("size", [64, 96, 80, 128])
def test_outlying_channels_cost_less_after_the_turn(size: int) -> None:
    """What it is for: a group along the channels is spoilt by one outlier."""
    x = torch.randn(1, 2, 128, size, generator=torch.manual_seed(0)).double()
    x[..., 3] *= 30
    codes = {"use": "affine", "bits": 4, "group": "head", "axis": "token"}
    errors = []
    for own in (chain(codes), chain({"use": "hadamard"}, codes)):
        own.check(1, size, "keys")
        back = own.decode(own.encode(x, site(128)), site(128))
        errors.append(float((back - x).norm()))
    plain, turned = errors
    assert turned < 0.5 * plain


def test_a_turned_chain_has_the_format_of_its_codes() -> None:
    codes = {"use": "affine", "bits": 4, "group": "head", "axis": "token"}
    assert chain(codes).format(64) is not None
    assert chain({"use": "hadamard"}, codes).format(64) == chain(codes).format(64)
    assert chain({"use": "hadamard"}, codes).payload_bits == 4
    assert Hadamard().payload_bits == 16
