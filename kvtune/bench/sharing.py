"""Bench: layers that store together. Groups of xKV at equal bytes, MiniCache's two retentions, and
maps of owners."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvtune.bank import Bank, Sizes, build, text_tokens
from kvtune.cache import weigh
from kvtune.calibrate import Say, quiet
from kvtune.chains import Chain
from kvtune.errors import UsageError
from kvtune.kvsharer import Map, Step, neighbours, policies_of, search
from kvtune.measure import Bench
from kvtune.methods.affine import Affine
from kvtune.methods.minicache import Minicache
from kvtune.methods.xkv import Xkv
from kvtune.models import Facts, facts, ropes
from kvtune.policy import Policy
from kvtune.prove import interval
from kvtune.sharing import settled
from kvtune.texts import Document

Policies = tuple[Policy, ...]
SINKS, RECENT = 4, 128  # exact tokens of every row
EVEN = 0.01  # recipes of equal bytes are within so much of one another
RATIOS = (1.4, 1.7)  # of the rank of values to that of keys; the paper's is 1.5
SHORT = Sizes(30, 64, 1)  # texts that KVSharer's search reads: as many and as long as the paper's
REACH = 3  # layers before a borrower that are tried as its owner


@dataclass(frozen=True)
class Row:
    """What one way of sharing costs."""

    name: str
    bytes: int
    bits: float  # true bits per cached value behind the context
    kl: float
    kl_low: float
    kl_high: float
    flips: float


class Sharing:
    """A model and its bank, on which ways to share are measured side by side."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        documents: Mapping[str, list[Document]],
        sizes: Sizes,
        say: Say = quiet,
    ) -> None:
        self.model, self.known, self._say = model, facts(model.config), say
        self._documents, self._tokenizer = documents, tokenizer
        tokens = text_tokens(documents["search"], tokenizer, sizes, "search")
        self.bank: Bank = build(model, tokens, sizes.context)
        self._bench = Bench(model, self.bank, ropes(model))

    def row(self, name: str, policies: Policies) -> Row:
        """Measures one recipe."""
        quality = self._bench.measure(policies, memo=False)
        means, found = quality.means(), weigh(policies, self.known, self.bank.context)
        low, high = interval(quality.kl)
        return Row(name, found.bytes, found.bits, means["kl"], low, high, means["flips"])

    def rows(self, cases: Sequence[tuple[str, Policies]]) -> list[Row]:
        """Measures several."""
        found = []
        for done, (name, policies) in enumerate(cases):
            self._say("bench", done, len(cases))
            found.append(self.row(name, policies))
        return found

    def groups(self, widths: Sequence[int]) -> list[Row]:
        """xKV in groups of these sizes, at ranks that take equal bytes, bases included."""
        return self.rows(even(self.known, widths, self.bank.context))

    def merged(self) -> list[Row]:
        """MiniCache on the upper half of the layers: the tokens that differ most kept exactly, the
        tokens that differ least, or none; each with and without 4 bits; beside 4 bits alone."""
        return self.rows(retentions(self.known))

    def searched(self, shares: int, threshold: float) -> tuple[list[Step], list[Row]]:
        """Maps of 1 to `shares` borrowers that KVSharer finds, and what they cost."""
        texts = self._documents["calibrate"]
        short = text_tokens(texts, self._tokenizer, SHORT, "calibrate")[:, : SHORT.context]
        steps = search(
            self.model,
            short.to(self.bank.tokens.device),
            shares,
            threshold,
            lambda done, total: self._say("KVSharer", done, total),
        )
        cases = [(f"KVSharer {told(step.owners)}", self._of(step.owners)) for step in steps]
        return steps, self.rows(cases)

    def singles(self, best: int) -> list[Row]:
        """The cheapest maps of one borrower whose owner is near, by measured KL."""
        maps = neighbours(self.known.compressible(), REACH)
        found = self.rows([(told(owners), self._of(owners)) for owners in maps])
        return sorted(found, key=lambda row: row.kl)[:best]

    def _of(self, owners: Map) -> Policies:
        return settled(policies_of(owners, len(self.known.layers)), self.known)


def told(owners: Map) -> str:
    """A map of owners in words."""
    return ", ".join(f"{borrower} reads {owner}" for borrower, owner in sorted(owners.items()))


def even(known: Facts, widths: Sequence[int], context: int) -> list[tuple[str, Policies]]:
    """Recipes of xKV in groups of several sizes that store as many bytes, within a hundredth.

    Raises:
        UsageError: no ranks of the sizes take equal bytes.
    """
    tables = [_sizes(known, layers, context) for layers in widths]
    best: tuple[float, tuple[tuple[float, float], ...]] | None = None
    for ranks, size in tables[0].items():
        others = [min(table, key=lambda own: _miss(table[own], size, own)) for table in tables[1:]]
        sizes = [size, *(table[own] for table, own in zip(tables[1:], others, strict=True))]
        spread = max(sizes) / min(sizes) - 1
        if best is None or spread < best[0]:
            best = spread, (ranks, *others)
    if best is None or best[0] > EVEN:
        raise UsageError(
            f"No ranks of groups of {', '.join(map(str, widths))} layers take equal bytes.",
            "Give other --groups, or a longer --context.",
        )
    return [
        (f"xkv {layers}, ranks {ranks[0]:g} and {ranks[1]:g}", _factored(known, layers, *ranks))
        for layers, ranks in zip(widths, best[1], strict=True)
    ]


def _miss(size: int, wanted: int, ranks: tuple[float, float]) -> tuple[float, float]:
    """How far a size is off, and of equal ones how far the ranks are from the paper's ratio."""
    return abs(size / wanted - 1), abs(ranks[1] / ranks[0] - 1.5)


def _sizes(known: Facts, layers: int, context: int) -> dict[tuple[float, float], int]:
    """Bytes of each pair of ranks, keys' and values', that stores between 3 and 6 times less."""
    found: dict[tuple[float, float], int] = {}
    seen: set[tuple[int, int]] = set()
    shape = known.layers[known.compressible()[0]]
    for keys, values in itertools.product(range(2, 25), range(3, 40)):
        if not RATIOS[0] <= values / keys <= RATIOS[1]:
            continue
        ranks = keys / 64, values / 64
        part = Xkv(layers=layers, key_rank=ranks[0], value_rank=ranks[1])
        wide = (layers, shape.kv_heads, shape.head_dim)
        made = part.shape("keys", *wide)[1], part.shape("values", *wide)[1]
        if made in seen:  # ranks are rounded
            continue
        seen.add(made)
        weight = weigh(_factored(known, layers, *ranks), known, context)
        if 3 <= weight.ratio <= 6:
            found[ranks] = weight.bytes
    return found


def _factored(known: Facts, layers: int, keys: float, values: float) -> Policies:
    share = Xkv.model_validate({"layers": layers, "key_rank": keys, "value_rank": values})
    return _spread(known, Policy(sinks=SINKS, recent=RECENT, share=share), 0)


def retentions(known: Facts) -> list[tuple[str, Policies]]:
    """Recipes of MiniCache on the upper half of the layers, and of codes alone there."""
    exact = Policy(sinks=SINKS, recent=RECENT)
    codes = Chain((Affine(bits=4, axis="channel"),)), Chain((Affine(bits=4),))
    four = exact.model_copy(update={"keys": codes[0], "values": codes[1]})
    half = len(known.layers) // 2
    half += half % 2  # pairs begin at an even layer
    cases = [("4 bits", _spread(known, four, half))]
    for name, policy in (("16 bits", exact), ("4 bits", four)):
        for kept, part in (
            ("the dissimilar retained", Minicache(retain="dissimilar")),
            ("the similar retained", Minicache(retain="similar")),
            ("none retained", Minicache(retained=0.0)),
        ):
            merged = policy.model_copy(update={"share": part})
            cases.append((f"minicache in {name}, {kept}", _spread(known, merged, half)))
    return cases


def _spread(known: Facts, policy: Policy, first: int) -> Policies:
    """A policy for the full-attention layers from one on; the others stay dense."""
    full = known.compressible()
    made = [policy if i in full and i >= first else Policy() for i in range(len(known.layers))]
    return settled(made, known)
