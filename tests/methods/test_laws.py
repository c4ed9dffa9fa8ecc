"""The laws of every method found in kvtune/methods, over the settings that its marks allow."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from kvtune import parts
from kvtune.models import ropes
from kvtune.parts import Code, Codec, Part, Selector, Site, View, legal_values
from kvtune.rope import Rope
from kvtune.view import received

HEAD_DIMS = (64, 128, 256, 16)
MOST = 64  # settings in full product; a method with more is varied one setting at a time
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def marked(kind: type[Part]) -> dict[str, tuple[Any, ...]]:
    """Returns the legal values of each setting that has a mark."""
    found = {}
    for name in kind.model_fields:
        try:
            found[name] = legal_values(kind, name)
        except ValueError:
            continue  # without a mark it cannot be searched, and keeps its default
    return found


def settings(kind: type[Part]) -> list[Part]:
    """Returns the default and the legal variants of a method."""
    legal = marked(kind)
    full = list(itertools.product(*legal.values()))
    if len(full) <= MOST:
        varied = [dict(zip(legal, values, strict=True)) for values in full]
    else:
        varied = [{name: value} for name, values in legal.items() for value in values]
    return list(dict.fromkeys([kind(), *(kind(**chosen) for chosen in varied)]))


def home(part: Part) -> tuple[int, str] | None:
    """Returns the first head size and side that a part fits, if there is one."""
    for dim, side in itertools.product(HEAD_DIMS, ("keys", "values")):
        try:
            part.check(dim, side)
        except ValueError:
            continue
        return dim, side
    return None


KINDS = {name: parts.find(name) for name in parts.names()}
ALL = [part for kind in KINDS.values() for part in settings(kind)]
CODECS = [part for part in ALL if isinstance(part, Codec) and home(part)]

SELECTORS = [part for part in ALL if isinstance(part, Selector)]

every_method = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
every_part = pytest.mark.parametrize("part", ALL, ids=str)
every_codec = pytest.mark.parametrize("codec", CODECS, ids=str)
every_selector = pytest.mark.parametrize("selector", SELECTORS, ids=str)


@pytest.fixture
def rope_of(model_of: Any) -> Any:
    """Returns the rotary embedding of a real model of a head size."""

    @cache
    def make(dim: int) -> Rope:
        return ropes(model_of("llama", head_dim=dim, num_hidden_layers=1))[0]

    return make


@pytest.fixture
def place(rope_of: Any) -> Any:
    """Returns where a codec works: a Site of some tokens."""

    def make(codec: Codec, tokens: int, dtype: torch.dtype = torch.float32) -> Site:
        found = home(codec)
        assert found is not None
        rope = rope_of(found[0]) if "rope" in codec.needs else None
        side: Any = found[1]
        return Site(0, side, torch.arange(5, 5 + tokens), dtype, rope)

    return make


def draw(codec: Codec, tokens: int, seed: int = 0) -> Tensor:
    """Returns values [2, 3, T, D] whose channels have scales and offsets of their own."""
    found = home(codec)
    assert found is not None
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 3, tokens, found[0], generator=generator)
    spread, offset = torch.randn(2, 1, 3, 1, found[0], generator=generator)
    return x * spread.exp() + 4 * offset


def tensors(code: Code) -> list[Tensor]:
    return [code.body, *code.side]


def error(codec: Codec, site: Site, x: Tensor) -> float:
    return float((codec.decode(codec.encode(x, site), site) - x).norm() / x.norm())


@every_method
def test_a_method_is_of_a_kind_that_has_laws_here(kind: type[Part]) -> None:
    assert issubclass(kind, Codec | Selector), f"write the laws of a {kind.kind} into this file"


@every_method
def test_the_first_line_tells_what_a_method_does(kind: type[Part]) -> None:
    assert kind.__doc__ and kind.__doc__.strip().splitlines()[0].endswith(".")
    assert kind.name() in KINDS


@every_method
def test_defaults_are_valid_somewhere(kind: type[Part]) -> None:
    assert home(kind())


@every_method
def test_a_method_needs_only_what_there_is(kind: type[Part]) -> None:
    assert kind.needs <= {"rope", "queries", "attention"}


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
    assert all(f"{name}={getattr(part, name)}" in str(part) for name in type(part).model_fields)


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
        same[1, 2] = True
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
    bare = codec.encode(x.to("meta"), replace(site, positions=site.positions.to("meta")))
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
    site = place(fewer, x.shape[2])
    assert error(more, site, x) <= error(fewer, site, x)


@every_codec
def test_a_codec_says_what_a_value_costs(codec: Codec, place: Any) -> None:
    assert 0 < codec.payload_bits <= 16
    assert codec.block >= 1
    x = draw(codec, 2 * codec.block).to(torch.bfloat16)
    body = codec.encode(x, place(codec, x.shape[2], x.dtype)).body
    assert 8 * body.nbytes == codec.payload_bits * x.numel()


@every_codec
def test_a_constant_and_an_outlier_are_kept_in_bounds(codec: Codec, place: Any) -> None:
    x = draw(codec, codec.block)
    x[0, 0] = 2.0
    x[1, 1, 0, 0] = 1e4
    for dtype in DTYPES:
        site = place(codec, codec.block, dtype)
        back = codec.decode(codec.encode(x.to(dtype), site), site).float()
        assert back.isfinite().all()
        torch.testing.assert_close(back[0, 0], x[0, 0], atol=0.05, rtol=0.05)
        assert back.abs().max() <= 1.1e4


def seen(dtype: torch.dtype = torch.float32) -> View:
    """Returns 40 tokens [2, 3, 40, 64] and the attention that two query heads of each paid them."""
    keys, values = torch.randn(2, 2, 3, 40, 64, generator=torch.Generator().manual_seed(0))
    query = torch.randn(2, 6, 40, 64, generator=torch.Generator().manual_seed(1))
    query[..., 0], keys[..., 7, 0] = 9.0, 9.0  # all queries look at token 7
    keys, values, query = keys.to(dtype), values.to(dtype), query.to(dtype)
    return View(keys, values, received(query, keys))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@every_selector
def test_a_selector_scores_every_token_of_every_head(
    selector: Selector, dtype: torch.dtype
) -> None:
    score = selector.score(seen(dtype))
    assert score.shape == (2, 3, 40)
    assert score.dtype == torch.float32
    assert score.isfinite().all()
    assert torch.equal(score, selector.score(seen(dtype))), "it is repeatable"
    assert 0 < selector.share <= 1


@every_selector
def test_a_selector_leaves_its_view_as_it_is(selector: Selector) -> None:
    view = seen()
    selector.score(view)
    for one, two in zip(view, seen(), strict=True):
        assert one is not None and two is not None
        assert torch.equal(one, two)


@every_selector
def test_a_selector_keeps_rows_and_heads_apart(selector: Selector) -> None:
    view = seen()
    other = View(*(None if x is None else x.clone() for x in view))
    for x in other:
        if x is not None:
            x[1, 2] = x[1, 2].flip(0) + 1
    same = (selector.score(view) == selector.score(other)).all(-1)
    same[1, 2] = True
    assert same.all()


@every_selector
def test_scores_without_data_have_the_shape_of_those_with_data(selector: Selector) -> None:
    """Bytes are foretold on tensors without data."""
    bare = selector.score(View(*(None if x is None else x.to("meta") for x in seen())))
    assert bare.is_meta
    assert bare.shape == selector.score(seen()).shape


@pytest.mark.parametrize("selector", [s for s in SELECTORS if "attention" in s.needs], ids=str)
def test_what_gets_most_attention_wins(selector: Selector) -> None:
    assert (selector.score(seen()).argmax(-1) == 7).all()
