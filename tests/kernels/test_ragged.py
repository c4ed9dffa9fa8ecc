"""Laws of ragged heads: each is read as if it were alone, by both implementations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kvtune_kernels import (
    Exact,
    Format,
    Packed,
    Window,
    Workspace,
    attend_packed,
    encode_into,
    implementation,
    plane_table,
    ragged_launch,
)
from kvtune_kernels.ragged_launch import attend_ragged, unsupported_ragged
from ragged_layers import FOUR, SIDES, TWO_PAGES, Layer, ask, by_the_book, layer
from torch import Tensor

pytest.importorskip("triton")
# the interpreter is numpy, which speaks of what `tl.where` then leaves out
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")

NEAR = 0.015  # of an answer's norm


def check(found: Layer, query: Tensor, near: float = NEAR, **more: Any) -> None:
    """Both implementations answer by the book."""
    true = by_the_book(found, query, **more)
    for name in ("reference", "triton"):
        with implementation(name):
            out = found.attend(query, **more)
        assert out.dtype == query.dtype and out.shape == query.shape
        assert float((out - true).norm()) <= near * float(true.norm()), name


@pytest.mark.parametrize(
    ("sides", "dim"), [*((sides, 64) for sides in SIDES), ("16 bits", 128), (TWO_PAGES, 128)]
)
def test_every_head_reads_the_tokens_that_it_keeps(
    sides: str, dim: int, device: torch.device
) -> None:
    found = layer(SIDES[sides], device, dim=dim)
    check(found, ask(found))


@pytest.mark.parametrize("dim", [16, 80, 96, 256])
@pytest.mark.parametrize("sides", ["16 bits", "8 bits per channel"])
def test_head_dims_of_all_sizes(sides: str, dim: int, device: torch.device) -> None:
    formats = (None, None) if sides == "16 bits" else (Format(8, 32, False), Format(8, dim, True))
    found = layer(formats, device, [[70]], dim)
    check(found, ask(found))


@pytest.mark.parametrize(("share", "count"), [(1, 1), (3, 5), (4, 1), (8, 1), (8, 5)])
@pytest.mark.parametrize("sides", ["16 bits", TWO_PAGES])
def test_query_heads_and_queries_share_a_page(
    sides: str, share: int, count: int, device: torch.device
) -> None:
    """Up to 40 columns, which take two programs; queries see one another as they follow."""
    found = layer(SIDES[sides], device, [[0, 65]])
    check(found, ask(found, share, count))


@pytest.mark.parametrize(("scale", "softcap"), [(0.31, None), (None, 30.0), (0.31, 0.5)])
@pytest.mark.parametrize("sides", ["16 bits", "2 bits per channel"])
def test_logits_are_scaled_and_capped(
    sides: str, scale: float | None, softcap: float | None, device: torch.device
) -> None:
    found = layer(SIDES[sides], device, [[66]])
    check(found, ask(found), scale=scale, softcap=softcap)


def test_float16_is_read(device: torch.device) -> None:
    for sides in ((None, None), FOUR):
        found = layer(sides, device, [[64]], dtype=torch.float16)
        check(found, ask(found), 0.003)


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("sides", ["16 bits", "2 bits per channel"])
def test_heads_without_tokens_answer_from_exact_ones_or_nothing(
    sides: str, impl: str, device: torch.device
) -> None:
    found = layer(SIDES[sides], device, [[0, 0]], exact=9)
    check(found, ask(found))
    nothing = layer(SIDES[sides], device, [[0, 65], [0, 0]], exact=0)
    with implementation(impl):
        out = nothing.attend(ask(nothing))
    assert out.isfinite().all() and (out[:, :2] == 0).all() and (out[1] == 0).all()
    assert (out[0, 2:] != 0).any()


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("sides", ["16 bits", TWO_PAGES])
def test_rows_know_exact_tokens_of_their_own(sides: str, impl: str, device: torch.device) -> None:
    """What lies behind them may be NaN."""
    found, counts = layer(SIDES[sides], device, [[3], [65]]), [20, 4]
    query = ask(found, count=2)
    known = torch.tensor(counts, dtype=torch.int32, device=device)
    for b, count in enumerate(counts):
        for x in found.exact:
            x[b, :, count:] = torch.nan
    with implementation(impl):
        out = found.attend(query, known=known)
    for b, count in enumerate(counts):
        cut = found._replace(exact=tuple(x[:, :, :count] for x in found.exact))
        true = by_the_book(cut, query)[b]
        assert float((out[b] - true).norm()) <= NEAR * float(true.norm())


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_equal_lengths_are_read_as_packed_pages_are(
    bits: int, impl: str, device: torch.device
) -> None:
    """The same tokens in a rectangle, with the exact ones in a ring behind them."""
    formats, count, exact = (Format(bits, 64, False), Format(bits, 64, True)), 128, 16
    found = layer(formats, device, [[count], [count]], exact=exact)
    packed = []
    for format, x, is_keys in zip(formats, found.kept, (True, False), strict=True):
        side = Packed.empty(format, 2, 1, count, 64, device)
        encode_into(side, x[found.marks].view(2, 1, count, 64), 0, is_keys)
        packed.append(side)
    state = torch.tensor([[count + exact], [count], [count]], dtype=torch.int32, device=device)
    query = ask(found, 4)
    with implementation(impl):
        out = found.attend(query)
        true = attend_packed(
            query, *packed, Exact(*found.exact), state.repeat(1, 2).contiguous(), Window(0, 0, 64)
        )
    assert float((out - true).float().norm()) <= 0.005 * float(true.float().norm())


@pytest.mark.parametrize("room", [1, 5, 4096])
@pytest.mark.parametrize("sides", ["16 bits", TWO_PAGES])
def test_how_heads_are_split_does_not_matter(
    sides: str, room: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ragged_launch, "slots", lambda device, dim, columns: room)
    monkeypatch.setattr(ragged_launch, "slots_16", lambda device, wide: room)
    found = layer(SIDES[sides], device, [[130, 0, 3]])
    check(found, ask(found))


@pytest.mark.parametrize("sides", ["16 bits", "8 bits per token"])
def test_a_shared_workspace_changes_no_bit_of_the_answer(sides: str, device: torch.device) -> None:
    found, workspace = layer(SIDES[sides], device), Workspace()
    other = layer(SIDES[sides], device, [[130]])
    with implementation("triton"):
        one = found.attend(ask(found))
        other.attend(ask(other, 4), workspace=workspace)
        assert torch.equal(found.attend(ask(found), workspace=workspace), one)


def test_planes_of_mixed_bits_are_read_of_each_head(device: torch.device) -> None:
    counts = torch.tensor([[2] * 32 + [1] * 32, [1] * 32 + [2] * 32])
    planes = plane_table(counts).to(device)
    formats = Format(2, 32, False, planes.shape[1]), Format(2, 64, True)
    found = layer(formats, device, [[70, 0], [0, 5]], planes=planes)
    check(found, ask(found, 4))


def test_what_no_kernel_reads_is_read_in_plain_torch(device: torch.device) -> None:
    found = layer((None, Format(4, 64, True)), device, [[70, 3]])
    query = ask(found)
    given = (query, found.keys, found.values, found.exact[0])
    assert "16 bits" in str(unsupported_ragged(*given))
    with implementation("reference"):
        out = found.attend(query)
    true = by_the_book(found, query)
    assert float((out - true).norm()) <= NEAR * float(true.norm())
    wide = layer((None, None), device, [[70, 3]], dtype=torch.float32)
    assert "float32" in str(unsupported_ragged(ask(wide), wide.keys, wide.values, wide.exact[0]))
    with implementation("reference"):
        out = wide.attend(ask(wide)).double()
    torch.testing.assert_close(out, by_the_book(wide, ask(wide)), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("sides", ["16 bits", TWO_PAGES])
def test_answers_over_several_stores_merge_by_what_is_told(
    sides: str, softcap: float | None, impl: str, device: torch.device
) -> None:
    found = layer(SIDES[sides], device)
    bare = layer((None, None), device, [[0] * found.marks.shape[1]] * 2)
    query = ask(found)
    none = torch.zeros(2, dtype=torch.int32, device=device)
    told = torch.empty(2, *query.shape[:3], device=device)
    given: dict[str, Any] = {"scale": 0.3, "softcap": softcap}
    with implementation(impl):
        kept = found.attend(query, known=none, told=told[0], **given)
        exact = attend_ragged(query, bare.keys, bare.values, *found.exact, told=told[1], **given)
        whole = found.attend(query, **given)
    assert told[0, 0, :2].isneginf().all(), "a head without tokens"
    weights = told.softmax(0)[..., None]
    both = kept * weights[0] + exact * weights[1]
    assert float((both - whole).norm()) <= NEAR * float(whole.norm())
