"""Cases: which caches and shapes the kernels are timed on, and what each has to reach."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace

from kvtune_kernels import Format, Window

from kvtune.errors import UsageError

SINKS, RECENT = 4, 64  # the window of every case
_PAIR = re.compile(r"k([2348]|\d(?:\.\d+)?p)(?:g(\d+))?v([2348]|[234]s)(?:g(\d+))?")


@dataclass(frozen=True)
class Shape:
    """A cache of `batch` rows of `context` tokens, and one query token for each row."""

    batch: int
    context: int
    heads: int = 32  # query heads
    kv_heads: int = 8
    head_dim: int = 128
    ragged: bool = False  # rows of different lengths, the last one of `context`

    def lengths(self) -> list[int]:
        """Tokens of each row."""
        if not self.ragged:
            return [self.context] * self.batch
        return [self.context * (row + 1) // self.batch for row in range(self.batch)]


@dataclass(frozen=True)
class Case:
    """A shape whose keys and values are stored in two formats."""

    keys: Format
    values: Format
    shape: Shape

    @property
    def name(self) -> str:
        """Formats, and what is not usual of the shape: k4g128v4g128 B=8 N=32768 9/3x64."""
        s = self.shape
        heads = f" {s.heads}/{s.kv_heads}x{s.head_dim}"
        usual = (s.heads, s.kv_heads, s.head_dim) == (32, 8, 128)
        formats = f"k{spelled(self.keys, s.head_dim)}v{spelled(self.values, s.head_dim)}"
        ragged = " ragged" if s.ragged else ""
        return f"{formats} B={s.batch} N={s.context}{'' if usual else heads}{ragged}"

    @property
    def folded(self) -> bool:
        """Whether such codes stand behind linear maps: then a step turns what it is given."""
        return self.keys.channels > 0 or self.values.symmetric

    @property
    def window(self) -> Window:
        """Which tokens are exact."""
        return Window(SINKS, RECENT, math.lcm(self.keys.block, self.values.block))

    def paged(self) -> list[int]:
        """Tokens of each row that are in pages when the last one has been appended."""
        return [self.window.due(length - 1) for length in self.shape.lengths()]

    def floor_bytes(self) -> int:
        """Bytes that attention has to read: codes, scales and zeros, and the exact window."""
        dim, total = self.shape.head_dim, 0
        for length, paged in zip(self.shape.lengths(), self.paged(), strict=True):
            total += side_bytes(self.keys, paged, dim) + side_bytes(self.values, paged, dim)
            total += 4 * dim * (length - paged)
        return total * self.shape.kv_heads


def side_bytes(format: Format, tokens: int, dim: int) -> int:
    """Bytes of the codes, scales and zeros of a head's keys, or of its values."""
    width = format.channels or dim
    each = 2 if format.symmetric else 4
    return tokens * width * format.bits // 8 + each * tokens * width // format.group


def spelled(format: Format, dim: int) -> str:
    """Bits and group as `parse_formats` reads them: 4g128, 2.25pg128, 2sg128."""
    if format.channels:
        return f"{format.bits * format.channels / dim:g}pg{format.group}"
    return f"{format.bits}{'s' if format.symmetric else ''}g{format.group}"


@dataclass(frozen=True)
class Goal:
    """A limit to something measured."""

    what: str  # a name that the row's measure gives
    limit: float
    at_most: bool = False  # otherwise at least

    def met(self, value: float) -> bool:
        """Whether a value is within the limit."""
        return value <= self.limit if self.at_most else value >= self.limit


@dataclass(frozen=True)
class Row:
    """A row of the acceptance table."""

    number: int
    name: str
    goals: tuple[Goal, ...]
    cases: tuple[Case, ...] = ()
    layers: tuple[int, ...] = ()  # how many layers have each case's formats; else each counts alone
    rival: Case | None = None  # a case that all of these must beat
    measure: str = "attention"


def pair(bits: int, group: int, shape: Shape, value_bits: int = 0, value_group: int = 0) -> Case:
    """Keys per channel and values per token, alike where nothing else is said."""
    values = Format(value_bits or bits, min(value_group or group, shape.head_dim), True)
    return Case(Format(bits, group, False), values, shape)


def parse_formats(word: str, shape: Shape) -> Case:
    """Reads k4v2 or k4g64v2g32: keys per channel (128), values per token (the whole head); and
    k2.25pv2s: planes of so many mean bits, symmetric values.

    Raises:
        UsageError: anything else, or a group that does not fit the head.
    """
    found = _PAIR.fullmatch(word.strip().lower())
    if not found:
        hint = "Write k4v2, k4g32v2g32 or k2.25pv2s: 2, 3, 4 or 8 bits, groups of 32, 64 or 128."
        raise UsageError(f"{word!r} is no pair of formats.", hint)
    group, value_group = (int(part or 0) for part in found.group(2, 4))
    group, value_group = group or 128, value_group or shape.head_dim
    if group not in (32, 64, 128) or value_group not in (32, 64, 128, shape.head_dim):
        raise UsageError(f"{word!r} has groups other than 32, 64, 128 and the head.")
    if shape.head_dim % value_group:
        raise UsageError(f"{word!r}: {value_group} does not divide head_dim {shape.head_dim}.")
    bits, value_bits = found.group(1, 3)
    keys = _planes(word, bits, group, shape) if bits[-1] == "p" else Format(int(bits), group, False)
    values = Format(int(value_bits[0]), value_group, True, 0, value_bits[-1] == "s")
    return Case(keys, values, shape)


def _planes(word: str, bits: str, group: int, shape: Shape) -> Format:
    channels = float(bits[:-1]) * shape.head_dim / 2
    most = 4 * shape.head_dim
    if channels % 16 or not 0 < channels <= most:
        raise UsageError(
            f"{word!r} has {channels:g} planes for head_dim {shape.head_dim}.",
            f"Their number is a multiple of 16 up to {most}: bits times head_dim / 2.",
        )
    return Format(2, group, False, int(channels))


def parse_heads(word: str) -> Shape:
    """Reads 32/8/128: query heads, kv heads and head_dim; UsageError for anything else."""
    parts = word.split("/")
    if len(parts) != 3 or not all(part.strip().isdigit() and int(part) for part in parts):
        raise UsageError(f"{word!r} is no head shape.", "Write 32/8/128.")
    heads, kv_heads, head_dim = map(int, parts)
    if heads % kv_heads:
        raise UsageError(f"{heads} query heads are no multiple of {kv_heads} kv heads.")
    return Shape(1, 1, heads, kv_heads, head_dim)


def grid(formats: list[str], batches: list[int], contexts: list[int], heads: Shape) -> list[Case]:
    """Every pair of formats at every batch and context."""
    shapes = [replace(heads, batch=b, context=n) for b in batches for n in contexts]
    return [parse_formats(word, shape) for word in formats for shape in shapes]


LONG = Shape(8, 32768)


def ratio(limit: float) -> Goal:
    """Times faster than the best bf16 attention."""
    return Goal("ratio", limit)


def _mixed() -> tuple[Case, ...]:
    return pair(4, 128, LONG), pair(4, 128, LONG, 2), pair(3, 128, LONG)


def _short() -> tuple[Case, ...]:
    formats = ((2, 32), (3, 64), (4, 32), (4, 128), (8, 128))
    shapes = [Shape(1, context) for context in (2048, 4096, 8192)]
    return tuple(pair(*format, shape) for format in formats for shape in shapes)


def _odd_shapes() -> tuple[Case, ...]:
    shapes = (
        Shape(1, 32768, 9, 3, 64),
        Shape(8, 16384, 9, 3, 64),
        Shape(1, 32768, 4, 1, 256),
        Shape(8, 16384, 4, 1, 256),
        Shape(4, 16384, 8, 8),
        Shape(4, 16384, 32, 8),
        Shape(4, 16384, 28, 4),
        Shape(4, 16384, 64, 8),
        Shape(8, 20011),
        Shape(8, 32768, ragged=True),
    )
    return tuple(pair(4, 64, shape, value_group=shape.head_dim) for shape in shapes)


# the acceptance table of issue 3, but for decoding (12) and compute-sanitizer (14)
ACCEPTANCE = (
    Row(1, "4 bits g128, B=8 N=32K", (ratio(3), Goal("floor_share", 0.8)), (pair(4, 128, LONG),)),
    Row(2, "4 bits g32, B=8 N=32K", (ratio(2.5),), (pair(4, 32, LONG),)),
    Row(3, "8 bits g128, B=8 N=32K", (ratio(1.75),), (pair(8, 128, LONG),)),
    Row(
        4,
        "2 bits g32, B=8 N=32K; faster than 4 bits",
        (ratio(3.6), Goal("speedup", 1)),
        (pair(2, 32, LONG),),
        rival=pair(4, 32, LONG),
    ),
    Row(
        5,
        "3 bits g64, B=8 N=32K; faster than 4 bits",
        (Goal("speedup", 1),),
        (pair(3, 64, LONG),),
        rival=pair(4, 64, LONG),
    ),
    Row(6, "mixed, mean 3.25 bits of 32 layers", (ratio(2.8),), _mixed(), layers=(8, 16, 8)),
    Row(7, "4 bits g128, B=1 N=128K", (ratio(2.8),), (pair(4, 128, Shape(1, 131072)),)),
    Row(7, "4 bits g128, B=32 N=4K", (ratio(2.4),), (pair(4, 128, Shape(32, 4096)),)),
    Row(7, "4 bits g128, B=64 N=8K", (ratio(2.7),), (pair(4, 128, Shape(64, 8192)),)),
    Row(8, "any format, B=1 N=2K to 8K", (ratio(1),), _short()),
    Row(
        9,
        "head_dim 64 and 256, GQA 1 to 8, odd N, ragged",
        (ratio(1), Goal("error_ratio", 2, at_most=True)),
        _odd_shapes(),
    ),
    Row(
        10,
        "quantise and pack, 4 bits g128, 32K tokens",
        (Goal("floor_multiple", 1.4, at_most=True),),
        (pair(4, 128, Shape(1, 32768)),),
        measure="encode",
    ),
    Row(
        11,
        "append, flush amortised",
        (
            Goal("microseconds", 4, at_most=True),
            Goal("allocated", 0, at_most=True),
            Goal("captured", 1),
        ),
        (pair(4, 128, Shape(1, 4096)), pair(4, 128, Shape(8, 4096))),
        measure="append",
    ),
    Row(
        13,
        "error of all above, against bf16 flash",
        (Goal("error_ratio", 2, at_most=True),),
        measure="errors",
    ),
)
