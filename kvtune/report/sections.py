"""The sections of the page about the front: its chart, its points, and each point's recipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from kvtune.cli.amounts import size
from kvtune.report import layers as of_layers
from kvtune.report import numbers, scatter, sentences
from kvtune.report.figures import Figure, kept_map, layer_map
from kvtune.report.folder import Run
from kvtune.report.layers import Layer
from kvtune.report.markup import Child, Markup, table, tag
from kvtune.report.records import Candidate, Point, Summary

Figures = dict[str, Figure]


def section(name: str, title: str, *children: Child) -> Markup:
    """A section with its heading, which names it."""
    heading = tag("h2", title, id=f"{name}-title")
    return tag("section", heading, *children, id=name, aria_labelledby=f"{name}-title")


def chart(name: str, shown: str, said: str, height: int) -> Markup:
    """The place of a figure: `name` for what is switched, `shown` for what is drawn at first."""
    look = f"height:{height}px"
    place = tag(
        "div",
        id=f"chart-{name}",
        class_="chart",
        data_figure=shown,
        style=look,
        role="img",
        aria_label=said,
    )
    return tag("figure", place)


def rows_high(rows: int) -> int:
    """The height of a heat map in px: a row can be read, but the map stays on a screen."""
    return 130 + min(22 * rows, 900)


def switch(name: str, label: str, options: Mapping[str, str]) -> Markup | None:
    """A menu that redraws chart `name`; nothing where there is nothing to choose."""
    if len(options) < 2:
        return None
    made = [tag("option", title, value=value) for value, title in options.items()]
    menu = tag("select", *made, data_draws=name)
    return tag("label", tag("span", label), menu, class_="switch")


def details(title: str, *children: Child) -> Markup:
    """Numbers behind a chart."""
    return tag("details", tag("summary", title), *children)


def numbers_of(pairs: Mapping[str, Child]) -> Markup:
    """Names and values, side by side."""
    rows = [tag("div", tag("dt", name), tag("dd", value)) for name, value in pairs.items()]
    return tag("dl", *rows)


def front(run: Run, figures: Figures) -> Markup | None:
    """The chart of the front and the list of its points."""
    summary = run.summary
    if summary is None:
        return None
    axes, kinds = scatter.axes(summary), scatter.KINDS
    for axis in axes:
        for kind in kinds:
            figures[f"front.{axis}.{kind}"] = scatter.front(summary, axis, kind)
    said = (
        f"Chart: KL against size of {len(summary.points)} proved recipes"
        f" and {len(summary.held_out)} candidates; the table below has the numbers."
    )
    intro = (
        "Each point is a recipe. Lower is closer to the uncompressed model, further left is "
        "smaller. Choose a point, in the chart or in the table, to see its recipe."
    )
    menus = switch("front", "Across", axes), switch("front", "Up", kinds)
    return section(
        "front",
        "The front",
        tag("p", intro),
        tag("div", *menus, class_="switches"),
        chart("front", "front.bits.pass", said, 430),
        _points(summary),
        tag("p", _measured_on(summary.points[0]), class_="note"),
        _uniforms([own for own in summary.held_out if own.uniform]),
    )


def _measured_on(first: Point) -> str:
    return (
        f"Bytes count codes, scales, zeros and exact tokens at {first.bytes_context:,} tokens, "
        f"batch {first.batch}. By generation: {first.positions:,} positions of held-out text after "
        f"{first.context:,} tokens, 95 % bootstrap intervals over sequences. One pass: all "
        "positions of the same text in one forward pass, where uniform recipes were measured too."
    )


def _points(summary: Summary) -> Markup:
    timed = any(point.latency is not None for point in summary.points)
    head = [
        "recipe",
        "smaller",
        "bytes",
        "KL by generation",
        "95 % interval",
        "flips",
        "KL, one pass",
    ]
    head += ["best uniform", *(["latency"] if timed else [])]
    rows = [_point(i, point, i == summary.chosen, timed) for i, point in enumerate(summary.points)]
    return table(head, rows, "Proved recipes, the largest first")


def _point(index: int, point: Point, chosen: bool, timed: bool) -> list[Child]:
    button = tag(
        "button",
        f"{point.bits:.2f} bits",
        type="button",
        data_point=index,
        aria_pressed="true" if chosen else "false",
        aria_controls=f"point-{index}",
    )
    mark = tag("span", "chosen", class_="chosen") if chosen else None
    return [
        tag("span", button, mark, class_="named"),
        f"{point.ratio:.2f}x",
        size(point.bytes),
        numbers.significant(point.kl),
        numbers.interval(point.kl_low, point.kl_high),
        numbers.percent(point.flips),
        numbers.significant(point.held_out_kl),
        numbers.significant(point.best_uniform_kl),
        *([numbers.latency(point.latency)] if timed else []),
    ]


def _uniforms(own: Sequence[Candidate]) -> Markup | None:
    if not own:
        return None
    rows = [
        (
            one.origin.removeprefix("uniform "),
            f"{one.bits:.2f}",
            size(one.bytes),
            numbers.significant(one.kl),
        )
        for one in sorted(own, key=lambda one: one.bytes)
    ]
    title = "Uniform recipes on the same text"
    return details(title, table(("recipe", "bits", "bytes", "KL, one pass"), rows, title))


def recipe(run: Run, figures: Figures) -> Markup | None:
    """The recipe that is shown: one panel per point, of which the page shows one."""
    summary = run.summary
    if summary is None:
        return None
    panels = [
        _panel(run, index, point, index == summary.chosen, figures)
        for index, point in enumerate(summary.points)
    ]
    live = tag("p", id="said", class_="hidden", role="status", aria_live="polite")
    return section("recipe", "The recipe", *panels, live)


def _panel(run: Run, index: int, point: Point, chosen: bool, figures: Figures) -> Markup:
    title = f"{point.bits:.2f} bits, {point.ratio:.2f} times smaller"
    told = {
        "KL by generation": numbers.significant(point.kl),
        "95 % interval": numbers.interval(point.kl_low, point.kl_high),
        "flips": numbers.percent(point.flips),
        "bytes": size(point.bytes),
        "from": point.origin,
        "file": point.file,
    }
    if point.latency is not None:
        told["latency"] = numbers.latency(point.latency)
    mark = tag("span", "chosen", class_="chosen") if chosen else None
    return tag(
        "article",
        tag("h3", tag("span", title, mark, class_="named")),
        numbers_of(told),
        tag("p", rival) if (rival := sentences.uniform_rival(point)) else None,
        *_body(run, index, point, figures),
        id=f"point-{index}",
        hidden=not chosen,
        data_said=f"Shown: {title}.",
    )


def _body(run: Run, index: int, point: Point, figures: Figures) -> list[Child]:
    if point.file not in run.recipes:
        return [tag("p", f"{point.file} is not in the folder any more.", class_="note")]
    text, read = run.recipes[point.file]
    block = _file(text, f"toml-{index}")
    if not (count := _layer_count(run, point)):
        return block
    found = of_layers.of_recipe(read, count, point.bytes_context)
    heads = read.model.kv_heads if read.model else 0
    made = figures[f"layers.{index}"] = layer_map(found, heads)
    rows = len(made["data"][0]["y"])
    kept = _kept(index, found, figures)
    said = "Heat map: code bits of keys and values in each layer; the table below has the numbers."
    return [
        tag("h4", "Bits in each layer"),
        chart(f"layers-{index}", f"layers.{index}", said, rows_high(rows)),
        *kept,
        details("Layer by layer", _layers(found)),
        *block,
    ]


def _kept(index: int, found: Sequence[Layer], figures: Figures) -> list[Child]:
    """The map of tokens and rank, where a recipe saves by them."""
    if (made := kept_map(found)) is None:
        return []
    figures[f"kept.{index}"] = made
    said = (
        "Heat map: the part of tokens and channels that each layer stores, as in the table below."
    )
    high = rows_high(len(made["data"][0]["y"]))
    title = tag("h4", "Tokens and channels stored in each layer")
    return [title, chart(f"kept-{index}", f"kept.{index}", said, high)]


def _file(text: str, name: str) -> list[Child]:
    """A recipe's text, with a button that copies it."""
    copy = tag("button", "Copy", type="button", data_copies=name)
    code = tag("code", text, id=name)
    return [
        tag("div", tag("h4", "Recipe file"), copy, class_="bar"),
        tag("pre", code, tabindex=0, role="region", aria_label="Recipe as TOML"),
    ]


def _layer_count(run: Run, point: Point) -> int:
    bound = run.recipes[point.file][1].model
    if bound:
        return bound.layers
    return max((cell.layer + 1 for cell in run.profile.cells), default=0) if run.profile else 0


def _layers(found: Sequence[Layer]) -> Markup:
    head = ("layer", "keys", "values", "first exact", "last exact", "tokens stored")
    rows: list[list[Child]] = []
    for layer in found:
        sides = [layer.sides[side].chain for side in ("keys", "values")]
        kept = f"{100 * layer.tokens:.3g} %"
        rows.append([f"{layer.index}", *sides, f"{layer.sinks}", f"{layer.recent}", kept])
        for head_, own in sorted(layer.heads.items()):
            rows.append(
                [f"{layer.index}, head {head_}", own["keys"].chain, own["values"].chain, "", "", ""]
            )
    return table(head, rows, "What each layer does", words=3)
