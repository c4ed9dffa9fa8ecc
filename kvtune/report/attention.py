"""The section of the page about where attention goes: what windows and eviction would keep."""

from __future__ import annotations

from kvtune.report import numbers
from kvtune.report.figures import Figure, figure, hover, layer_axis, titled
from kvtune.report.folder import Run
from kvtune.report.markup import Markup, table, tag
from kvtune.report.scatter import legend
from kvtune.report.sections import Figures, chart, details, section

# name in the profile, in the chart, and how it looks there
SHARES = (
    ("sinks", "attention on the first 4 tokens", "uniform", "diamond"),
    ("recent", "attention on the last 64 tokens", "front", "circle"),
    ("coverage90", "tokens that hold 90 % of attention", "dense", "square"),
)


def attention(run: Run, figures: Figures) -> Markup | None:
    """Shares per layer, a mean over query heads."""
    stats = _means(run)
    if not stats:
        return None
    figures["attention"] = _figure(stats)
    rows = [
        (f"{layer}", *(numbers.percent(stats[name][layer]) for name, *_ in SHARES))
        for layer in range(len(stats["sinks"]))
    ]
    head = ("layer", *(title for _, title, *_ in SHARES))
    said = "Chart: shares of attention in each layer; the table below has the numbers."
    intro = (
        "Where the last queries of each context look. Exact first tokens and an exact window save "
        "what they hold; where few tokens hold nearly all, the others cost little."
    )
    return section(
        "attention",
        "Where attention goes",
        tag("p", intro),
        chart("attention", "attention", said, 340),
        details("Shares of each layer", table(head, rows, "Shares, a mean over query heads")),
    )


def _means(run: Run) -> dict[str, list[float]]:
    tensors = run.profile.tensors if run.profile else {}
    found = {name: tensors.get(f"mass.{name}") for name, *_ in SHARES}
    means = {name: own.mean(-1).tolist() for name, own in found.items() if own is not None}
    return means if len(means) == len(SHARES) else {}


def _figure(stats: dict[str, list[float]]) -> Figure:
    traces = [
        {
            "type": "scatter",
            "mode": "lines+markers",
            "name": title,
            "x": list(range(len(stats[name]))),
            "y": [round(value, 4) for value in stats[name]],
            "text": [
                hover(f"layer {layer}", f"{title}: {numbers.percent(value)}")
                for layer, value in enumerate(stats[name])
            ],
            "hovertemplate": "%{text}<extra></extra>",
            "line": {"color": f"var(--{colour})", "width": 1.5},
            "marker": {"color": f"var(--{colour})", "symbol": symbol, "size": 7},
            "cliponaxis": False,
        }
        for name, title, colour, symbol in SHARES
    ]
    layers = max(len(own) for own in stats.values())
    y = {"title": titled("share"), "tickformat": ".0%", "rangemode": "tozero"}
    return figure(traces, layer_axis(layers), y, **legend())
