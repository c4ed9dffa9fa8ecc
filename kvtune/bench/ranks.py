"""Ranks: when low-rank keys are read faster, as fast or slower than bits, by what was measured."""

from __future__ import annotations

from typing import Literal, NamedTuple

from kvtune_kernels import Format

from kvtune.bench import latency
from kvtune.errors import MissingInputError

EQUAL = 0.1  # relative times that count as equal
PAIRS = (2, 3, 4, 8)

Verdict = Literal["faster", "equal", "slower"]


class Compared(NamedTuple):
    """Attention of one layer to low-rank keys and 16-bit values, and to keys and values in bits."""

    rank: int
    batch: int
    context: int
    microseconds: float
    bits: dict[int, Verdict]  # of keys and values alike
    dense: Verdict  # 16 bits

    @property
    def said(self) -> str:
        """In words, the fewest bits first."""
        found = {**{f"{bits} bits": verdict for bits, verdict in self.bits.items()}}
        found["16 bits"] = self.dense
        return ", ".join(f"{verdict} than {what}" for what, verdict in found.items()).replace(
            "equal than", "equal to"
        )


def against_bits(table: latency.Table, rank: int, bits: int, batch: int, context: int) -> Verdict:
    """Whether attention to keys of a joint rank, beside 16-bit values, is faster than to keys and
    values of so many bits, equal to it within 10 %, or slower; 16 bits are the best of torch.

    Between ranks, batches and contexts that were timed, times follow a power law.

    Raises:
        MissingInputError: the table has no such ranks or bits.
    """
    ours = of_rank(table, rank, batch, context)
    if bits == 16:
        return verdict(ours, latency.dense(table, batch, context))
    keys, values = Format(bits, latency.GROUP, False), Format(bits, table.head_dim, True)
    return verdict(ours, latency.estimate(table, keys, values, batch, context))


def verdict(ours: float, theirs: float) -> Verdict:
    """By relative times."""
    if ours < theirs * (1 - EQUAL):
        return "faster"
    return "slower" if ours > theirs * (1 + EQUAL) else "equal"


def of_rank(table: latency.Table, rank: int, batch: int, context: int) -> float:
    """Microseconds of attention to keys of a joint rank, beside 16-bit values.

    Raises:
        MissingInputError: the table was measured before it had ranks.
    """
    by_rank = {}
    for known in sorted({cell.rank for cell in table.ranks}):
        own = [cell for cell in table.ranks if cell.rank == known]
        batches = {
            b: latency.between({c.context: c.microseconds for c in own if c.batch == b}, context)
            for b in {cell.batch for cell in own}
        }
        by_rank[known] = latency.between(batches, batch)
    if not by_rank:
        again = latency.command(table.heads, table.kv_heads, table.head_dim)
        raise MissingInputError(f"The latency table of {table.device} has no low ranks.", again)
    return latency.between(by_rank, rank)


def rule(table: latency.Table) -> list[Compared]:
    """Every rank at every place that was timed, against all bits there."""
    found = []
    for cell in table.ranks:
        place = cell.batch, cell.context
        bits = {b: against_bits(table, cell.rank, b, *place) for b in PAIRS}
        dense = against_bits(table, cell.rank, 16, *place)
        found.append(Compared(cell.rank, *place, cell.microseconds, bits, dense))
    return found
