"""Prefix caches on disk: a model's DynamicCache in few bytes, and back (after KVTC,
arXiv:2511.01815)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from kvtune.errors import IntegrityError, UsageError
from kvtune.models import facts
from kvtune.packing import kvtc, whole
from kvtune.packing.body import Scheme, components, decode, encode, exact, inexact, step_for
from kvtune.packing.checks import belongs, counted, length_of, same, settings
from kvtune.packing.codec import Codec
from kvtune.packing.container import Container
from kvtune.packing.fitting import find_ropes
from kvtune.packing.layout import columns, heads, turned

STEP = 2e-4  # roots of nats a token
SINKS = 1  # first tokens that are exact; that the next three were gained nothing on the demo model
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)
}


@torch.no_grad()
def pack(
    cache: DynamicCache,
    model: Any,
    codec: Codec,
    *,
    tokens: Tensor | None = None,
    step: float = STEP,
    bits: float | None = None,
    coding: str = "entropy",
) -> bytes:
    """Returns the file of a cache that holds one prefix, from position 0 on.

    The first token is exact, in 16 bits, and the last 512 have ever finer steps; `kvtc` keeps the
    first 4 and the last 128 exact. Sliding layers are stored as they are.

    Args:
        cache: of full-attention layers [1, H, T, D] and sliding ones, in any dtype that torch has.
        tokens: ids [T] of the prefix, which go along; [T + 1] with the one that comes next.
        step: of all components; half of it costs about one bit more for each that is not silent.
        bits: for each value of the cache, all bytes counted; in place of a step.
        coding: "entropy", or "kvtc" for KVTC's own groups and DEFLATE, which wants `bits`.

    Raises:
        IntegrityError: the codec is another model's.
        UnsupportedError: a batch, a padded or offloaded cache, values that are not finite.
        UsageError: settings that cannot be.
    """
    known = facts(model.config)
    belongs(codec, model)
    length = length_of(cache, known)
    settings(step, bits, coding, tokens, length)
    turns = find_ropes(model) if codec.pre_rope else {}
    dtype = cache.layers[known.compressible()[0]].keys.dtype
    sixteen = torch.bfloat16 if dtype == torch.bfloat16 else torch.float16
    facts_of = {
        "fingerprint": codec.fingerprint,
        "codec": codec.digest,
        "tokens": length,
        "dtype": str(dtype).removeprefix("torch."),
        "coding": coding,
    }
    sections = whole.others(cache, known)
    if tokens is not None:
        sections[whole.IDS], facts_of[whole.IDS] = whole.ids(tokens)
        facts_of["ids"] = tokens.numel()
    first, last = (kvtc.SINKS, kvtc.RECENT) if coding == "kvtc" else (SINKS, 0)
    scheme = Scheme(step, first=first, last=last)
    found, middle = [], scheme.coded(length)
    for number, pair in enumerate(codec.spans):
        keys = columns(_held(cache, "keys"), pair[0].layers, turns)
        values = columns(_held(cache, "values"), pair[1].layers)
        both = torch.cat([keys, values], 1)
        ends = torch.cat([both[: middle.start], both[middle.stop :]])
        sections[f"{number}.exact"] = exact(ends, sixteen)
        found.append(components(pair, keys[middle], values[middle], step))
    made = _Body(found, scheme, sections, facts_of)
    if bits is not None:
        scheme = made.within(bits * whole.values(known, length) / 8, codec)
    return made.file(scheme)


@dataclass(frozen=True, eq=False)
class _Body:
    """Components that wait for their codes, and the sections beside them."""

    found: list[Tensor]  # of each span, [T, R]
    scheme: Scheme
    sections: dict[str, bytes]
    facts: dict[str, Any]

    def file(self, scheme: Scheme) -> bytes:
        """The whole file."""
        told = {
            "step": scheme.step,
            "first": scheme.first,
            "last": scheme.last,
            "groups": [[list(group) for group in groups] for groups in scheme.groups],
        }
        coded = {f"{n}.codes": encode(z, scheme, n) for n, z in enumerate(self.found)}
        return Container({**self.facts, **told}, {**self.sections, **coded}).to_bytes()

    def within(self, nbytes: float, codec: Codec) -> Scheme:
        """The scheme whose file takes about so many bytes.

        Raises:
            UsageError: too few for what is stored exactly.
        """
        fixed = len(Container(self.facts, self.sections).to_bytes())
        if nbytes <= fixed:
            what = f"{nbytes:.0f} bytes are fewer than the {fixed} of what is stored exactly."
            raise UsageError(what, "Give more --bits or a smaller --ratio.")
        if self.facts["coding"] == "kvtc":
            return self._grouped(nbytes - fixed, codec)

        def sized(step: float) -> int:
            return len(self.file(replace(self.scheme, step=step)))

        return replace(self.scheme, step=step_for(nbytes, self.scheme.step, sized))

    def _grouped(self, nbytes: float, codec: Codec) -> Scheme:
        tokens = max(1, len(self.found[0]))
        ranks = [z.shape[1] for z in self.found]
        units = max(float(span.deviations.max()) for pair in codec.spans for span in pair)
        share = [int(8 * nbytes / tokens * rank / sum(ranks)) for rank in ranks]
        groups = []
        for (keys, values), bits in zip(codec.spans, share, strict=True):
            deviations = torch.cat([keys.deviations, values.deviations])
            groups.append(tuple(kvtc.allotted(deviations, bits if len(self.found[0]) else 0)))
        return Scheme(units, tuple(groups), self.scheme.first, self.scheme.last)


def header(data: bytes) -> dict[str, Any]:
    """The facts of a packed cache: model, codec, tokens, dtype, coding.

    Raises:
        IntegrityError: any byte was changed.
    """
    return dict(Container.parse(data).facts)


def prompt(data: bytes) -> Tensor | None:
    """The ids of the prefix [T], or [T + 1] with the next one, where they went along.

    Raises:
        IntegrityError: any byte was changed, or their hash differs.
    """
    return whole.read_ids(Container.parse(data))


@torch.no_grad()
def unpack(data: bytes, model: Any, codec: Codec) -> DynamicCache:
    """Returns the cache, on the model's devices, with which `model.generate` goes on.

    Raises:
        IntegrityError: a changed byte, another model, another codec, or sizes that do not fit.
    """
    held = Container.parse(data)
    known = facts(model.config)
    same(held.facts, codec)
    belongs(codec, model)
    tokens = counted(held.facts, "tokens")
    if not 0 < tokens <= known.max_positions:
        what = f"The packed cache has {tokens} tokens, the model {known.max_positions} positions."
        raise IntegrityError(what)
    dtype = _DTYPES.get(str(held.facts.get("dtype")))
    if dtype is None:
        raise IntegrityError(f"The packed cache has the dtype {held.facts.get('dtype')!r}.")
    scheme = _scheme(held.facts, codec)
    turns = find_ropes(model) if codec.pre_rope else {}
    sides: dict[int, tuple[Tensor, Tensor]] = {}
    for number, pair in enumerate(codec.spans):
        both = _tokens(held, scheme, number, codec, tokens, dtype)
        cut = pair[0].width
        one = known.layers[pair[0].layers[0]]
        split = partial(heads, count=one.kv_heads, dim=one.head_dim)
        rows = zip(pair[0].layers, split(both[:, :cut]), split(both[:, cut:]), strict=True)
        for layer, keys, values in rows:
            sides[layer] = turned(keys, turns.get(layer)), values
    return whole.restored(held, model, known, sides, dtype, tokens)


def _held(cache: DynamicCache, side: str) -> dict[int, Tensor]:
    return {i: getattr(layer, side) for i, layer in enumerate(cache.layers)}


def _scheme(held: Mapping[str, Any], codec: Codec) -> Scheme:
    step = held.get("step")
    if not isinstance(step, int | float) or not (math.isfinite(step) and 0 < step < 1e9):
        raise IntegrityError(f"The packed cache says step = {step!r}.")
    groups: tuple[Any, ...] = ()
    if held.get("coding") == "kvtc":
        ranks = [keys.rank + values.rank for keys, values in codec.spans]
        told = held.get("groups")
        if not isinstance(told, list) or len(told) != len(ranks):
            raise IntegrityError("The packed cache has no groups for its components.")
        groups = tuple(tuple(kvtc.checked(*pair)) for pair in zip(told, ranks, strict=True))
    return Scheme(float(step), groups, counted(held, "first"), counted(held, "last"))


def _tokens(
    held: Container, scheme: Scheme, number: int, codec: Codec, tokens: int, dtype: torch.dtype
) -> Tensor:
    """Both sides [T, 2 W] of a span."""
    pair, middle = codec.spans[number], scheme.coded(tokens)
    width = sum(span.width for span in pair)
    rows = tokens - (middle.stop - middle.start)
    sixteen = torch.bfloat16 if dtype == torch.bfloat16 else torch.float16
    ends = inexact(held.section(f"{number}.exact"), rows, width, sixteen)
    coded = decode(
        held.section(f"{number}.codes"), scheme, number, pair, middle.stop - middle.start
    )
    return torch.cat([ends[: middle.start], coded, ends[middle.start :]])
