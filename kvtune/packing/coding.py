"""Entropy coding of a token's components: one step for all of them, and a range coder.

Reverse water-filling needs no table of bits. Where errors of all components cost alike, the best
rate at a distortion has one step for all (Cover and Thomas, Elements of Information Theory, 13.3):
components below it fall silent by themselves.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from constriction import stream
from numpy.typing import NDArray
from torch import Tensor

from kvtune.errors import IntegrityError, UnsupportedError
from kvtune.packing.container import inflate

Codes = NDArray[np.int32]
DEAD_ZONE = 0.55  # of a step: what is smaller becomes 0. Larger than 1/2 saves more than it costs
OCTAVE = 2  # classes of magnitude in an octave
BASE = 12  # the level of a component as large as a step
COARSE = 4  # octaves above the step from which low bits are stored as they are
OLD, YOUNGEST = 512, 8  # tokens from a cache's end where steps are full, and where finest
WIDEST = 1 << 15  # symbols of a class
CLASSES = 512  # tables in a file, at most
LARGEST = 1 << 22  # steps in a component: float32 holds no more
_HEAD = struct.Struct("<IIH")  # levels' and tables' compressed bytes, tables
_TABLE = struct.Struct("<BhH")  # class, first symbol, symbols


class Band(NamedTuple):
    """Neighbouring tokens whose steps are 2^(-half / 2) of the full one."""

    start: int
    stop: int
    half: int


def bands(tokens: int) -> list[Band]:
    """Cuts a cache into bands, oldest first.

    What follows a cache looks back mostly at its end: the weight of a token's error falls about as
    1 / age, so its step grows as the root of its age.
    """
    found, stop = list[Band](), tokens
    edges = [YOUNGEST << octave for octave in range(int(math.log2(OLD // YOUNGEST)) + 1)]
    for number, age in enumerate(edges):
        half = len(edges) - number
        start = max(0, tokens - age)
        if start < stop:
            found.append(Band(start, stop, half))
        stop = start
    if stop:
        found.append(Band(0, stop, 0))
    return found[::-1]


def steps(tokens: int, step: float) -> Tensor:
    """The step [T] of each token."""
    whole = torch.empty(tokens)
    for start, stop, half in bands(tokens):
        whole[start:stop] = step * 2 ** (-half / 2)
    return whole


def encode(z: Tensor, step: float) -> bytes:
    """Codes components z [T, R] at a step; what is 0 everywhere takes one byte a component."""
    tokens = z.shape[0]
    codes = _quantised(z, steps(tokens, step))
    levels = _levels(codes, tokens)
    live = np.flatnonzero(levels)
    codes, classes = codes[live], _classes(levels[live], tokens)
    encoder = stream.queue.RangeEncoder()
    tables: list[bytes] = []
    for kind in np.unique(classes).tolist():
        _encode_class(encoder, codes, classes, int(kind), tokens, tables)
    packed = zlib.compress(levels.tobytes(), 9), zlib.compress(b"".join(tables), 9)
    words: bytes = encoder.get_compressed().astype("<u4").tobytes()
    return _HEAD.pack(*map(len, packed), len(tables)) + b"".join(packed) + words


def decode(data: bytes, tokens: int, rank: int, step: float) -> tuple[Tensor, Tensor]:
    """Returns the components that live, z [T, R'], and which they are [R'] of `rank`.

    Raises:
        IntegrityError: the data are damaged.
    """
    levels, tables, words = _parsed(data, rank)
    live = np.flatnonzero(levels)
    classes = _classes(levels[live], tokens)
    codes = np.zeros((len(live), tokens), dtype=np.int32)
    decoder = stream.queue.RangeDecoder(words)
    try:
        for kind in np.unique(classes).tolist():
            _decode_class(decoder, codes, classes, int(kind), tokens, tables)
    except (ValueError, AssertionError, KeyError, OverflowError) as error:
        raise IntegrityError(f"The packed cache's codes are damaged: {error}.") from None
    z = torch.from_numpy(codes).T.float() * steps(tokens, step)[:, None]
    return z, torch.from_numpy(live)


def _quantised(z: Tensor, each: Tensor) -> Codes:
    """Codes [R, T], components first: neighbours in memory are of one kind."""
    scaled = z.float().T / each
    if not scaled.abs().amax() < LARGEST:  # true of NaN as well
        what = "The cache holds values that are not finite, or far from all that its codec knows."
        raise UnsupportedError(what, "Take a larger step, or a codec of other text (--data).")
    codes = (scaled.abs() + (1 - DEAD_ZONE)).floor() * scaled.sign()
    return codes.to(torch.int32).contiguous().numpy()


def _levels(codes: Codes, tokens: int) -> NDArray[np.uint8]:
    """How large each component [R] is: 0, or by its root mean square in full steps."""
    total = np.zeros(len(codes))
    for start, stop, half in bands(tokens):
        x = codes[:, start:stop].astype(np.float64)
        total += np.einsum("rt,rt->r", x, x) * 2.0**-half
    live = total > 0
    size = np.log2(np.sqrt(total[live] / tokens))
    found = np.zeros(len(codes), dtype=np.uint8)
    found[live] = np.clip(np.rint(size * OCTAVE) + BASE, 1, 255).astype(np.uint8)
    return found


def _classes(levels: NDArray[np.uint8], tokens: int) -> NDArray[np.int64]:
    """The class [R, bands] of each component's codes: finer steps make them larger."""
    halves = np.array([band.half for band in bands(tokens)], dtype=np.int64)
    return levels.astype(np.int64)[:, None] + halves * OCTAVE // 2


def _low_bits(kind: int) -> int:
    return max(0, math.ceil((kind - BASE) / OCTAVE) - COARSE)


def _places(
    classes: NDArray[np.int64], kind: int, tokens: int
) -> Iterator[tuple[NDArray[np.int64], Band]]:
    """Where codes of a class lie: the components, and the band of tokens."""
    for column, band in enumerate(bands(tokens)):
        rows = np.flatnonzero(classes[:, column] == kind)
        if len(rows):
            yield rows, band


def _encode_class(
    encoder: Any,
    codes: Codes,
    classes: NDArray[np.int64],
    kind: int,
    tokens: int,
    tables: list[bytes],
) -> None:
    places = _places(classes, kind, tokens)
    whole = np.concatenate([codes[rows, band.start : band.stop].ravel() for rows, band in places])
    low = _low_bits(kind)
    high = whole >> low
    first, last = int(high.min()), int(high.max())
    # an outlier is at most the root of the tokens times as large as its component
    assert last - first < WIDEST
    counts = np.bincount(high - first)
    scaled = np.rint(counts * (65535 / counts.max()))
    table = np.where(counts > 0, scaled.clip(1), 0).astype("<u2")
    tables.append(_TABLE.pack(kind, first, len(table)) + table.tobytes())
    if len(table) > 1:
        encoder.encode(high - first, _model(table))
    if low:
        encoder.encode(whole & ((1 << low) - 1), stream.model.Uniform(1 << low))


def _decode_class(
    decoder: Any,
    codes: Codes,
    classes: NDArray[np.int64],
    kind: int,
    tokens: int,
    tables: dict[int, tuple[int, NDArray[np.uint16]]],
) -> None:
    places = list(_places(classes, kind, tokens))
    count = sum(len(rows) * (band.stop - band.start) for rows, band in places)
    first, table = tables[kind]
    whole = np.full(count, first, dtype=np.int32)
    if len(table) > 1:
        whole += decoder.decode(_model(table), count)
    if low := _low_bits(kind):
        whole <<= low
        whole += decoder.decode(stream.model.Uniform(1 << low), count)
    start = 0
    for rows, band in places:
        width = band.stop - band.start
        part = whole[start : start + len(rows) * width]
        codes[rows, band.start : band.stop] = part.reshape(len(rows), width)
        start += len(part)


def _model(table: NDArray[np.uint16]) -> Any:
    weights = table.astype(np.float64)
    return stream.model.Categorical(weights / weights.sum(), perfect=False)


def _parsed(
    data: bytes, rank: int
) -> tuple[NDArray[np.uint8], dict[int, tuple[int, NDArray[np.uint16]]], NDArray[np.uint32]]:
    if len(data) < _HEAD.size:
        raise IntegrityError("The packed cache's codes are cut short.")
    *sizes, count = _HEAD.unpack_from(data)
    start, middle = _HEAD.size, _HEAD.size + sizes[0]
    stop = middle + sizes[1]
    if stop > len(data) or (len(data) - stop) % 4:
        raise IntegrityError("The packed cache's codes are cut short.")
    levels = np.frombuffer(inflate(data[start:middle], rank), dtype=np.uint8)
    engine = zlib.decompressobj()
    try:
        raw = engine.decompress(data[middle:stop], min(count, CLASSES) * (_TABLE.size + 2 * WIDEST))
        tables = dict(_tables(raw, count))
    except (zlib.error, struct.error, ValueError) as error:
        raise IntegrityError(f"The packed cache's tables are damaged: {error}.") from None
    return levels, tables, np.frombuffer(data[stop:], dtype="<u4").astype(np.uint32)


def _tables(raw: bytes, count: int) -> Iterator[tuple[int, tuple[int, NDArray[np.uint16]]]]:
    start = 0
    for _ in range(count):
        kind, first, symbols = _TABLE.unpack_from(raw, start)
        start += _TABLE.size
        table = np.frombuffer(raw, dtype="<u2", count=symbols, offset=start)
        if symbols > WIDEST or not table.any():
            raise ValueError(f"a table of {symbols} symbols")
        start += 2 * symbols
        yield kind, (first, table)
    if start != len(raw):
        raise ValueError("too many bytes")
