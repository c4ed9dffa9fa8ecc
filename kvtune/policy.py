"""Policies: what one layer does, resolved from the entries of a recipe."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, NamedTuple, Self

from kvtune_kernels import Window
from pydantic import PlainSerializer as Serializer
from pydantic import model_validator

from kvtune import parts, selection
from kvtune.chains import Chain
from kvtune.entries import DROP, HeadEntry
from kvtune.entries import LayerPolicy as LayerPolicy
from kvtune.entries import Record as Record
from kvtune.entries import Tier as Tier
from kvtune.errors import UsageError
from kvtune.parts import Borrower, Projection, Sharer
from kvtune.retention import Merger, Selector
from kvtune.spans import resolve, write
from kvtune.splits import Split, smallest

Written = Annotated[Chain, Serializer(str)]


class HeadGroup(NamedTuple):
    """The kv heads of a layer that are stored alike, in order, and how."""

    heads: tuple[int, ...]
    keys: Written
    values: Written
    select: Annotated[Selector, Serializer(str)] | None = None


Alone = tuple[Chain, Chain, Selector | None]  # keys, values and selector of one kv head


class Policy(Record):
    """What one layer does, resolved: chains in place of tables;
    hashable, so encoded tiers can be memoised.

    `heads` is empty when all kv heads are alike. Otherwise it holds every kv head once, equal ones
    together, and `keys` and `values` are those of the largest group. With `select`, `keys` and
    `values` store the tokens that win, and `rest` the others; without `rest` these are dropped,
    or folded into the winners by `merge`. Each group of heads has a selector of its own.
    With a sharer, `keys` and `values` store the body that layers share; with a borrower, nothing.
    """

    sinks: int = 0
    recent: int = 0
    keys: Written = Chain()
    values: Written = Chain()
    heads: tuple[HeadGroup, ...] = ()
    select: Annotated[Selector, Serializer(str)] | None = None
    rest: tuple[Written, Written] | None = None  # keys and values
    merge: Annotated[Merger, Serializer(str)] | None = None
    share: Annotated[Sharer | Borrower, Serializer(str)] | None = None
    least: int = 0  # tokens that a basis is learned of; before that many are due, none is paged

    @classmethod
    def by_head(cls, sinks: int, recent: int, heads: Sequence[tuple[Chain, Chain]]) -> Policy:
        """The policy of a layer whose kv heads have these keys and values each."""
        return cls.of_heads([(*pair, None) for pair in heads], sinks=sinks, recent=recent)

    @classmethod
    def of_heads(cls, heads: Sequence[Alone], **others: Any) -> Policy:
        """The same, where each kv head may have its own selector as well."""
        groups: dict[Alone, list[int]] = {}
        for head, own in enumerate(heads):
            groups.setdefault(own, []).append(head)
        keys, values, select = max(groups, key=lambda own: len(groups[own]))
        made = tuple(HeadGroup(tuple(found), *own) for own, found in groups.items())
        several = made if len(made) > 1 else ()
        return cls(keys=keys, values=values, select=select, heads=several, **others)

    @model_validator(mode="after")
    def _whole(self) -> Self:
        named = sorted(head for group in self.heads for head in group.heads)
        if named != list(range(len(named))):
            raise ValueError("the heads of a policy are all kv heads, each once")
        if self.select is None and (self.rest or self.merge):
            raise ValueError("a rest, and what is merged, has a selector")
        if any((group.select is None) != (self.select is None) for group in self.heads):
            raise ValueError("all heads of a layer select tokens, or none does")
        if self.share and (self.select or self.heads):
            raise ValueError("layers that share treat tokens and heads alike")
        if self.heads and not all(chain.apart for chain in self.chains):
            raise ValueError("a codec that stores heads together treats all heads alike")
        return self

    def parts(self) -> tuple[tuple[tuple[int, ...], Policy], ...]:
        """Each group of kv heads with the policy that it alone follows."""
        names = ("sinks", "recent", "least", "rest", "merge")
        ends: dict[str, Any] = {name: getattr(self, name) for name in names}
        return tuple(
            (heads, Policy(**ends, keys=keys, values=values, select=select))
            for heads, keys, values, select in self.heads
        )

    @property
    def pairs(self) -> tuple[tuple[Chain, Chain], ...]:
        """Keys and values of each kv head, or one pair for all when they are alike."""
        found = {head: group[1:3] for group in self.heads for head in group.heads}
        return tuple(found[head] for head in sorted(found)) or ((self.keys, self.values),)

    @property
    def chains(self) -> tuple[Chain, ...]:
        """Every chain of the layer, each once."""
        return tuple(dict.fromkeys(chain for pair in self.tiers for chain in pair))

    @property
    def projects(self) -> bool:
        """Whether anything is projected."""
        return any(chain.projects for chain in self.chains)

    @property
    def tiers(self) -> tuple[tuple[Chain, Chain], ...]:
        """As `pairs`, and then keys and values of the rest, where it is stored."""
        return (*self.pairs, *((self.rest,) if self.rest else ()))

    @property
    def sharer(self) -> Sharer | None:
        """What stores the layer together with its neighbours."""
        return self.share if isinstance(self.share, Sharer) else None

    @property
    def borrower(self) -> Borrower | None:
        """What says that the layer reads another's cache."""
        return self.share if isinstance(self.share, Borrower) else None

    @property
    def needs(self) -> frozenset[str]:
        """What the parts need of the layer and its sites."""
        own = [self.select, self.merge, *(group.select for group in self.heads)]
        needs = [part.needs for part in (self.share, *self.chains) if part]
        return frozenset[str]().union(*needs, *(part.wants for part in own if part))

    @property
    def observed(self) -> int:
        """How many of the last queries its selectors look at."""
        own = [self.select, *(group.select for group in self.heads)]
        return max((select.observed for select in own if select), default=0)

    @property
    def payload_bits(self) -> float:
        """Mean code bits per cached value, metadata and windows not counted."""
        if self.borrower:
            return 0.0
        if self.sharer:
            sides = (("keys", self.keys), ("values", self.values))
            return sum(self.sharer.part(side) * chain.payload_bits for side, chain in sides) / 2
        found = _mean_bits(chain for pair in self.pairs for chain in pair)
        if (split := self.split) is None:
            return found
        return (split.kept * found + split.rest * _mean_bits(self.rest or ())) / split.block

    @property
    def split(self) -> Split | None:
        """How many tokens of each block win, and how many do not; None unless by share."""
        if self.select is None or self.renews:
            return None
        blocks = [_blocks(pair) for pair in ((self.keys, self.values), self.rest or ())]
        return smallest(self.select.share, *blocks)

    @property
    def renews(self) -> bool:
        """Whether what is kept competes again: under a budget in tokens."""
        return self.select is not None and self.select.budget > 0

    @property
    def unit(self) -> int:
        """Tokens of a selecting layer that are encoded together, and so many of a prompt."""
        blocks = math.lcm(_blocks((self.keys, self.values)), _blocks(self.rest or ()))
        return blocks if self.split is None else self.split.block

    def room(self, due: int, kept: int) -> int:
        """How many tokens win where `due` leave the window, of these and of what is kept."""
        assert self.select is not None
        if self.split:
            return due // self.split.block * self.split.kept
        most = (self.select.budget - self.sinks - self.recent) // self.unit * self.unit
        return min(most, due + kept)

    @property
    def block(self) -> int:
        """Tokens that move into the tiers together; of heads that differ, where all have moved."""
        if self.select is not None:
            return (
                self.split.block if self.split else -(-self.select.every // self.unit) * self.unit
            )
        return math.lcm(_blocks(self.chains), self.sharer.block if self.sharer else 1)

    @property
    def is_dense(self) -> bool:
        """True when nothing is compressed."""
        alone = self.select is None and self.share is None
        return alone and not any(chain.codecs for chain in self.chains)

    @property
    def low_rank(self) -> bool:
        """Whether keys are stored as latents."""
        return self.sharer is not None or any(
            isinstance(codec, Projection) for codec in self.keys.codecs
        )

    @property
    def window(self) -> Window:
        """Which tokens stay exact, as kernels are told."""
        return Window(self.sinks, self.recent, self.block)

    def due(self, seen: int) -> int:
        """How many tokens after the sinks have left the window once `seen` tokens are known."""
        due = self.window.due(seen)
        return due if due >= self.least else 0

    @property
    def first(self) -> int:
        """How many tokens are paged first where they come one by one."""
        return max(1, -(-self.least // self.block)) * self.block

    def of_shape(self, kv_heads: int, head_dim: int) -> Policy:
        """The same policy of a layer of a shape, which what `learn`s wants so many tokens of.

        Raises:
            ValueError: a codec cannot take heads of this shape.
        """
        least = max(chain.least(kv_heads, head_dim) for chain in self.chains)
        return self if least == self.least else self.model_copy(update={"least": least})

    def check(self, kv_heads: int, head_dim: int, layer: int) -> None:
        """Raises UsageError when a chain does not fit heads of this size."""
        found = [("", pair) for pair in dict.fromkeys(self.pairs)]
        for tier, pair in (*found, *((("rest ", self.rest),) if self.rest else ())):
            for side, chain in zip(("keys", "values"), pair, strict=True):
                try:
                    chain.check(kv_heads, head_dim, side)
                except ValueError as error:
                    raise UsageError(f"layer {layer}, {tier}{side}: {error}.") from None


def _mean_bits(chains: Iterable[Chain]) -> float:
    found = [chain.payload_bits for chain in chains]
    return sum(found) / max(1, len(found))


def _blocks(chains: Iterable[Chain]) -> int:
    return math.lcm(*(chain.block for chain in chains))


def to_policy(entry: LayerPolicy, kv_heads: int, where: str) -> Policy:
    """Returns what a closed entry asks of a layer with so many kv heads; `where` is for errors.

    Raises:
        UsageError: heads that the layer does not have, or a head named twice; tokens that cannot be
        selected so (see `selection`); in a layer that shares, a codec that reads positions; a layer
        that reads another's cache and stores something.
    """
    named = entry.heads if isinstance(entry.heads, tuple) else ()
    ((sinks, recent),) = entry.windows()
    if entry.select is not None:
        return _selecting(entry, named, kv_heads, where)
    if entry.share is not None:
        return _sharing(entry, where)
    if not named:
        keys, values = entry.kept.chains()
        return Policy(sinks=sinks, recent=recent, keys=keys, values=values)
    pairs = [*(own.kept.chains() for own in named), entry.kept.chains()]
    _check_apart(pairs, where)
    owner = _owners(named, kv_heads, where)
    return Policy.by_head(sinks, recent, [pairs[index] for index in owner])


def _selecting(entry: LayerPolicy, named: Sequence[HeadEntry], kv_heads: int, where: str) -> Policy:
    ((sinks, recent),) = entry.windows()
    rest = entry.rest.chains() if isinstance(entry.rest, Tier) else None
    merge = None if entry.merge is None else parts.parse(entry.merge)
    assert merge is None or isinstance(merge, Merger), "the entry was checked"
    alone = [(*own.kept.chains(), _selector(own.select or entry.select)) for own in named]
    alone.append((*entry.kept.chains(), _selector(entry.select)))
    for keys, values, select in alone:
        selection.check(select, (sinks, recent), (keys, values), rest, merge, where)
    made: dict[str, Any] = {"sinks": sinks, "recent": recent, "rest": rest, "merge": merge}
    owner = _owners(named, kv_heads, where)
    _check_apart(alone, where)
    return Policy.of_heads([alone[index] for index in owner], **made)


def _check_apart(heads: Sequence[Sequence[Any]], where: str) -> None:
    if len(heads) > 1 and (joint := [own for head in heads for own in head[:2] if not own.apart]):
        raise UsageError(
            f"{where}: {joint[0]} stores heads together, so heads cannot differ there.",
            "Leave heads out of this layer.",
        )


def _selector(table: dict[str, Any] | None) -> Selector:
    select = parts.parse(table or {})
    assert isinstance(select, Selector), "the entry was checked"
    return select


def _owners(named: Sequence[HeadEntry], kv_heads: int, where: str) -> list[int]:
    try:
        return resolve([*(own.span for own in named), "rest"], kv_heads, "kv head")
    except UsageError as error:
        raise UsageError(f"{where}, heads: {error}") from None


def _sharing(entry: LayerPolicy, where: str) -> Policy:
    ((sinks, recent),) = entry.windows()
    keys, values = entry.kept.chains()
    share = parts.parse(entry.share or {})
    assert isinstance(share, Sharer | Borrower), "the entry was checked"
    codecs = [*keys.codecs, *values.codecs]
    if isinstance(share, Borrower) and (codecs or sinks or recent):
        raise UsageError(
            f"{where} reads the cache of layer {share.layer} and stores nothing.",
            "Leave kept, sinks and recent out of this layer.",
        )
    if odd := [codec.name() for codec in codecs if "rope" in codec.needs]:
        raise UsageError(
            f"{where}: {odd[0]} turns keys by their positions, and what layers share is no key.",
            f"Leave {odd[0]} out; a sharer turns keys back itself where it needs to.",
        )
    return Policy(sinks=sinks, recent=recent, keys=keys, values=values, share=share)


def to_entry(policy: Policy, span: str) -> LayerPolicy:
    """Returns the entry of a recipe that asks for a policy, the inverse of `to_policy`."""
    base = (policy.keys, policy.values)
    heads = tuple(
        HeadEntry(
            span=write(group.heads),
            kept=Tier.of(group.keys, group.values),
            select=None if group.select is None else group.select.table(),
        )
        for group in policy.heads
        if (group.keys, group.values, group.select) != (*base, policy.select)
    )
    made: dict[str, Any] = {"sinks": policy.sinks, "recent": policy.recent, "kept": Tier.of(*base)}
    if policy.select is not None:
        made["select"] = policy.select.table()
        made["rest"] = Tier.of(*policy.rest) if policy.rest else DROP
        made["merge"] = None if policy.merge is None else policy.merge.table()
    if policy.share is not None:
        made["share"] = policy.share.table()
    return LayerPolicy(span=span, heads=heads, **made)
