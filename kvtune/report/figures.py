"""Figures for plotly.js as plain values: what all share, and the heat maps over layers.

Colours are names of the style sheet's, such as `var(--front)`; the page puts in what they are in
the theme that is shown. Texts are escaped here, since plotly reads some HTML in them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import torch
from torch import Tensor

from kvtune.report.layers import Layer
from kvtune.report.numbers import significant
from kvtune.report.prices import PriceTable

Figure = dict[str, Any]
INK, MUTED, LINE = "var(--ink)", "var(--muted)", "var(--line)"
MOST_TICKS = 4  # on a colour bar of a narrow screen
TOP = 44  # px above a heat map: its colour bar
RAMP = [[step / 4, f"var(--ramp-{step})"] for step in range(5)]


AXIS: Figure = {
    "fixedrange": True,
    "gridcolor": LINE,
    "linecolor": LINE,
    "zeroline": False,
    "automargin": True,
    "tickfont": {"color": MUTED},
}


def figure(
    traces: list[Figure], x: Mapping[str, Any], y: Mapping[str, Any], **layout: Any
) -> Figure:
    """Traces with two axes; nothing can be zoomed, so that a finger scrolls the page."""
    whole = {
        "margin": {"l": 8, "r": 12, "t": 12, "b": 8},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "dragmode": False,
        "hovermode": "closest",
        "hoverlabel": {
            "bgcolor": "var(--raised)",
            "bordercolor": LINE,
            "font": {"color": INK, "size": 13},
            "align": "left",
        },
        "font": {"color": INK, "size": 13},
        "showlegend": False,
        "xaxis": {**AXIS, **x},
        "yaxis": {**AXIS, **y},
        **layout,
    }
    return {"data": traces, "layout": whole}


def titled(text: str) -> dict[str, Any]:
    """An axis title."""
    return {"text": escape(text), "font": {"color": MUTED, "size": 13}, "standoff": 8}


def hover(*lines: str) -> str:
    """Lines that show when a mark is pointed at; the first is bold."""
    first, *rest = (escape(line) for line in lines)
    return "<br>".join([f"<b>{first}</b>", *rest])


def layer_axis(count: int) -> dict[str, Any]:
    """The axis of layers: about ten of them are named."""
    step = next(step for step in (1, 2, 5, 10, 20, 50, 100, 1000) if count / step <= 11)
    return {
        "title": titled("layer"),
        "range": [-0.5, count - 0.5],
        "tickmode": "array",
        "tickvals": list(range(0, count, step)),
        "showgrid": False,
        "ticks": "",
    }


def _bar(title: str, values: Sequence[float], texts: Sequence[str]) -> dict[str, Any]:
    """A colour bar above the map, where it takes no width."""
    return {
        "orientation": "h",
        "x": 0,
        "xanchor": "left",
        "y": 1.0,
        "yanchor": "bottom",
        "thickness": 8,
        "len": 1.0,
        "outlinewidth": 0,
        "tickvals": list(values),
        "ticktext": list(texts),
        "tickfont": {"color": MUTED, "size": 12},
        "tickangle": 0,
        "title": {"text": escape(title), "font": {"color": MUTED, "size": 12}, "side": "top"},
    }


def _heat(z: Any, y: list[str], texts: Any, bar: dict[str, Any], low: float, high: float) -> Figure:
    return {
        "type": "heatmap",
        "z": z,
        "x": list(range(len(z[0]) if z else 0)),
        "y": y,
        "text": texts,
        "hovertemplate": "%{text}<extra></extra>",
        "hoverongaps": False,
        "colorscale": RAMP,
        "zmin": low,
        "zmax": high if high > low else low + 1,
        "xgap": 1,
        "ygap": 1,
        "colorbar": bar,
    }


def layer_map(layers: Sequence[Layer], heads: int) -> Figure:
    """The code bits of keys and values in each layer; a row per kv head where heads differ."""
    split = range(heads) if any(layer.heads for layer in layers) else (-1,)
    rows = [(side, head) for side in ("keys", "values") for head in split]
    names = [side if head < 0 else f"{side}, head {head}" for side, head in rows]
    z = [[min(layer.side(s, h).bits, 16.0) for layer in layers] for s, h in rows]
    texts = [
        [_cell_text(layer, side, head, name) for layer in layers]
        for (side, head), name in zip(rows, names, strict=True)
    ]
    # bits differ by ratios: 2 to 4 matters as 4 to 8 does
    logs = [[math.log2(bits) for bits in row] for row in z]
    known = sorted({bits for row in z for bits in row} | {2.0, 4.0, 8.0, 16.0})
    bar = _bar("bits per code", [math.log2(bits) for bits in known], [f"{b:g}" for b in known])
    heat = _heat(logs, names, texts, bar, math.log2(known[0]), 4.0)
    made = figure([heat], layer_axis(len(layers)), _rows_axis())
    made["layout"]["margin"] = {"l": 8, "r": 12, "t": TOP, "b": 8}
    return made


def kept_map(layers: Sequence[Layer]) -> Figure | None:
    """The part of the tokens, and of the channels of keys and of values, that each layer stores;
    nothing where all is stored."""
    rows = {
        "tokens": [layer.tokens for layer in layers],
        **{f"rank, {s}": [layer.sides[s].rank for layer in layers] for s in ("keys", "values")},
    }
    saving = {name: row for name, row in rows.items() if any(part < 1 for part in row)}
    if not saving:
        return None
    texts = [
        [
            hover(f"layer {layer.index}, {name}", f"{100 * part:.3g} % are stored")
            for layer, part in zip(layers, row, strict=True)
        ]
        for name, row in saving.items()
    ]
    bar = _bar("part that is stored", (0, 0.25, 0.5, 0.75, 1), ("0", "25 %", "50 %", "75 %", "all"))
    heat = _heat([*saving.values()], [*saving], texts, bar, 0.0, 1.0)
    made = figure([heat], layer_axis(len(layers)), _rows_axis())
    made["layout"]["margin"] = {"l": 8, "r": 12, "t": TOP, "b": 8}
    return made


def _rows_axis() -> dict[str, Any]:
    # the first row stands on top
    return {"autorange": "reversed", "showgrid": False, "ticks": ""}


def _cell_text(layer: Layer, side: str, head: int, name: str) -> str:
    stored = layer.side(side, head)
    exact = f"exact: first {layer.sinks}, last {layer.recent} tokens"
    return hover(f"layer {layer.index}, {name}", stored.chain, exact)


def price_map(table: PriceTable) -> Figure:
    """What each setting costs in each layer, in nats, on a log scale."""
    rows = table.prices
    known = [price for row in rows for price in row if price and price > 0]
    low, high = (math.log10(min(known)), math.log10(max(known))) if known else (-6.0, 0.0)
    z = [[_log(price, low) for price in row] for row in rows]
    texts = [
        [hover(f"layer {table.layers[j]}, {name}", *table.told(i, j)) for j in range(len(z[i]))]
        for i, name in enumerate(table.names)
    ]
    powers = range(math.ceil(low), math.floor(high) + 1)
    few = powers[:: -(-len(powers) // MOST_TICKS) or 1]
    bar = _bar("KL in nats", few, [_power(power) for power in few])
    heat = _heat(z, list(table.names), texts, bar, low, high)
    heat["x"] = list(table.layers)
    made = figure([heat], layer_axis(max(table.layers, default=0) + 1), _rows_axis())
    made["layout"]["margin"] = {"l": 8, "r": 12, "t": TOP, "b": 8}
    return made


def _power(power: int) -> str:
    return significant(10.0**power, 1) if power >= -3 else f"1e{power}"


def _log(price: float | None, low: float) -> float | None:
    if price is None:
        return None
    return round(max(math.log10(price), low), 4) if price > 0 else low


def spectrum(energy: Tensor, ranks: Mapping[float, Sequence[int]]) -> Figure:
    """Cumulative energy [L, D] over layers and directions, with lines where shares are reached."""
    share = energy.T
    z = [[round(float(value), 4) for value in row] for row in share]
    low = float(torch.floor(share.min() * 10) / 10)
    ticks = [tick / 10 for tick in range(round(10 * low), 11)]
    bar = _bar("share of energy", ticks, [f"{100 * tick:.0f} %" for tick in ticks])
    heat = _heat(z, [], None, bar, low, 1.0) | {"xgap": 0, "ygap": 0}
    heat["y"] = list(range(1, len(z) + 1))
    held = f"%{{y}} of {len(z)} directions hold %{{z:.1%}}"
    heat["hovertemplate"] = f"<b>layer %{{x}}</b><br>{held}<extra></extra>"
    lines = [_reached(found) for found in ranks.values()]
    y = {"title": titled("directions kept"), "range": [0.5, len(z) + 0.5], "showgrid": False}
    made = figure([heat, *lines], layer_axis(energy.shape[0]), y)
    made["layout"]["annotations"] = [_beside(share, found) for share, found in ranks.items()]
    made["layout"]["margin"] = {"l": 8, "r": 44, "t": TOP, "b": 8}
    return made


def _reached(ranks: Sequence[int]) -> Figure:
    """A line of steps over the layers, half a layer beyond both ends."""
    return {
        "type": "scatter",
        "mode": "lines",
        "x": [-0.5, *range(len(ranks)), len(ranks) - 0.5],
        "y": [ranks[0], *ranks, ranks[-1]],
        "line": {"color": "var(--over)", "width": 2, "shape": "hvh"},
        "hoverinfo": "skip",
    }


def _beside(share: float, ranks: Sequence[int]) -> Figure:
    """What a line is for, to the right of its end."""
    return {
        "text": f"{100 * share:.0f} %",
        "x": len(ranks) - 0.5,
        "y": ranks[-1],
        "xanchor": "left",
        "xshift": 4,
        "showarrow": False,
        "font": {"color": MUTED, "size": 12},
    }
