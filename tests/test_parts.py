"""Laws of kvtune/parts.py: kinds, marks, chains, and how a table becomes a part."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import jsonschema
import pytest
import torch
from torch import Tensor

from kvtune import parts
from kvtune.chains import Chain
from kvtune.errors import UsageError
from kvtune.marks import Between, OneOf
from kvtune.parts import Code, Codec, Part, Site


class Sample(Codec):
    """A part with one setting of each kind."""

    bits: Annotated[int, OneOf((2, 4))] = 4
    rank: Annotated[int, Between(16, 64, 16)] = 32
    axis: Literal["token", "channel"] = "token"
    free: int = 0

    def encode(self, x: Tensor, site: Site) -> Code:
        return Code(x + self.rank, (x[..., :1],))

    def decode(self, code: Code, site: Site) -> Tensor:
        return code.body - self.rank


def affine(**settings: Any) -> Any:
    return parts.parse({"use": "affine", **settings})


def test_a_name_is_found_and_only_a_name_of_a_file() -> None:
    for name in parts.names():
        assert parts.find(name).name() == name
    for name in ("", "affin", "os", "os.path", "methods.affine", "affine.Affine", "affine\0"):
        with pytest.raises(UsageError, match="There is no method"):
            parts.find(name)


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({}, 'use = "METHOD"'),
        ({"use": None}, 'use = "METHOD"'),
        ({"use": "affine", "bit": 4}, "affine has no 'bit'. Did you mean 'bits'?"),
        ({"use": "affine", "bits": 16}, r"affine.bits: 16 is not one of 2, 3, 4, 8"),
        ({"use": "affine", "bits": "4"}, r"affine.bits: .* integer"),
        ({"use": "affine", "bits": "search"}, r"affine.bits: .* integer"),
        ({"use": "affine", "axis": "layer"}, "affine.axis"),
        ({"use": "afine"}, "Did you mean 'affine'"),
    ],
)
def test_a_wrong_table_is_refused_in_words(table: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        parts.parse(table)


def test_a_table_is_left_as_it_is() -> None:
    table = {"use": "affine", "bits": 4}
    parts.parse(table)
    list(parts.choices(table))
    assert table == {"use": "affine", "bits": 4}


def test_marks_bound_values_and_list_them() -> None:
    assert parts.legal_values(Sample, "bits") == (2, 4)
    assert parts.legal_values(Sample, "rank") == (16, 32, 48, 64)
    assert parts.legal_values(Sample, "axis") == ("token", "channel")
    with pytest.raises(ValueError, match="free has no mark"):
        parts.legal_values(Sample, "free")
    with pytest.raises(ValueError, match="Did you mean 'rank'"):
        parts.legal_values(Sample, "rnk")


@pytest.mark.parametrize(
    "wrong",
    [
        {"bits": 3},
        {"bits": True},
        {"rank": 15},
        {"rank": 24},
        {"rank": 80},
        {"free": 0.5},
        {"x": 1},
    ],
)
def test_values_outside_their_mark_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Sample(**wrong)


def test_marks_show_in_the_schema() -> None:
    shown = Sample.model_json_schema()["properties"]
    assert shown["bits"]["enum"] == [2, 4]
    assert (shown["rank"]["minimum"], shown["rank"]["maximum"]) == (16, 64)
    assert shown["axis"]["enum"] == ["token", "channel"]


def test_the_schema_of_a_mark_allows_what_the_mark_allows() -> None:
    """JSON Schema counts steps from zero, so a range that starts between two must say more."""

    class Odd(Sample):
        """Ranks from 12 on, every eighth."""

        rank: Annotated[int, Between(12, 36, 8)] = 12

    schema = Odd.model_json_schema()
    for rank in range(10, 40):
        allowed = jsonschema.Draft202012Validator(schema).is_valid({"rank": rank})
        assert allowed == (rank in (12, 20, 28, 36)), rank


def test_an_open_table_stands_for_every_legal_part() -> None:
    found = list(parts.choices({"use": "affine", "bits": "search", "axis": "search", "group": 64}))
    assert len(found) == len(set(found)) == 8
    assert {part.group for part in found} == {64}  # type: ignore[attr-defined]
    assert list(parts.choices({"use": "affine", "bits": 3})) == [affine(bits=3)]
    with pytest.raises(ValueError, match="has no 'bit'"):
        list(parts.choices({"use": "affine", "bit": "search"}))


def test_a_part_is_frozen_and_knows_no_default_by_heart() -> None:
    part = affine(bits=3)
    with pytest.raises(ValueError, match="frozen"):
        part.bits = 4
    assert part != affine(bits=4)
    assert issubclass(type(part), Part)


def site(tokens: int) -> Site:
    return Site(0, "keys", torch.arange(tokens), torch.float32)


def test_an_empty_chain_is_the_identity() -> None:
    x, chain = torch.randn(1, 2, 5, 16), Chain()
    assert torch.equal(chain.decode(chain.encode(x, site(5)), site(5)), x)
    assert (chain.block, chain.payload_bits, str(chain)) == (1, 16.0, "16-bit")
    assert not chain.needs


def test_a_chain_decodes_in_reverse() -> None:
    chain = Chain((Sample(rank=16), Sample(rank=64), affine(bits=8, group="head")))
    x = torch.randn(1, 2, 64, 16)
    code = chain.encode(x, site(64))
    assert [len(side) for side in code.sides] == [1, 1, 1]
    assert (chain.decode(code, site(64)) - x).abs().max() < 0.05
    assert chain.payload_bits == 8
    assert chain.tables()[2] == {"use": "affine", "bits": 8, "group": "head", "axis": "token"}


def test_a_chain_moves_blocks_that_suit_all_its_codecs() -> None:
    chain = Chain((affine(axis="channel", group=32), affine(axis="channel", group=128)))
    assert chain.block == 128
    assert Chain((parts.parse({"use": "derope"}),)).needs == {"rope"}


def test_nothing_follows_a_quantizer() -> None:
    quantizer = affine(group="head")
    Chain((parts.parse({"use": "derope"}), quantizer)).check(3, 64, "keys")
    with pytest.raises(ValueError, match="derope cannot follow it: put affine last"):
        Chain((quantizer, parts.parse({"use": "derope"}))).check(3, 64, "keys")


@pytest.mark.parametrize(
    ("settings", "dim", "words"),
    [
        ({"group": "head"}, 20, "head_dim 20 is not a multiple of 8"),
        ({"axis": "channel", "group": "head"}, 64, "groups tokens"),
        ({"group": 64}, 64, 'group = "head" is the whole head'),
        ({"group": 128}, 64, "group 128 does not divide head_dim 64"),
        ({"group": 32}, 80, "group 32 does not divide head_dim 80"),
    ],
)
def test_settings_that_do_not_fit_a_head_are_refused(
    settings: dict[str, Any], dim: int, words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        affine(**settings).check(dim, "keys")
