"""Entries: what a recipe asks of a span of layers, as it is written."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    WithJsonSchema,
    model_validator,
)

from kvtune import parts
from kvtune.chains import Chain
from kvtune.errors import UsageError
from kvtune.marks import MOST_OPENED, Tokens
from kvtune.parts import SEARCH, Borrower, Codec, Sharer
from kvtune.retention import Allocator, Merger, Selector
from kvtune.spans import check

# what "search" opens; fewer exact tokens than these are hardly cheaper
SINKS = Tokens(1024, (0, 4, 16))
RECENT = Tokens(65536, (32, 64, 128, 256))
SHARES = (1.0, 0.75, 0.5, 0.35, 0.25, 0.15, 0.1)  # of a selector; few, since a price is for each
DROP = "drop"  # what becomes of the rest where nothing is said


class Record(BaseModel):
    """A frozen table of a recipe, in which unknown keys and other types are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


def _tables(value: Any) -> tuple[dict[str, Any], ...]:
    if not isinstance(value, list | tuple) or not all(isinstance(item, Mapping) for item in value):
        raise ValueError('expected a list of parts such as [{ use = "affine", bits = 4 }]')
    for table in value:
        if parts.ANY in table:
            _alternatives(table)
            continue
        first = next(parts.choices(table))
        if not isinstance(first, Codec):
            kind = "nothing" if first is None else f"a {first.kind}"
            raise ValueError(f"{table.get('use')} is {kind}; keys and values take codecs")
    return tuple(dict(table) for table in value)


def _alternatives(table: Mapping[str, Any]) -> None:
    lists = table[parts.ANY]
    if len(table) > 1 or not isinstance(lists, list | tuple) or not lists:
        raise ValueError('expected any = [[{ use = "affine" }], ...], lists of parts, alone')
    for tables in lists:
        if isinstance(tables, list | tuple) and any(parts.ANY in own for own in tables):
            raise ValueError("an alternative holds parts, not alternatives of its own")
        _tables(tables)


def _selection(value: Any) -> Any:
    if isinstance(value, Mapping) and selects_openly(value):
        for one in _of_shares(value):
            _selection(one)
        return dict(value)
    if value is not None and not isinstance(_part(value), Selector):
        raise ValueError(f"{value['use']} is a {_part(value).kind}; select takes a selector")
    return value


def selects_openly(table: Mapping[str, Any]) -> bool:
    """True when the share of a selector is left to a search: "search", or a list of shares."""
    share = table.get("share")
    return share == SEARCH or isinstance(share, list | tuple)


def _of_shares(table: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The tables of a selector that an open one stands for; ValueError for a list of none, or of
    one share twice."""
    shares = SHARES if table["share"] == SEARCH else tuple(table["share"])
    if not 0 < len(shares) <= MOST_OPENED or len(set(map(str, shares))) < len(shares):
        raise ValueError(f"share opens 1 to {MOST_OPENED} parts, each once, not {list(shares)}")
    if all(share == 1 for share in shares):
        raise ValueError("share opens nothing below 1")
    return [{**table, "share": share} for share in shares]


def _sharing(value: Any) -> Any:
    if value is not None and not isinstance(_part(value, "xkv"), Sharer | Borrower):
        raise ValueError(f"{value['use']} is a {_part(value).kind}; share takes a sharer")
    return value


def _merging(value: Any) -> Any:
    if value is not None and not isinstance(_part(value, "values_only"), Merger):
        raise ValueError(f"{value['use']} is a {_part(value).kind}; merge takes a merger")
    return value


def _allotting(value: Any) -> Any:
    if value is not None and not isinstance(_part(value, "pyramid"), Allocator):
        raise ValueError(f"{value['use']} is a {_part(value).kind}; allot takes an allocator")
    return value


def _part(value: Any, example: str = "attention") -> parts.Part:
    if not isinstance(value, Mapping):
        raise ValueError(f'expected a part such as {{ use = "{example}" }}')
    if parts.is_open(value):
        raise ValueError(f"{value.get('use')} is not searched here: write its settings")
    return parts.parse(value)


def _fate(value: Any) -> Any:
    if isinstance(value, Mapping | Tier) or value in (None, DROP):
        return value
    raise ValueError(f'rest is "{DROP}", or a tier of keys and values')


def as_tuple(value: Any) -> Any:
    """Returns lists as tuples: TOML knows lists only."""
    return tuple(value) if isinstance(value, list) else value


def _sound(span: str) -> str:
    try:
        check(span)
    except UsageError as error:
        raise ValueError(str(error).removesuffix(".")) from None
    return span


# the schema's branches, one for each method, are put in when they are asked for, not on import
Tables = Annotated[
    tuple[dict[str, Any], ...], BeforeValidator(_tables), WithJsonSchema({"type": "array"})
]
Span = Annotated[str, Field(max_length=2000), AfterValidator(_sound)]
Selection = Annotated[
    dict[str, Any] | None, BeforeValidator(_selection), WithJsonSchema({"type": "object"})
]
Sharing = Annotated[
    dict[str, Any] | None, BeforeValidator(_sharing), WithJsonSchema({"type": "object"})
]
Merging = Annotated[
    dict[str, Any] | None, BeforeValidator(_merging), WithJsonSchema({"type": "object"})
]
Allotting = Annotated[
    dict[str, Any] | None, BeforeValidator(_allotting), WithJsonSchema({"type": "object"})
]


class Tier(Record):
    """How the tokens that have left the window are stored."""

    keys: Tables = ()
    values: Tables = ()

    def is_open(self) -> bool:
        """True when a setting, or whether a codec is there, is left to a search."""
        return any(parts.is_open(table) for table in (*self.keys, *self.values))

    def chains(self) -> tuple[Chain, Chain]:
        """The chains of keys and of values; ValueError for open tables."""
        return _chain(self.keys), _chain(self.values)

    @classmethod
    def of(cls, keys: Chain, values: Chain) -> Tier:
        """The tables of two chains."""
        return cls(keys=tuple(keys.tables()), values=tuple(values.tables()))


class HeadEntry(Record):
    """Some kv heads of a layer ("0, 2", "first 1") that are stored in a way of their own; with a
    selector of their own where the layer selects tokens, else the layer's."""

    span: Span
    kept: Tier = Tier()
    select: Selection = None


def _listed(value: Any) -> Any:
    if isinstance(value, str) and value != SEARCH:
        raise ValueError('heads is a list of tables, or "search"')
    return as_tuple(value)


Heads = Annotated[tuple[HeadEntry, ...] | Literal["search"], BeforeValidator(_listed)]


Rest = Annotated[Tier | Literal["drop"] | None, BeforeValidator(_fate)]


class LayerPolicy(Record):
    """One policy for a span of layers ("all", "rest", "first 2", "last 2", "0-3, 7").

    With a selector, the tokens that win go to `kept` and the others to `rest`, or nowhere, or are
    folded into the winners by `merge`; `allot` shares the budget out to the layers of the span, or
    to their heads, when a recipe is fitted. With `share`, `kept` stores what neighbouring layers
    share.
    """

    span: Span
    sinks: Annotated[int | Literal["search"] | tuple[int, ...], SINKS] = 0
    recent: Annotated[int | Literal["search"] | tuple[int, ...], RECENT] = 0
    kept: Tier = Tier()
    heads: Heads = ()
    select: Selection = None
    rest: Rest = None
    merge: Merging = None
    allot: Allotting = None
    share: Sharing = None

    def is_open(self) -> bool:
        """True when a setting, a window, a codec or the choice of heads is left to a search."""
        windowed = not isinstance(self.sinks, int) or not isinstance(self.recent, int)
        return windowed or self.per_head or self.kept.is_open() or bool(self.selectors())

    def selectors(self) -> tuple[Selector, ...]:
        """What a search may select tokens by, the largest share first; none where that is closed.
        A share of 1 stands for no selector, and is always among what a search tries."""
        if self.select is None or not selects_openly(self.select):
            return ()
        found = [parts.parse(table) for table in _of_shares(self.select)]
        own = [one for one in found if isinstance(one, Selector) and one.share < 1]
        return tuple(sorted(own, key=lambda one: -one.share))

    @property
    def per_head(self) -> bool:
        """True when a search may treat the kv heads of a layer differently."""
        return self.heads == SEARCH

    def windows(self) -> tuple[tuple[int, int], ...]:
        """All pairs (sinks, recent) that are opened; one pair when no window is open."""
        return tuple(itertools.product(SINKS.opened(self.sinks), RECENT.opened(self.recent)))

    @model_validator(mode="after")
    def _heads_are_closed(self) -> Self:
        named = () if isinstance(self.heads, str) else self.heads
        opened = any(own.select and selects_openly(own.select) for own in named)
        if opened or any(own.kept.is_open() for own in named) or (named and self.is_open()):
            raise ValueError(
                'a layer that lists heads opens nothing: write heads = "search", or close it'
            )
        return self

    @model_validator(mode="after")
    def _shared_layers_are_closed(self) -> Self:
        if self.share is None:
            return self
        if self.select is not None or self.heads:
            raise ValueError(
                "layers that share treat tokens and heads alike: leave select and heads out"
            )
        if self.is_open():
            raise ValueError("layers that share are not searched: write their settings")
        return self

    @model_validator(mode="after")
    def _rest_has_a_selector(self) -> Self:
        named = () if isinstance(self.heads, str) else self.heads
        if self.select is None:
            if self.rest is not None:
                raise ValueError(
                    "rest is what becomes of tokens that a selector passes over: "
                    'write select = { use = "attention" }, or leave rest out'
                )
            if self.merge or self.allot or any(own.select for own in named):
                raise ValueError(
                    "merge, allot and what heads select belong to a layer that selects tokens: "
                    'write select = { use = "attention" } in the layer'
                )
            return self
        if self.allot and named:
            raise ValueError("a layer lists its heads, or an allocator does: leave one out")
        if selects_openly(self.select):
            if isinstance(self.rest, Tier) or self.merge or self.allot or self.heads:
                raise ValueError(
                    "a search over shares drops the tokens that lose, of all heads alike: leave "
                    "rest, merge, allot and heads out"
                )
            return self
        if self.is_open() or (isinstance(self.rest, Tier) and self.rest.is_open()):
            raise ValueError(
                "a layer that selects tokens is not searched: write its settings, or "
                'share = "search" in select'
            )
        return self


def _chain(tables: tuple[dict[str, Any], ...]) -> Chain:
    codecs = [parts.parse(table) for table in tables]
    return Chain(tuple(codec for codec in codecs if isinstance(codec, Codec)))
