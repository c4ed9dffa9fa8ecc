"""Latency: a saved table of attention times on one device, and what it says of any formats."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from kvtune_kernels import Format

from kvtune.bench.cases import Case, Shape, pair
from kvtune.bench.kernels import Lab, Timing
from kvtune.bench.latents import Case as LatentCase
from kvtune.bench.latents import time as time_latents
from kvtune.errors import IntegrityError, MissingInputError
from kvtune.files import cache_home, write_atomic

FORMAT = 1
BITS = (2, 3, 4, 8)
GROUP, USUAL = 64, 4  # keys are grouped so where bits vary; bits are these where groups vary
BATCHES, CONTEXTS = (1, 8), (4096, 32768)
RANKS = (64, 128, 160, 256)  # of all kv heads' keys together


@dataclass(frozen=True)
class Cell:
    """Attention of one layer to one cache, in microseconds."""

    keys: Format
    values: Format
    batch: int
    context: int
    microseconds: float
    dense_microseconds: float

    @classmethod
    def of(cls, timing: Timing) -> Cell:
        """What the table keeps of a timing."""
        case = timing.case
        times = timing.microseconds, timing.dense_microseconds
        return cls(case.keys, case.values, case.shape.batch, case.shape.context, *times)


@dataclass(frozen=True)
class RankCell:
    """Attention of one layer to low-rank keys and 16-bit values of all tokens, in microseconds."""

    rank: int
    batch: int
    context: int
    microseconds: float


@dataclass(frozen=True)
class Table:
    """All cells of one device and one shape of heads."""

    device: str
    heads: int
    kv_heads: int
    head_dim: int
    versions: dict[str, str]
    cells: tuple[Cell, ...]
    methods: dict[str, str] = field(default_factory=dict)  # how a GPU reads each: see `reading`
    ranks: tuple[RankCell, ...] = ()  # tables that were measured before have none

    def save(self) -> Path:
        """Writes the table into the cache folder; returns its file."""
        file = path(self.device, self.heads, self.kv_heads, self.head_dim)
        held = {**vars(self), "kvtune_latency": FORMAT, "cells": [_plain(c) for c in self.cells]}
        held["ranks"] = [vars(cell) for cell in self.ranks]
        write_atomic(file, json.dumps(held, indent=1, allow_nan=False).encode())
        return file


def cases(heads: Shape, batches: Iterable[int], contexts: Iterable[int]) -> list[Case]:
    """All pairs of bits at one group, and all groups at one width, at every batch and context;
    then planes of 2 to 4 mean bits with symmetric values, turning included."""
    shapes = [replace(heads, batch=b, context=n) for b in batches for n in contexts]
    dim = heads.head_dim
    # "head" stands last: values in groups of a whole head are the usual ones
    groups = [group for group in (32, 64, 128) if group < dim and dim % group == 0]
    pairs = [(keys, GROUP, values, dim) for keys in BITS for values in BITS]
    pairs += [(USUAL, group, USUAL, dim) for group in (32, 128)]
    pairs += [(USUAL, GROUP, USUAL, group) for group in groups]
    plain = [pair(k, g, shape, v, h) for k, g, v, h in pairs for shape in shapes]
    sides = [(planes(dim), symmetric(bits, dim)) for bits in (2, 3, 4)]
    sides += [(planes(size), symmetric(2, dim)) for size in (3 * dim // 2, 2 * dim)]
    return plain + [Case(*side, shape) for side in sides for shape in shapes]


def planes(channels: int) -> Format:
    """Keys in planes, as they are timed."""
    return Format(2, 128, False, channels)


def symmetric(bits: int, head_dim: int) -> Format:
    """Values in symmetric codes, as they are timed."""
    return Format(bits, head_dim, True, 0, True)


def measure(
    lab: Lab, wanted: list[Case], versions: dict[str, str], say: Callable[..., None]
) -> Table:
    """Times the cases of one shape of heads."""
    cells, ranks = [], []
    latents = rank_cases(wanted)
    count = len(wanted) + len(latents)
    for done, case in enumerate(wanted):
        say("latency table", done, count)
        cells.append(Cell.of(lab.attention(case)))
    for done, low in enumerate(latents, len(wanted)):
        say("latency table", done, count)
        took = time_latents(lab, low).microseconds
        ranks.append(RankCell(low.rank, low.shape.batch, low.shape.context, took))
    say("latency table", count, count)
    shape, others = wanted[0].shape, {k: v for k, v in versions.items() if k != "device"}
    heads = shape.heads, shape.kv_heads, shape.head_dim
    return Table(versions["device"], *heads, others, tuple(cells), ranks=tuple(ranks))


def rank_cases(wanted: list[Case]) -> list[LatentCase]:
    """Low-rank keys at the shapes of other cases, in their order."""
    shapes = dict.fromkeys(case.shape for case in wanted)
    most = wanted[0].shape.kv_heads * wanted[0].shape.head_dim
    return [LatentCase(shape, rank) for rank in RANKS if rank < most for shape in shapes]


def path(device: str, heads: int, kv_heads: int, head_dim: int) -> Path:
    """Where the table of a device lies: latency/nvidia-h100-80gb-hbm3-32-8-128.json."""
    slug = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    return cache_home() / "latency" / f"{slug}-{heads}-{kv_heads}-{head_dim}.json"


def load(device: str, heads: int, kv_heads: int, head_dim: int) -> Table:
    """Reads the table of a device.

    Raises:
        MissingInputError: nobody measured it yet.
        IntegrityError: the file is damaged.
    """
    file = path(device, heads, kv_heads, head_dim)
    if not file.is_file():
        shape = f"{heads}/{kv_heads} heads of {head_dim}"
        what = f"There is no latency table of {device} for {shape}."
        raise MissingInputError(what, command(heads, kv_heads, head_dim))
    return read(file, command(heads, kv_heads, head_dim))


def read(file: Path, again: str) -> Table:
    """Reads a table's file; `again` is the command that makes it anew.

    Raises:
        MissingInputError: there is no such file.
        IntegrityError: it is damaged.
    """
    if not file.is_file():
        raise MissingInputError(f"There is no latency table at {file}.", again)
    try:
        held = json.loads(file.read_bytes())
        if held.pop("kvtune_latency") != FORMAT:
            raise ValueError("it has another format")
        held["cells"] = tuple(_cell(cell) for cell in held["cells"])
        held["ranks"] = tuple(RankCell(**cell) for cell in held.get("ranks", ()))
        return Table(**held)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise IntegrityError(f"{file} is damaged: {error}.", again) from None


def estimate(table: Table, keys: Format, values: Format, batch: float, context: int) -> float:
    """Microseconds of attention in one layer.

    Formats that were not timed are put together: the pair of bits, times what either side's group
    costs. Between contexts and batches, times follow a power law; beyond the longest they grow in
    proportion, below the shortest they stay. Planes cost what the next larger number of them does;
    symmetric values beside other keys cost what affine ones do, which is a little more.

    Raises:
        MissingInputError: the table does not know these bits.
    """

    def told(keys: Format, values: Format) -> float | None:
        return _interpolated(
            [cell for cell in table.cells if (cell.keys, cell.values) == (keys, values)],
            batch,
            context,
            lambda cell: cell.microseconds,
        )

    if (exact := told(keys, values)) is not None:
        return exact
    head = table.head_dim
    if keys.channels:
        return _of_planes(table, told, keys, values)
    if values.symmetric:
        return estimate(table, keys, values._replace(symmetric=False), batch, context)
    base = told(Format(keys.bits, GROUP, False), Format(values.bits, head, True))
    usual_keys, usual_values = Format(USUAL, GROUP, False), Format(USUAL, head, True)
    usual = told(usual_keys, usual_values)
    by_keys = told(keys._replace(bits=USUAL), usual_values)
    by_values = told(usual_keys, values._replace(bits=USUAL))
    if base is None or usual is None or by_keys is None or by_values is None:
        raise _untimed(table, keys, values)
    return base * by_keys / usual * by_values / usual


def _of_planes(
    table: Table, told: Callable[[Format, Format], float | None], keys: Format, values: Format
) -> float:
    """Planes with values of 2 bits, times what other values cost beside the fewest planes."""
    head = table.head_dim
    sizes = sorted({c.keys.channels for c in table.cells if c.keys.channels}) or [0]
    size = next((size for size in sizes if size >= keys.channels), sizes[-1])
    base = told(planes(size), symmetric(2, head))
    few = told(planes(head), symmetric(2, head))
    by_values = told(planes(head), symmetric(min(values.bits, 4), head))
    if base is None or few is None or by_values is None:
        raise _untimed(table, keys, values)
    return base * by_values / few * max(1, keys.channels / size)


def _untimed(table: Table, keys: Format, values: Format) -> MissingInputError:
    return MissingInputError(
        f"The latency table of {table.device} has no times for keys {tuple(keys)} and values "
        f"{tuple(values)}.",
        command(table.heads, table.kv_heads, table.head_dim),
    )


def dense(table: Table, batch: int, context: int) -> float:
    """Microseconds of bf16 attention in one layer; MissingInputError when the table is empty."""
    found = _interpolated(list(table.cells), batch, context, lambda cell: cell.dense_microseconds)
    if found is None:
        again = command(table.heads, table.kv_heads, table.head_dim)
        raise MissingInputError(f"The latency table of {table.device} is empty.", again)
    return found


def command(heads: int, kv_heads: int, head_dim: int) -> str:
    """The next command of a user who has no table."""
    return f"Run: kvtune bench kernels --table --heads {heads}/{kv_heads}/{head_dim}"


def _interpolated(
    cells: list[Cell], batch: float, context: int, time: Callable[[Cell], float]
) -> float | None:
    """First along contexts at each batch, then along batches; None without cells."""
    by_batch: dict[int, dict[int, float]] = {}
    for cell in cells:
        by_batch.setdefault(cell.batch, {})[cell.context] = time(cell)
    if not by_batch:
        return None
    return between({b: between(points, context) for b, points in by_batch.items()}, batch)


def between(points: dict[int, float], x: float) -> float:
    """The value at x of a curve through `points` that is straight where both axes are logarithmic.

    Below the first point it is level, beyond the last one proportional to x.
    """
    known = sorted(points)
    if x <= known[0]:
        return points[known[0]]
    if x >= known[-1]:
        return points[known[-1]] * x / known[-1]
    right = next(i for i, place in enumerate(known) if place >= x)
    low, high = known[right - 1], known[right]
    part = math.log(x / low) / math.log(high / low)
    return float(points[low] * (points[high] / points[low]) ** part)


def _plain(cell: Cell) -> dict[str, Any]:
    return {**vars(cell), "keys": _named(cell.keys), "values": _named(cell.values)}


def _named(format: Format) -> dict[str, Any]:
    axis = "token" if format.per_token else "channel"
    found: dict[str, Any] = {"bits": format.bits, "group": format.group, "axis": axis}
    more = {"channels": format.channels, "symmetric": format.symmetric}
    return found | {name: value for name, value in more.items() if value}


def _cell(held: dict[str, Any]) -> Cell:
    sides = {}
    for side in ("keys", "values"):
        own = dict(held[side])
        sides[side] = Format(per_token=own.pop("axis") == "token", **own)
    return Cell(**{**held, **sides})
