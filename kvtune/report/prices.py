"""The price table of a profile, one side at a time: what each setting costs in each layer."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kvtune import parts
from kvtune.parts import Codec
from kvtune.profile import Cell, Profile
from kvtune.report.numbers import significant

MOST_HEADS = 16  # more prices than these are no help beside a pointer


@dataclass(frozen=True)
class PriceTable:
    """Prices in nats of one side [settings][layers]; None where a layer does not open a setting."""

    side: str
    names: tuple[str, ...]
    layers: tuple[int, ...]
    prices: tuple[tuple[float | None, ...], ...]
    heads: tuple[tuple[tuple[float, ...], ...], ...]

    def told(self, row: int, column: int) -> list[str]:
        """A cell in words."""
        price = self.prices[row][column]
        if price is None:
            return ["not opened in this layer"]
        heads = self.heads[row][column]
        said = [f"KL {significant(price)} nats"]
        if 1 < len(heads) <= MOST_HEADS:
            said.append(f"by head: {', '.join(significant(own, 2) for own in heads)}")
        return said


def table(profile: Profile, side: str) -> PriceTable:
    """The price table of keys or of values, the fewest bits first."""
    own = [index for index, cell in enumerate(profile.cells) if cell.side == side]
    places = {_row(profile.cells[i]): i for i in own}
    order = sorted(places, key=_size)
    layers = sorted({profile.cells[i].layer for i in own})
    found = {(_row(profile.cells[i]), profile.cells[i].layer): i for i in own}
    prices = profile.tensors["prices"].tolist()
    by_head = profile.tensors.get("prices_by_head")
    heads: list[list[float]] = [[]] * len(prices) if by_head is None else by_head.tolist()
    grid = [[found.get((row, layer)) for layer in layers] for row in order]
    return PriceTable(
        side,
        _names(order),
        tuple(layers),
        tuple(tuple(None if i is None else prices[i] for i in row) for row in grid),
        tuple(tuple(() if i is None else tuple(heads[i]) for i in row) for row in grid),
    )


Row = tuple[str, int, int, str]  # setting, sinks, recent, selector


def _row(cell: Cell) -> Row:
    return cell.setting, cell.sinks, cell.recent, cell.select


def _size(row: Row) -> tuple[float, tuple[tuple[int, str], ...], Row]:
    codecs = [parts.parse(one) for one in json.loads(row[0])]
    bits = [codec.payload_bits for codec in codecs if isinstance(codec, Codec)]
    # 32 comes before 128, as no text would have it
    natural = tuple((len(word), word) for word in re.findall(r"\d+", row[0]))
    return min(bits, default=16.0), natural, row


def _names(rows: Sequence[Row]) -> tuple[str, ...]:
    """Short names: what is the same in all rows is left out."""
    told = [_settings(row) for row in rows]
    keys = list(dict.fromkeys(key for one in told for key in one))
    differ = [key for key in keys if len({one.get(key) for one in told}) > 1] or keys
    shown = [", ".join(_word(key, one[key]) for key in differ if key in one) for one in told]
    if len(set(shown)) < len(shown):
        return tuple(", ".join(_word(key, value) for key, value in one.items()) for one in told)
    return tuple(shown)


def _settings(row: Row) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for place, codec in enumerate(json.loads(row[0])):
        for key, value in codec.items():
            found[f"{place} {key}"] = value
    share = {"0 tokens": json.loads(row[3]).get("share", 1.0) if row[3] else 1.0}
    return found | {"0 sinks": row[1], "0 recent": row[2], **share}


def _word(key: str, value: Any) -> str:
    bare = key.partition(" ")[2]
    if bare == "use" or (isinstance(value, str) and bare == "axis"):
        return str(value)
    return f"{value} bits" if bare == "bits" else f"{bare} {value}"
