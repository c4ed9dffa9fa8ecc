"""Compositions: chains at equal true bytes, each also with one part taken away or replaced."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvtune import parts
from kvtune.cache import Weight, weigh
from kvtune.chains import Chain
from kvtune.errors import UsageError
from kvtune.models import Facts
from kvtune.parts import SEARCH, Codec
from kvtune.policy import Policy

SINKS, RECENT = 4, 64
ANY = "?"  # a setting that is chosen for its bytes

KEYS = "klt > waterfill bits=2.0 group=128"
VALUES = "hadamard > normal bits=2 group=head"
CODEBOOK = "codebook bits=2 axis=channel group=128"
TERNARY = "hadamard > ternary axis=token"
BINARY = "hadamard > binary axis=token"
PER_CHANNEL = f"affine bits={ANY} group={ANY} axis=channel"
PER_TOKEN = f"affine bits={ANY} group={ANY} axis=token"
FILLED = f"waterfill bits={ANY} group={ANY}"
NORMAL = f"normal bits={ANY} group={ANY}"


@dataclass(frozen=True)
class Change:
    """What a composition becomes when a part is removed or replaced, and what that part was."""

    what: str
    keys: str = ""
    values: str = ""
    sinks: int = SINKS
    recent: int = RECENT


@dataclass(frozen=True)
class Family:
    """A composition in words, and its changes, which are compared with it."""

    name: str
    keys: str = ""
    values: str = ""
    changes: tuple[Change, ...] = ()


def _keys(what: str, words: str, sinks: int = SINKS, recent: int = RECENT) -> Change:
    return Change(what, words, "", sinks, recent)


def _values(what: str, words: str, sinks: int = SINKS, recent: int = RECENT) -> Change:
    return Change(what, "", words, sinks, recent)


FAMILIES = (
    Family(
        "keys",
        keys=KEYS,
        changes=(
            _keys("klt's weight", f"klt weight=plain > {FILLED}"),
            _keys("klt, its mean kept", f"centre > {FILLED}"),
            _keys("klt", FILLED),
            _keys("waterfill", f"klt > {PER_CHANNEL}"),
            _keys("waterfill for promote", f"klt > promote share={ANY} group={ANY}"),
            _keys("both: KIVI", PER_CHANNEL),
            _keys("both: KIVI, centred", f"centre > {PER_CHANNEL}"),
            _keys("both: MixKVQ", f"promote share={ANY} group={ANY} by=reads"),
            _keys("both: Kitty", f"promote share={ANY} group={ANY} by=magnitude"),
            _keys("both: OSCAR", f"centre > rotate > {PER_TOKEN}"),
            _keys("both: OSCAR, normal", f"centre > rotate > {NORMAL}"),
            _keys("both: OSCAR, bare", f"rotate > {NORMAL}"),
            _keys("both: QuaRot", f"hadamard > {PER_TOKEN}"),
            _keys("both: TurboQuant, centred", f"centre > hadamard > {NORMAL}"),
            _keys("both: MiKV", f"balance > {PER_TOKEN}"),
            _keys("both: per token", PER_TOKEN),
            _keys("post-RoPE", f"derope > klt > {FILLED}"),
            _keys("sinks", KEYS, sinks=0),
            _keys("window", KEYS, recent=0),
            _keys("sinks and window", KEYS, sinks=0, recent=0),
        ),
    ),
    Family(
        "keys, codebook",
        keys=CODEBOOK,
        changes=(
            _keys("levels fitted", PER_CHANNEL),
            _keys("post-RoPE: KVQuant", f"derope > codebook bits={ANY} axis=channel group={ANY}"),
        ),
    ),
    Family(
        "values",
        values=VALUES,
        changes=(
            _values("hadamard", NORMAL),
            _values("hadamard for rotate", f"rotate > {NORMAL}"),
            _values("normal", f"hadamard > {PER_TOKEN}"),
            _values("even steps", f"hadamard > {NORMAL} spacing=lloyd-max"),
            _values("even steps, normal", f"hadamard > codebook bits={ANY} axis=token"),
            _values("both: KIVI", PER_TOKEN),
            _values("both: VidKV", PER_CHANNEL),
            _values("both: codebook", f"codebook bits={ANY} axis=token"),
            _values("both: as keys", f"klt > {FILLED}"),
            _values("sinks", VALUES, sinks=0),
            _values("window", VALUES, recent=0),
            _values("sinks and window", VALUES, sinks=0, recent=0),
        ),
    ),
    Family(
        "values, 1.6 bits",
        values=TERNARY,
        changes=(
            _values("unbiased scale", f"{TERNARY} scale=mean"),
            _values("hadamard", "ternary axis=token"),
            _values("per token: VidKV", f"ternary axis=channel group={ANY} scale=mean"),
        ),
    ),
    Family(
        "values, 1 bit",
        values=BINARY,
        changes=(
            _values("unbiased scale", f"{BINARY} scale=mean"),
            _values("hadamard", "binary axis=token"),
        ),
    ),
    Family(
        "both",
        keys=KEYS,
        values=VALUES,
        changes=(
            Change("all: KIVI", PER_CHANNEL, PER_TOKEN),
            Change("all: OSCAR", f"centre > rotate > {PER_TOKEN}", f"rotate > {PER_TOKEN}"),
            Change("all: MiKV's codes", f"balance > {PER_TOKEN}", PER_TOKEN),
            Change("all: MixKVQ", f"promote share={ANY} group={ANY}", PER_TOKEN),
            Change("keys: KIVI", PER_CHANNEL, VALUES),
            Change("keys: post-RoPE", f"derope > klt > {FILLED}", VALUES),
            Change("values: KIVI", KEYS, PER_TOKEN),
            Change("sinks", KEYS, VALUES, sinks=0),
            Change("window", KEYS, VALUES, recent=0),
        ),
    ),
)


@dataclass(frozen=True)
class Row:
    """A composition as it is measured, in all layers alike."""

    family: str
    without: str  # what was taken away; nothing for the whole composition
    policy: Policy
    sides: tuple[str, str]  # keys and values in words; nothing is 16 bits
    bits: float  # true bits per value of what is compressed

    @property
    def same_window(self) -> bool:
        """False where sinks or window are what was taken away; such a row has fewer bytes."""
        return (self.policy.sinks, self.policy.recent) == (SINKS, RECENT)


def rows(known: Facts, context: int, families: Sequence[Family] = FAMILIES) -> list[Row]:
    """Settles every composition at the bytes of a cache of `context` tokens.

    Where a change would take fewer bytes than the whole composition, its open settings become those
    of the least bytes that are no fewer, each side for itself: what is removed is then never
    missed for lack of bytes.

    Raises:
        UsageError: heads that a composition does not fit.
    """
    found = []
    for family in families:
        whole = Change("", family.keys, family.values)
        least = {side: _bits(_closed(whole, side, known), known, context) for side in _open(whole)}
        for change in (whole, *family.changes):
            found.append(_settled(family.name, change, least, known, context))
    return found


def _open(change: Change) -> list[str]:
    return [side for side in ("keys", "values") if getattr(change, side)]


def _closed(change: Change, side: str, known: Facts) -> Policy:
    chain = next(choices(getattr(change, side)))
    first = known.compressible()[0]
    policy = _policy(change, {side: chain})
    shape = known.layers[first].kv_heads, known.layers[first].head_dim
    policy.check(*shape, first)
    return policy


def _policy(change: Change, chains: Mapping[str, Chain]) -> Policy:
    keys, values = (chains.get(side, Chain()) for side in ("keys", "values"))
    return Policy(sinks=change.sinks, recent=change.recent, keys=keys, values=values)


def _settled(
    family: str, change: Change, least: dict[str, float], known: Facts, context: int
) -> Row:
    chains = {side: _nearest(change, side, least[side], known, context) for side in least}
    policy = _policy(change, chains)
    words = (spelled(policy.keys), spelled(policy.values))
    return Row(family, change.what, policy, words, _bits(policy, known, context))


def _nearest(change: Change, side: str, least: float, known: Facts, context: int) -> Chain:
    """The chain of the fewest bytes that are no fewer than asked for; one chain is what it is."""
    legal = [chain for chain in choices(getattr(change, side)) if fits(chain, side, known)]
    if not legal:
        what = f"{getattr(change, side)} fits no head of this model ({side})."
        raise UsageError(what, "Heads of 64 or 128 channels fit all compositions.")
    priced = [(_bits(_policy(change, {side: chain}), known, context), chain) for chain in legal]
    enough = [pair for pair in priced if pair[0] >= least]
    return min(enough, key=lambda pair: pair[0])[1] if enough else max(priced, key=_first)[1]


def _first(pair: tuple[float, Chain]) -> float:
    return pair[0]


def fits(chain: Chain, side: str, known: Facts) -> bool:
    """Whether a chain fits this side of every layer that can be compressed."""
    try:
        for layer in known.compressible():
            own = known.layers[layer]
            chain.check(own.kv_heads, own.head_dim, side)
    except ValueError:
        return False
    return True


def spread(policy: Policy, known: Facts) -> tuple[Policy, ...]:
    """A policy in all layers that can be compressed."""
    full = known.compressible()
    return tuple(policy if i in full else Policy() for i in range(len(known.layers)))


def _bits(policy: Policy, known: Facts, context: int) -> float:
    """True bits per value of the sides that are compressed, the mean over all layers."""
    weight = weigh(spread(policy, known), known, context)
    return weight.bits if policy.keys.codecs and policy.values.codecs else _of_one_side(weight)


def _of_one_side(weight: Weight) -> float:
    return 2 * weight.bits - 16  # the other one has 16


def choices(words: str) -> Iterator[Chain]:
    """Yields all chains that "klt > waterfill bits=2.0 group=?" stands for.

    Raises:
        ValueError: no such method or setting.
    """
    tables = [_table(part.split()) for part in words.split(" > ")]
    for codecs in itertools.product(*(list(parts.choices(table)) for table in tables)):
        yield Chain(tuple(codec for codec in codecs if isinstance(codec, Codec)))


def _table(words: list[str]) -> dict[str, Any]:
    settings = (word.partition("=") for word in words[1:])
    return {"use": words[0], **{name: _value(word) for name, _, word in settings}}


def _value(word: str) -> int | float | str:
    if word == ANY:
        return SEARCH
    for kind in (int, float):
        try:
            return kind(word)
        except ValueError:
            continue
    return word


def spelled(chain: Chain) -> str:
    """The words of a chain, as in `choices`, without settings that are the usual ones."""
    return " > ".join(_spelled(codec) for codec in chain.codecs)


def _spelled(codec: Codec) -> str:
    usual = type(codec)().model_dump()
    # what decides the bytes is always said
    said = {
        name: value
        for name, value in codec.model_dump().items()
        if name in ("bits", "group", "share", "axis") or value != usual[name]
    }
    return " ".join([codec.name(), *(f"{name}={value}" for name, value in said.items())])
