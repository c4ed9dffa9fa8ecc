"""Low rank: what a rank costs by basis, metric, heads together, centring and RoPE."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from kvtune.bench.codecs import Subject
from kvtune.bench.compositions import RECENT, SINKS, spread
from kvtune.cache import weigh
from kvtune.calibrate import Say, quiet
from kvtune.chains import Chain
from kvtune.errors import UsageError
from kvtune.methods.derope import Derope
from kvtune.methods.svd import Svd
from kvtune.models import Facts
from kvtune.policy import Policy
from kvtune.saving import unsaving
from kvtune.space import SIDES as BOTH

RANKS = (0.25, 0.375, 0.5, 0.75)
BASES = ("calibrated", "prompt")
METRICS = ("plain", "whitened", "queries", "kq")
SIDES = ("keys", "values", "both")
TOGETHER = (1, 2, 4, "all")  # kv heads
STEPS = 64  # of the width, in which ranks are written
LONG = 32768  # tokens at which a basis hardly counts


@dataclass(frozen=True)
class Case:
    """A projection of one side, or of both."""

    part: str  # of the report: "bases", "heads", "centre", "rope"
    keys: Svd | None = None
    values: Svd | None = None
    turned: bool = False  # keys as they are cached, after RoPE
    note: str = ""

    @classmethod
    def of(cls, part: str, side: str, made: Svd, note: str = "") -> Case:
        """A projection of a side, or of both; of values no mean is taken away.

        Much is read of tokens whose values are about zero: with a mean they are not.
        """
        bare = made.model_copy(update={"centre": "none"})
        keys, values = (side in (name, "both") for name in BOTH)
        return cls(part, made if keys else None, bare if values else None, note=note)

    @property
    def side(self) -> str:
        """What is projected."""
        return "both" if self.keys and self.values else "keys" if self.keys else "values"

    @property
    def svd(self) -> Svd:
        """The projection; of both sides the keys'."""
        found = self.keys or self.values
        assert found is not None, "a case projects something"
        return found

    @property
    def policy(self) -> Policy:
        """What all layers do; the codes are 16-bit numbers."""
        found: dict[str, Any] = {}
        if self.keys:
            found["keys"] = Chain((self.keys,) if self.turned else (Derope(), self.keys))
        if self.values:
            found["values"] = Chain((self.values,))
        return Policy(sinks=SINKS, recent=RECENT, **found)


@dataclass(frozen=True)
class Cost:
    """KL in nats and flips, means over all positions; bytes at the context, everything counted, and
    true bits of a value of what is compressed, there and behind 32,768 tokens."""

    kl: float
    flips: float
    bytes: int
    bits: float
    long_bits: float


def cases(known: Facts, context: int, ranks: Sequence[float] = RANKS) -> list[Case]:
    """All cases that a model's heads and a context allow, without what would save no bytes.

    Raises:
        UsageError: a rank that no recipe takes, or none that saves anything here.
    """
    try:
        every = list(_cases(known, context, ranks))
    except ValueError as error:
        raise UsageError(f"{error}.", "Give --ranks 0.25,0.5 for example.") from None
    found = [case for case in every if _stands(case, known, context)]
    if not found:
        what = f"No rank of {', '.join(f'{rank:g}' for rank in ranks)} saves bytes"
        raise UsageError(f"{what} at {context:,} tokens.", "Give a longer --context.")
    return found


def measure(subject: Subject, found: Sequence[Case], context: int, say: Say = quiet) -> list[Cost]:
    """Measures cases in order; what comes again under another name is measured once."""
    known = subject.bench.bank.facts
    costs: dict[Policy, Cost] = {}
    for done, case in enumerate(found, 1):
        policies = spread(_shaped(case.policy, known), known)
        if case.policy not in costs:
            means = subject.bench.measure(policies).means()
            weights = [weigh(policies, known, length) for length in (context, LONG)]
            sides = 2 if case.side == "both" else 1
            bits = [16 - (16 - weight.bits) * 2 / sides for weight in weights]
            costs[case.policy] = Cost(means["kl"], means["flips"], weights[0].bytes, *bits)
        say("low rank", done, len(found))
    return [costs[case.policy] for case in found]


def _cases(known: Facts, context: int, ranks: Sequence[float]) -> Iterator[Case]:
    for rank in ranks:
        for basis in BASES:
            for metric in METRICS:
                svd = Svd.model_validate({"rank": rank, "basis": basis, "metric": metric})
                # both sides last: what each stores is memoised by then
                yield from (Case.of("bases", side, svd) for side in SIDES)
    few = sorted({ranks[0], ranks[len(ranks) // 2]})
    for side in BOTH:
        for rank in few:
            yield from _by_heads(side, rank, known, context)
    for side in BOTH:
        for rank in few:
            for centre in ("mean", "none"):
                made: dict[str, Any] = {side: _kq(rank, centre=centre)}
                yield Case("centre", **made)
    for rank in few:
        for turned in (False, True):
            yield Case("rope", keys=_kq(rank), turned=turned)


def _kq(rank: float, **settings: Any) -> Svd:
    return Svd.model_validate({"rank": rank, "basis": "prompt", "metric": "kq", **settings})


def _by_heads(side: str, rank: float, known: Facts, context: int) -> Iterator[Case]:
    """All heads together, then fewer: at this rank, and at the next rank of no fewer bytes."""
    whole = Case.of("heads", side, _kq(rank))
    yield whole
    least = _bytes(whole, known, context)
    for together in TOGETHER[:-1]:
        alike = Case.of("heads", side, _kq(rank, heads=together), "equal rank")
        if not _fits(alike, known) or _is_all(together, known):
            continue
        yield alike
        for step in range(round(rank * STEPS), STEPS):
            more = Case.of("heads", side, _kq(step / STEPS, heads=together), "equal bytes")
            if _bytes(more, known, context) >= least:
                yield more
                break


def _is_all(together: int | str, known: Facts) -> bool:
    return all(known.layers[i].kv_heads == together for i in known.compressible())


def _bytes(case: Case, known: Facts, context: int) -> int:
    return weigh(spread(_shaped(case.policy, known), known), known, context).bytes


def _shaped(policy: Policy, known: Facts) -> Policy:
    """With the tokens that its bases want, in whichever layer wants the most."""
    shapes = {(known.layers[i].kv_heads, known.layers[i].head_dim) for i in known.compressible()}
    return max((policy.of_shape(*shape) for shape in shapes), key=lambda own: own.least)


def _fits(case: Case, known: Facts) -> bool:
    try:
        _shaped(case.policy, known)
    except ValueError:
        return False
    return True


def _stands(case: Case, known: Facts, context: int) -> bool:
    """Whether the heads part so, and a prompt's own basis saves bytes at the context."""
    if not _fits(case, known):
        return False
    policy = _shaped(case.policy, known)
    shapes = {(known.layers[i].kv_heads, known.layers[i].head_dim) for i in known.compressible()}
    return not any(
        unsaving(policy, side, chain, shape, context)
        for shape in shapes
        for side, chain in zip(BOTH, (policy.keys, policy.values), strict=True)
    )
