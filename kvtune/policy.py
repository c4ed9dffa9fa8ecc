"""Policies: what a recipe asks of a span of layers, and what one layer does once resolved."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple, Self

from kvtune_kernels import Window
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    WithJsonSchema,
    model_validator,
)
from pydantic import PlainSerializer as Serializer

from kvtune import parts
from kvtune.errors import UsageError
from kvtune.marks import Tokens
from kvtune.parts import SEARCH, Chain, Codec
from kvtune.spans import check, resolve, write

# what "search" opens; fewer exact tokens than these are hardly cheaper
SINKS = Tokens(1024, (0, 4, 16))
RECENT = Tokens(65536, (32, 64, 128, 256))


class Record(BaseModel):
    """A frozen table of a recipe, in which unknown keys and other types are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


def _tables(value: Any) -> tuple[dict[str, Any], ...]:
    if not isinstance(value, list | tuple) or not all(isinstance(item, Mapping) for item in value):
        raise ValueError('expected a list of parts such as [{ use = "affine", bits = 4 }]')
    for table in value:
        first = next(parts.choices(table))
        if not isinstance(first, Codec):
            kind = "nothing" if first is None else f"a {first.kind}"
            raise ValueError(f"{table.get('use')} is {kind}; keys and values take codecs")
    return tuple(dict(table) for table in value)


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
    """Some kv heads of a layer ("0, 2", "first 1") that are stored in a way of their own."""

    span: Span
    kept: Tier = Tier()


def _listed(value: Any) -> Any:
    if isinstance(value, str) and value != SEARCH:
        raise ValueError('heads is a list of tables, or "search"')
    return as_tuple(value)


Heads = Annotated[tuple[HeadEntry, ...] | Literal["search"], BeforeValidator(_listed)]


class LayerPolicy(Record):
    """One policy for a span of layers ("all", "rest", "first 2", "last 2", "0-3, 7")."""

    span: Span
    sinks: Annotated[int | Literal["search"] | tuple[int, ...], SINKS] = 0
    recent: Annotated[int | Literal["search"] | tuple[int, ...], RECENT] = 0
    kept: Tier = Tier()
    heads: Heads = ()

    def is_open(self) -> bool:
        """True when a setting, a window, a codec or the choice of heads is left to a search."""
        windowed = not isinstance(self.sinks, int) or not isinstance(self.recent, int)
        return windowed or self.per_head or self.kept.is_open()

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
        if any(entry.kept.is_open() for entry in named) or (named and self.is_open()):
            raise ValueError(
                'a layer that lists heads opens nothing: write heads = "search", or close it'
            )
        return self


def _chain(tables: tuple[dict[str, Any], ...]) -> Chain:
    codecs = [parts.parse(table) for table in tables]
    return Chain(tuple(codec for codec in codecs if isinstance(codec, Codec)))


Written = Annotated[Chain, Serializer(str)]


class HeadGroup(NamedTuple):
    """The kv heads of a layer that are stored alike, in order, and how."""

    heads: tuple[int, ...]
    keys: Written
    values: Written


class Policy(Record):
    """What one layer does, resolved: chains in place of tables;
    hashable, so encoded tiers can be memoised.

    `heads` is empty when all kv heads are alike. Otherwise it holds every kv head once, equal ones
    together, and `keys` and `values` are those of the largest group.
    """

    sinks: int = 0
    recent: int = 0
    keys: Written = Chain()
    values: Written = Chain()
    heads: tuple[HeadGroup, ...] = ()

    @classmethod
    def by_head(cls, sinks: int, recent: int, heads: Sequence[tuple[Chain, Chain]]) -> Policy:
        """The policy of a layer whose kv heads have these keys and values each."""
        groups: dict[tuple[Chain, Chain], list[int]] = {}
        for head, pair in enumerate(heads):
            groups.setdefault(pair, []).append(head)
        keys, values = max(groups, key=lambda pair: len(groups[pair]))
        made = tuple(HeadGroup(tuple(own), *pair) for pair, own in groups.items())
        several = made if len(made) > 1 else ()
        return cls(sinks=sinks, recent=recent, keys=keys, values=values, heads=several)

    @model_validator(mode="after")
    def _whole(self) -> Self:
        named = sorted(head for group in self.heads for head in group.heads)
        if named != list(range(len(named))):
            raise ValueError("the heads of a policy are all kv heads, each once")
        return self

    def parts(self) -> tuple[tuple[tuple[int, ...], Policy], ...]:
        """Each group of kv heads with the policy that it alone follows."""
        return tuple(
            (heads, Policy(sinks=self.sinks, recent=self.recent, keys=keys, values=values))
            for heads, keys, values in self.heads
        )

    @property
    def pairs(self) -> tuple[tuple[Chain, Chain], ...]:
        """Keys and values of each kv head, or one pair for all when they are alike."""
        found = {head: (group.keys, group.values) for group in self.heads for head in group.heads}
        return tuple(found[head] for head in sorted(found)) or ((self.keys, self.values),)

    @property
    def chains(self) -> tuple[Chain, ...]:
        """Every chain of the layer, each once."""
        return tuple(dict.fromkeys(chain for pair in self.pairs for chain in pair))

    @property
    def payload_bits(self) -> float:
        """Mean code bits per cached value, metadata and windows not counted."""
        found = [chain.payload_bits for pair in self.pairs for chain in pair]
        return sum(found) / len(found)

    @property
    def block(self) -> int:
        """Tokens that move into the tier together; of heads that differ, where all have moved."""
        return math.lcm(*(chain.block for chain in self.chains))

    @property
    def is_dense(self) -> bool:
        """True when nothing is compressed."""
        return not any(chain.codecs for chain in self.chains)

    @property
    def window(self) -> Window:
        """Which tokens stay exact, as kernels are told."""
        return Window(self.sinks, self.recent, self.block)

    def due(self, seen: int) -> int:
        """How many tokens after the sinks have left the window once `seen` tokens are known."""
        return self.window.due(seen)

    def check(self, head_dim: int, layer: int) -> None:
        """Raises UsageError when a chain does not fit heads of this size."""
        for pair in dict.fromkeys(self.pairs):
            for side, chain in zip(("keys", "values"), pair, strict=True):
                try:
                    chain.check(head_dim, side)
                except ValueError as error:
                    raise UsageError(f"layer {layer}, {side}: {error}.") from None


def to_policy(entry: LayerPolicy, kv_heads: int, where: str) -> Policy:
    """Returns what a closed entry asks of a layer with so many kv heads; `where` is for errors.

    Raises:
        UsageError: heads that the layer does not have, or a head named twice.
    """
    named = entry.heads if isinstance(entry.heads, tuple) else ()
    ((sinks, recent),) = entry.windows()
    if not named:
        keys, values = entry.kept.chains()
        return Policy(sinks=sinks, recent=recent, keys=keys, values=values)
    pairs = [*(own.kept.chains() for own in named), entry.kept.chains()]
    try:
        owner = resolve([*(own.span for own in named), "rest"], kv_heads, "kv head")
    except UsageError as error:
        raise UsageError(f"{where}, heads: {error}") from None
    return Policy.by_head(sinks, recent, [pairs[index] for index in owner])


def to_entry(policy: Policy, span: str) -> LayerPolicy:
    """Returns the entry of a recipe that asks for a policy, the inverse of `to_policy`."""
    base = (policy.keys, policy.values)
    heads = tuple(
        HeadEntry(span=write(group.heads), kept=Tier.of(group.keys, group.values))
        for group in policy.heads
        if (group.keys, group.values) != base
    )
    kept = Tier.of(*base)
    return LayerPolicy(span=span, sinks=policy.sinks, recent=policy.recent, kept=kept, heads=heads)
