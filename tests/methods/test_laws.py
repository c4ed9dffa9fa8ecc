"""The laws of every method found in kvtune/methods, over the settings that its marks allow."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from method_cases import ALL, CODECS, DTYPES, HEADS, KINDS, draw, home, marked, settings
from torch import Tensor

from kvtune import parts
from kvtune.parts import Borrower, Code, Codec, Part, Projection, Sharer, Site
from kvtune.retention import Allocator, Merger, Selector
from kvtune.shortening import Shortener

every_method = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
every_part = pytest.mark.parametrize("part", ALL, ids=str)
every_codec = pytest.mark.parametrize("codec", CODECS, ids=str)


def tensors(code: Code) -> list[Tensor]:
    return [code.body, *code.side]


def error(codec: Codec, site: Site, x: Tensor) -> float:
    return float((codec.decode(codec.encode(x, site), site) - x).norm() / x.norm())


@every_method
def test_a_method_is_of_a_kind_that_has_laws_here(kind: type[Part]) -> None:
    known = Codec | Selector | Merger | Allocator | Sharer | Borrower | Shortener
    assert issubclass(kind, known), f"write the laws of a {kind.kind} into this folder"


@every_method
def test_the_first_line_tells_what_a_method_does(kind: type[Part]) -> None:
    assert kind.__doc__ and kind.__doc__.strip().splitlines()[0].endswith(".")
    assert kind.name() in KINDS


@every_method
def test_defaults_are_valid_somewhere(kind: type[Part]) -> None:
    assert home(kind())


@every_method
def test_a_method_needs_only_what_there_is(kind: type[Part]) -> None:
    known = {"attention", "queries", "positions", "output", "rope", "replay", "ahead", "kinds"}
    assert kind.needs <= known


@every_method
def test_every_legal_value_fits_somewhere(kind: type[Part]) -> None:
    fitting = [part for part in settings(kind) if home(part)]
    for name, values in marked(kind).items():
        used = {getattr(part, name) for part in fitting}
        assert used == set(values), f"{kind.name()}.{name}"


@every_part
def test_what_is_written_is_what_is_read(part: Part) -> None:
    table = part.table()
    assert parts.parse(table) == part
    assert table["use"] == part.name()
    assert all(isinstance(value, int | float | str | bool) for value in table.values())


@every_part
def test_equal_settings_are_one_key(part: Part) -> None:
    again = parts.parse(part.table())
    assert hash(again) == hash(part)
    assert {part: 1}[again] == 1
    with pytest.raises(Exception, match="frozen"):
        part.anything = 1


@every_part
def test_a_part_names_its_settings(part: Part) -> None:
    assert str(part).startswith(f"{part.name()}(")
    # a selector leaves out what is as usual, as its table does
    assert all(f"{name}={x}" in str(part) for name, x in part.table().items() if name != "use")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@every_codec
def test_a_codec_returns_shape_and_dtype(codec: Codec, dtype: torch.dtype, place: Any) -> None:
    x = draw(codec, 2 * codec.block).to(dtype)
    site = place(codec, x.shape[2], dtype)
    back = codec.decode(codec.encode(x, site), site)
    assert back.shape == x.shape
    assert back.dtype == dtype
    assert back.isfinite().all()


@every_codec
def test_a_codec_leaves_its_input_as_it_is(codec: Codec, place: Any) -> None:
    x = draw(codec, 2 * codec.block)
    before, site = x.clone(), place(codec, x.shape[2])
    code = codec.encode(x, site)
    held = [tensor.clone() for tensor in tensors(code)]
    codec.decode(code, site)
    assert torch.equal(x, before)
    assert all(torch.equal(*pair) for pair in zip(tensors(code), held, strict=True))


@every_codec
def test_what_is_stored_is_no_view_of_the_input(codec: Codec, place: Any) -> None:
    """Else a page would keep the whole prompt alive."""
    x = draw(codec, 2 * codec.block)
    code = codec.encode(x, place(codec, x.shape[2]))
    owned = {tensor.untyped_storage().data_ptr() for tensor in tensors(code)}
    assert x.untyped_storage().data_ptr() not in owned


@every_codec
def test_encoding_blocks_apart_equals_encoding_them_together(codec: Codec, place: Any) -> None:
    block, blocks = codec.block, 3
    x = draw(codec, blocks * block)
    site = place(codec, blocks * block)
    whole = codec.encode(x, site)
    pieces = [
        codec.encode(piece, replace(site, positions=positions))
        for piece, positions in zip(x.split(block, 2), site.positions.split(block), strict=True)
    ]
    for together, *apart in zip(tensors(whole), *map(tensors, pieces), strict=True):
        assert torch.equal(together, torch.cat(apart, 2))
    back = codec.decode(whole, site)
    for index, piece in enumerate(pieces):
        own = slice(index * block, (index + 1) * block)
        alone = codec.decode(piece, replace(site, positions=site.positions[own]))
        # a product in 32 bits: its last bit may hang on how many there are
        if codec.linear or isinstance(codec, Projection):
            torch.testing.assert_close(alone, back[:, :, own], rtol=1e-5, atol=1e-4)
        else:
            assert torch.equal(alone, back[:, :, own])


@every_codec
def test_rows_and_heads_do_not_know_each_other(codec: Codec, place: Any) -> None:
    x = draw(codec, codec.block)
    site = place(codec, codec.block)
    other = x.clone()
    other[1, 2] *= -9
    for one, two in zip(
        tensors(codec.encode(x, site)), tensors(codec.encode(other, site)), strict=True
    ):
        same = (one == two).flatten(2).all(-1)
        same[1, 2 if codec.apart else slice(None)] = True
        assert same.all()


@every_codec
def test_memory_may_lie_in_any_order(codec: Codec, place: Any) -> None:
    x = draw(codec, 2 * codec.block)
    site = place(codec, x.shape[2])
    view = x.transpose(1, 2).contiguous().transpose(1, 2)
    for one, two in zip(
        tensors(codec.encode(x, site)), tensors(codec.encode(view, site)), strict=True
    ):
        assert torch.equal(one, two)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@every_codec
def test_shapes_without_data_are_those_with_data(
    codec: Codec, dtype: torch.dtype, place: Any
) -> None:
    """Bytes are foretold on tensors without data."""
    x = draw(codec, 2 * codec.block).to(dtype)
    site = place(codec, x.shape[2], dtype)
    blank = {f"{codec.name()}.{k}": t for k, t in codec.blanks(HEADS, x.shape[-1]).items()}
    nowhere = replace(site, positions=site.positions.to("meta"), tensors=blank)
    learned = {f"{codec.name()}.{k}": t for k, t in codec.learn(x.to("meta"), nowhere).items()}
    for name, shape in learned.items():
        real = site.tensors[name]
        assert (shape.shape, shape.dtype) == (real.shape, real.dtype)
    bare = codec.encode(x.to("meta"), replace(nowhere, tensors={**blank, **learned}))
    for real, shape in zip(tensors(codec.encode(x, site)), tensors(bare), strict=True):
        assert shape.is_meta
        assert (shape.shape, shape.dtype) == (real.shape, real.dtype)
        assert shape.untyped_storage().nbytes() == real.untyped_storage().nbytes()


def neighbours() -> list[Any]:
    """Returns pairs that differ in one setting, the second storing more bits of each value."""
    found = []
    for one, two in itertools.permutations(CODECS, 2):
        if type(one) is type(two) and one.payload_bits < two.payload_bits:
            first, second = one.model_dump(), two.model_dump()
            if sum(first[key] != second[key] for key in first) == 1:
                found.append(pytest.param(one, two, id=f"{one} | {two}"))
    return found


@pytest.mark.parametrize(("fewer", "more"), neighbours())
def test_the_error_does_not_grow_with_bits(fewer: Codec, more: Codec, place: Any) -> None:
    assert home(fewer) == home(more)
    x = draw(fewer, 2 * math.lcm(fewer.block, more.block))
    errors = [error(one, place(one, x.shape[2]), x) for one in (more, fewer)]
    assert errors[0] <= errors[1]


@every_codec
def test_a_codec_says_what_a_value_costs(codec: Codec, place: Any) -> None:
    assert 0 < codec.payload_bits <= 16
    assert codec.block >= 1
    if codec.linear:
        return  # what it hands on is kept in 32 bits until it is coded, or else in 16
    x = draw(codec, 2 * codec.block).to(torch.bfloat16)
    body = codec.encode(x, place(codec, x.shape[2], x.dtype)).body
    if isinstance(codec, Projection):  # in 16 bits too
        body = body.bfloat16()
    # a rank may be rounded to a multiple of 8; five ternary codes fill no page to the last byte
    rounded = 4 * 16 * x.shape[0] * x.shape[2] if isinstance(codec, Projection) else 0
    stated = codec.payload_bits * x.numel()
    assert 8 * body.nbytes == pytest.approx(stated, rel=2e-3, abs=rounded)


def stored_channels(codec: Codec, site: Site) -> Tensor:
    """Returns which channels of each head [H, D] have any bits."""
    found = home(codec)
    assert found is not None
    named = (site.tensors.get(f"{codec.name()}.{name}") for name in ("planes", "groups"))
    return next((x for x in named if x is not None), torch.ones(HEADS, found[0])) > 0


@every_codec
def test_one_token_alone_and_zeros_are_finite(codec: Codec, place: Any) -> None:
    """A block of one token told again, and nothing at all."""
    one = draw(codec, 1).expand(-1, -1, codec.block, -1)
    for x, dtype in itertools.product((one, torch.zeros_like(one)), DTYPES):
        site = place(codec, codec.block, dtype)
        assert codec.decode(codec.encode(x.to(dtype), site), site).isfinite().all()


@every_codec
def test_a_constant_and_an_outlier_are_kept_in_bounds(codec: Codec, place: Any) -> None:
    x = draw(codec, codec.block)
    x[0, 0] = 2.0
    x[1, 1, 0, 0] = 1e4
    for dtype in DTYPES:
        site = place(codec, codec.block, dtype)
        back = codec.decode(codec.encode(x.to(dtype), site), site).float()
        assert back.isfinite().all()
        if isinstance(codec, Projection):  # what is not of its directions is lost
            continue
        kept = stored_channels(codec, site)[0]
        torch.testing.assert_close(back[0, 0][:, kept], x[0, 0][:, kept], atol=0.05, rtol=0.05)
        assert back.abs().max() <= 1.1e4
