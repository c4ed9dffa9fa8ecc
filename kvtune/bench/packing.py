"""Bench: packed prefix caches beside DEFLATE, 8 bits and KVTC's own coding, on held-out text."""

from __future__ import annotations

import statistics
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from transformers import DynamicCache

from kvtune import packing
from kvtune.allotting import Group
from kvtune.bank import Bank, Sizes, build, text_tokens
from kvtune.calibrate import Say, quiet
from kvtune.measure import Quality, compare
from kvtune.packing import kvtc
from kvtune.packing.codec import Codec
from kvtune.packing.container import inflate
from kvtune.packing.whole import values
from kvtune.prove import interval
from kvtune.texts import Document

STEPS = (5e-4, 4e-4, 3e-4, 2e-4, 1e-4, 5e-5)
KVTC_BITS = (1.3, 1.6, 2.0)


@dataclass(frozen=True)
class Row:
    """What one setting took and cost, over all caches."""

    name: str
    ratio: float  # of the 16-bit cache to all bytes of the files
    bits: float  # true bits a value
    kl: float
    kl_low: float
    kl_high: float
    flips: float
    encode: float  # seconds, the median
    decode: float


class Way(NamedTuple):
    """A way to store a cache."""

    name: str
    encode: Callable[[DynamicCache], bytes]
    decode: Callable[[bytes, DynamicCache], DynamicCache]  # and a cache of the same shape


def rows(
    model: Any,
    tokenizer: Any,
    documents: list[Document],
    codec: Codec,
    sizes: Sizes,
    steps: Sequence[float] = STEPS,
    kvtc_bits: Sequence[float] = KVTC_BITS,
    say: Say = quiet,
) -> list[Row]:
    """Stores the caches of held-out contexts in every way, and reads continuations behind them.

    Raises:
        IntegrityError: the codec is another model's.
        MissingInputError: too little text.
    """
    tokens = text_tokens(documents, tokenizer, sizes, "proof")
    bank = build(model, tokens, sizes.context)
    found = []
    ways = [*_plain_ways(), *_packed_ways(model, codec, steps, kvtc_bits)]
    for done, way in enumerate(ways):
        say("bench", done, len(ways))
        found.append(_row(model, bank, way))
    say("bench", len(ways), len(ways))
    return found


def _packed_ways(
    model: Any, codec: Codec, steps: Sequence[float], kvtc_bits: Sequence[float]
) -> list[Way]:
    def way(name: str, **words: Any) -> Way:
        return Way(
            name,
            lambda cache: packing.pack(cache, model, codec, **words),
            lambda data, cache: packing.unpack(data, model, codec),
        )

    return [
        *(way(f"KVTC, {bits:g} bits", bits=bits, coding="kvtc") for bits in kvtc_bits),
        *(way(f"kvtune, step {step:g}", step=step) for step in steps),
    ]


def _plain_ways() -> list[Way]:
    return [
        Way("16 bits, DEFLATE", _deflate, _inflate),
        Way("8 bits a token and head, DEFLATE", _eight, _uneight),
    ]


def _deflate(cache: DynamicCache) -> bytes:
    return zlib.compress(
        b"".join(x.half().contiguous().numpy().tobytes() for x in _tensors(cache)), 6
    )


def _inflate(data: bytes, like: DynamicCache) -> DynamicCache:
    raw = bytearray(inflate(data, sum(2 * x.numel() for x in _tensors(like))))
    return _filled(torch.frombuffer(raw, dtype=torch.float16), like)


def _eight(cache: DynamicCache) -> bytes:
    parts = [_headed(x) for x in _tensors(cache)]
    sizes = [zlib.compress(b""), *(kvtc.encode(x, [Group(x.shape[1], 8)], 1.0) for x in parts)]
    return b"".join(len(part).to_bytes(4, "little") + part for part in sizes[1:])


def _uneight(data: bytes, like: DynamicCache) -> DynamicCache:
    found, start = [], 0
    for x in _tensors(like):
        size = int.from_bytes(data[start : start + 4], "little")
        part, (count, dim) = data[start + 4 : start + 4 + size], _headed(x).shape
        found.append(kvtc.decode(part, count, [Group(dim, 8)], 1.0).flatten())
        start += 4 + size
    return _filled(torch.cat(found), like)


def _tensors(cache: DynamicCache) -> list[torch.Tensor]:
    return [x.cpu() for layer in cache.layers for x in (layer.keys, layer.values)]


def _headed(x: torch.Tensor) -> torch.Tensor:
    """[H T, D] of [1, H, T, D]."""
    return x[0].flatten(0, 1).float()


def _filled(flat: torch.Tensor, like: DynamicCache) -> DynamicCache:
    """A cache of the same shape with other values."""
    made, start = DynamicCache(), 0
    for layer in like.layers:
        pair = []
        for x in (layer.keys, layer.values):
            pair.append(flat[start : start + x.numel()].view(x.shape).to(x))
            start += x.numel()
        made.update(pair[0], pair[1], len(made.layers))
    return made


def _row(model: Any, bank: Bank, way: Way) -> Row:
    sizes, spent, parts = [], [], []
    for row in range(bank.tokens.shape[0]):
        layers = [bank.dense_layer(i, [row]) for i in range(len(bank.facts.layers))]
        cache = DynamicCache(config=model.config)
        cache.layers = layers
        began = time.perf_counter()
        data = way.encode(cache)
        middle = time.perf_counter()
        other = way.decode(data, cache)
        spent.append((middle - began, time.perf_counter() - middle))
        sizes.append(len(data))
        parts.append(_quality(model, bank, other, row))
    quality = Quality.joined(parts)
    means, dense = quality.means(), 2 * values(bank.facts, bank.context)
    nbytes = statistics.fmean(sizes)
    low, high = interval(quality.kl)
    encode, decode = (statistics.median(column) for column in zip(*spent, strict=True))
    return Row(
        way.name,
        dense / nbytes,
        16 * nbytes / dense,
        means["kl"],
        low,
        high,
        means["flips"],
        encode,
        decode,
    )


@torch.no_grad()
def _quality(model: Any, bank: Bank, cache: DynamicCache, row: int) -> Quality:
    one = slice(row, row + 1)
    logits = model(bank.inputs[one], past_key_values=cache).logits
    return compare(bank.logp[one], logits, bank.targets[one])
