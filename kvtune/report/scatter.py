"""Figures of points: the front beside uniform recipes, predictions, and task scores."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

from kvtune.cli.amounts import size
from kvtune.report import numbers
from kvtune.report.figures import Figure, figure, hover, titled
from kvtune.report.records import Candidate, Estimate, Point, Scores, Summary, Trial

LEAST = 1e-8  # nats: what a log scale shows for a KL of nothing, or less by rounding
AXES = {"bits": "true bits per value", "bytes": "bytes of the cache", "latency": "latency, us"}
KINDS = {"pass": "KL in nats, one pass", "generation": "KL in nats, by generation"}
Placed = Point | Candidate


def axes(summary: Summary) -> dict[str, str]:
    """What the front can be drawn over: latency only where every proved point has one."""
    timed = all(point.latency is not None for point in summary.points)
    return {name: title for name, title in AXES.items() if name != "latency" or timed}


def front(summary: Summary, axis: str, kind: str) -> Figure:
    """The front over an axis. One pass compares all candidates on the same positions; by
    generation there are proved points only, with their intervals.

    The page knows two traces by their uid: the proved points in their order, on top of all else,
    and the ring around the one that is shown, which it moves.
    """
    points = summary.points
    own = _kl(kind)
    proved = _marks("the front", points, axis, own, _proved, "front", "circle", 11)
    proved |= {"mode": "lines+markers", "line": {"color": "var(--front)", "width": 1.5}}
    proved |= {"uid": "front", "legendrank": 1}
    if kind == "generation":
        proved["error_y"] = _error(points)
    shown = points[summary.chosen]
    ring = _marks("shown below", [shown], axis, own, _proved, "ink", "circle-open", 19)
    ring |= {"uid": "ring", "legendrank": 2, "hoverinfo": "skip", "hovertemplate": None}
    ring["marker"]["line"] = {"width": 2, "color": "var(--ink)"}
    others = _others(summary, axis) if kind == "pass" else []
    made = figure([*others, ring, proved], _x(summary, axis), _y(kind), **legend())
    _dense(made, summary, axis)
    return made


def _kl(kind: str) -> Callable[[Any], float]:
    return (lambda own: float(own.kl)) if kind == "generation" else _one_pass


def _one_pass(own: Placed) -> float:
    return own.held_out_kl if isinstance(own, Point) else own.kl


def _marks(
    name: str,
    items: Sequence[Placed],
    axis: str,
    own: Callable[[Any], float],
    told: Callable[[Any], str],
    colour: str,
    symbol: str,
    width: int,
) -> Figure:
    return {
        "type": "scatter",
        "mode": "markers",
        "name": name,
        "x": [getattr(item, axis) for item in items],
        "y": [max(own(item), LEAST) for item in items],
        "text": [told(item) for item in items],
        "hovertemplate": "%{text}<extra></extra>",
        "marker": {"color": f"var(--{colour})", "symbol": symbol, "size": width},
    }


def _proved(point: Point) -> str:
    lines = [
        f"{point.bits:.2f} bits, {point.ratio:.2f} times smaller",
        f"{size(point.bytes)} at {point.bytes_context:,} tokens",
        f"KL {numbers.significant(point.kl)} by generation",
        f"   ({numbers.interval(point.kl_low, point.kl_high)})",
        f"KL {numbers.significant(point.held_out_kl)} in one pass",
        f"flips {numbers.percent(point.flips)}",
        *_timed(point),
        f"from {point.origin}"[:90],
    ]
    return hover(*lines)


def _candidate(own: Candidate) -> str:
    name = own.origin if len(own.origin) <= 90 else f"{own.origin[:90]}..."
    ratio = f", {own.ratio:.2f} times smaller" if own.ratio else ""
    kl = f"KL {numbers.significant(own.kl)} in one pass"
    parts = name.split(" | ")
    return hover(f"{own.bits:.2f} bits{ratio}", *parts, kl, *_timed(own))


def _timed(own: Placed) -> list[str]:
    return [] if own.latency is None else [f"latency {numbers.latency(own.latency)}"]


def _error(points: Sequence[Point]) -> Figure:
    up = [max(point.kl_high - point.kl, 0) for point in points]
    # a log scale has no place for a lower end of nothing
    down = [max(point.kl - max(point.kl_low, LEAST), 0) for point in points]
    return _bars(up, down, "front")


def _bars(up: list[float], down: list[float], colour: str) -> Figure:
    """Intervals as plotly.js draws them."""
    ends = {"type": "data", "symmetric": False, "array": up, "arrayminus": down}
    return {**ends, "color": f"var(--{colour})", "thickness": 1.2, "width": 4}


def _others(summary: Summary, axis: str) -> list[Figure]:
    placed = [own for own in summary.held_out if getattr(own, axis) is not None]
    proved = {(point.origin, point.bytes) for point in summary.points}
    uniform = [own for own in placed if own.uniform]
    rest = [own for own in placed if not own.uniform and (own.origin, own.bytes) not in proved]
    made = [
        _marks("uniform recipes", uniform, axis, _one_pass, _candidate, "uniform", "diamond", 9),
        _marks("other candidates", rest, axis, _one_pass, _candidate, "other", "circle-open", 8),
    ]
    return [trace for trace in made if trace["x"]]


def _x(summary: Summary, axis: str) -> dict[str, Any]:
    title = {"title": titled(AXES[axis])}
    if axis == "latency":  # it varies far less than sizes do
        return title
    if axis == "bits":
        return {**title, "type": "log", "tickvals": [1, 1.5, 2, 3, 4, 6, 8, 12, 16]}
    every: list[Placed] = [*summary.points, *summary.held_out]
    ticks = _ladder([own.bytes for own in every])
    names = [size(tick).replace(".0 ", " ") for tick in ticks]
    return {**title, "type": "log", "tickvals": ticks, "ticktext": names}


def _ladder(values: Sequence[float]) -> list[float]:
    """1, 2, 5 and their powers of ten around values."""
    low, high = min(values) / 2, max(values) * 8
    steps = (digit * 10.0**power for power in range(-3, 16) for digit in (1, 2, 5))
    return [step for step in steps if low <= step <= high]


def _y(kind: str) -> dict[str, Any]:
    return {
        "type": "log",
        "title": titled(KINDS[kind]),
        "dtick": 1,
        "tickformat": "~g",
        "minor": {},
    }


def legend() -> Figure:
    """A legend above the chart, that is only read."""
    place = {"orientation": "h", "x": 0, "y": 1.0, "yanchor": "bottom", "itemclick": False}
    return {"showlegend": True, "legend": {**place, "itemdoubleclick": False}}


def _dense(made: Figure, summary: Summary, axis: str) -> None:
    """A line where the 16-bit cache is: its KL of nothing has no place on a log scale."""
    first = summary.points[0]
    at = {
        "bits": summary.dense.bits if summary.dense else 16.0,
        "bytes": summary.dense.bytes if summary.dense else first.bytes * first.ratio,
        "latency": summary.dense.latency if summary.dense else None,
    }[axis]
    if not at:
        return
    line = {"x": [at, at], "y": [0, 1], "yaxis": "y2", "mode": "lines", "type": "scatter"}
    look = {
        "line": {"color": "var(--dense)", "width": 2, "dash": "dot"},
        "name": "16-bit cache (KL 0)",
    }
    told = hover("the 16-bit cache", f"{AXES[axis]}: {numbers.significant(at)}", "KL 0")
    made["data"].append(
        {**line, **look, "text": [told, told], "hovertemplate": "%{text}<extra></extra>"}
    )
    made["layout"]["yaxis2"] = {
        "overlaying": "y",
        "range": [0, 1],
        "visible": False,
        "fixedrange": True,
    }


def rank_and_bits(alone: Sequence[Candidate], mixed: Sequence[Candidate]) -> Figure:
    """Both fronts on held-out text over true bits, as lines."""
    kinds = (
        ("bits alone", alone, "uniform", "diamond"),
        ("rank and bits", mixed, "front", "circle"),
    )
    return _lines(kinds)


LOOKS = (  # of the front of all axes, and of those of some alone
    ("front", "circle"),
    ("other", "square"),
    ("uniform", "diamond"),
    ("dense", "triangle-up"),
    ("over", "cross"),
)


def fronts(found: Mapping[str, Sequence[Candidate]]) -> Figure:
    """The front over tokens, bits and rank beside those of some axes alone, as lines."""
    pairs = zip(found.items(), LOOKS, strict=False)
    return _lines([(name, own, *look) for (name, own), look in pairs])


def _lines(kinds: Sequence[tuple[str, Sequence[Candidate], str, str]]) -> Figure:
    traces = [
        _marks(name, own, "bits", _one_pass, _candidate, colour, symbol, 9)
        | {"mode": "lines+markers", "line": {"color": f"var(--{colour})", "width": 1.5}}
        for name, own, colour, symbol in kinds
    ]
    x = {"title": titled(AXES["bits"]), "type": "log", "tickvals": [1, 1.5, 2, 3, 4, 6, 8, 12, 16]}
    return figure(traces, x, _y("pass"), **legend())


def comparable(trials: Sequence[Trial]) -> list[Trial]:
    """The trials whose KL was predicted and measured, and has a logarithm."""
    return [t for t in trials if t.kl and t.predicted and t.kl > 0 and t.predicted > 0]


def predictions(trials: Sequence[Trial]) -> Figure:
    """Predicted against measured KL of the search's trials, both on log scales."""
    known = comparable(trials)
    uniform = [t for t in known if t.origin.startswith("uniform")]
    tuned = [t for t in known if not t.origin.startswith("uniform")]
    ends = [
        min(min(t.kl or 1, t.predicted or 1) for t in known),
        max(max(t.kl or 0, t.predicted or 0) for t in known),
    ]
    diagonal = {
        "type": "scatter",
        "mode": "lines",
        "name": "predicted = measured",
        "x": ends,
        "y": ends,
        "line": {"color": "var(--dense)", "width": 1, "dash": "dot"},
        "hoverinfo": "skip",
    }
    kinds = (("tuned", tuned, "front", "circle"), ("uniform", uniform, "uniform", "diamond"))
    marks = [_trials(name, own, colour, symbol) for name, own, colour, symbol in kinds if own]
    x = {"type": "log", "title": titled("predicted KL in nats"), "dtick": 1, "tickformat": "~g"}
    y = {"type": "log", "title": titled("measured KL in nats"), "dtick": 1, "tickformat": "~g"}
    return figure([*marks, diagonal], x, y, **legend())


def _trials(name: str, own: Sequence[Trial], colour: str, symbol: str) -> Figure:
    return {
        "type": "scatter",
        "mode": "markers",
        "name": name,
        "x": [trial.predicted for trial in own],
        "y": [trial.kl for trial in own],
        "text": [
            hover(
                f"trial {trial.number}",
                *trial.origin[:120].split(" | "),
                f"predicted {numbers.significant(trial.predicted)}",
                f"measured {numbers.significant(trial.kl)}",
            )
            for trial in own
        ],
        "hovertemplate": "%{text}<extra></extra>",
        "marker": {"color": f"var(--{colour})", "symbol": symbol, "size": 9, "opacity": 0.85},
    }


def scores(found: Scores) -> Figure:
    """Task scores with their intervals, dense beside compressed; tasks at chance are hollow."""
    names = list(found.tasks)
    y = {
        "tickvals": list(range(len(names))),
        "ticktext": [escape(name[:40]) for name in names],
        "autorange": "reversed",
        "showgrid": False,
    }
    x = {"range": [-0.02, 1.02], "title": titled("score")}
    traces = [
        _estimates(found, "dense", "16-bit cache", "dense", "square", -0.14),
        _estimates(found, "compressed", "compressed", "front", "circle", 0.14),
    ]
    return figure(traces, x, y, **legend())


def _estimates(
    found: Scores, side: str, name: str, colour: str, symbol: str, shift: float
) -> Figure:
    own: list[Estimate] = [getattr(task, side) for task in found.tasks.values()]
    symbols = [f"{symbol}-open" if task.at_chance else symbol for task in found.tasks.values()]
    texts = [f"{name}: {one.score:.2f} ({one.low:.2f} to {one.high:.2f})" for one in own]
    return {
        "type": "scatter",
        "mode": "markers",
        "name": name,
        "x": [one.score for one in own],
        "y": [index + shift for index in range(len(own))],
        "error_x": _bars(
            [max(one.high - one.score, 0) for one in own],
            [max(one.score - one.low, 0) for one in own],
            colour,
        ),
        "text": [hover(task, text) for task, text in zip(found.tasks, texts, strict=True)],
        "hovertemplate": "%{text}<extra></extra>",
        "marker": {"color": f"var(--{colour})", "symbol": symbols, "size": 10},
    }
