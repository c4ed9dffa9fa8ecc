"""The report as text: headline, front, bits by layer, dearest layers, tasks, what is missing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import RenderableType
from rich.table import Table

from kvtune.cli.amounts import size
from kvtune.report import axes, numbers, prices, rank, sentences, spectra
from kvtune.report import layers as of_layers
from kvtune.report.folder import Run
from kvtune.report.records import Point, Scores, Summary

BLOCKS = " ▁▂▃▄▅▆▇█"
LISTED = 5  # layers that are named as the dearest


def view(run: Run) -> Iterator[RenderableType]:
    """What is printed, part by part; parts that the folder does not hold are left out."""
    yield sentences.headline(run)
    if (summary := run.summary) and (point := run.chosen):
        yield sentences.plainly(point)
        yield _front(summary)
        yield from _strips(run, point)
        if told := axes.verdict(summary):
            yield told
        yield from _rank_and_bits(summary)
    yield from _dearest(run)
    yield from _spectra(run)
    for found in run.scores:
        yield _scores(found)
    for own in run.missing(str(run.folder)):
        yield f"Not in the folder: {own.part}\n  {own.command}"


def _front(summary: Summary) -> Table:
    timed = any(point.latency is not None for point in summary.points)
    table = _table(
        "", "bits", "smaller", "bytes", "KL", "95 % interval", "flips", "KL, one pass", "uniform"
    )
    if timed:
        table.add_column("latency", justify="right", no_wrap=True)
    for index, point in enumerate(summary.points):
        cells = [
            "*" if index == summary.chosen else "",
            f"{point.bits:.2f}",
            f"{point.ratio:.2f}x",
            size(point.bytes),
            numbers.significant(point.kl),
            numbers.interval(point.kl_low, point.kl_high),
            numbers.percent(point.flips),
            numbers.significant(point.held_out_kl),
            numbers.significant(point.best_uniform_kl),
        ]
        table.add_row(*cells, *([numbers.latency(point.latency)] if timed else []))
    return table


def _rank_and_bits(summary: Summary) -> Iterator[RenderableType]:
    """Both fronts at the bytes of each point of bits alone, where both were searched."""
    if not (met := rank.pairs(summary)):
        return
    yield rank.verdict(summary)
    made = _table("bits alone", "KL", "rank and bits", "KL", "times lower")
    for pair in met:
        alone = (f"{pair.alone.bits:.2f}", numbers.significant(pair.alone.kl))
        mixed = ("none", "", "")
        if pair.mixed:
            times = f"{pair.times:.2f}" if pair.times else ""
            mixed = (f"{pair.mixed.bits:.2f}", numbers.significant(pair.mixed.kl), times)
        made.add_row(*alone, *mixed)
    yield made


def _spectra(run: Run) -> Iterator[RenderableType]:
    """How few directions hold the energy, means over all layers."""
    found = spectra.told(run.profile) if run.profile else {}
    if not found:
        return
    made = _table("Directions that hold", "90 / 95 / 99 % of the energy")
    for side, words in found.items():
        made.add_row(side, words)
    yield made


def _table(*names: str, title: str | None = None) -> Table:
    table = Table(box=SIMPLE_HEAD, title=title, title_justify="left")
    table.add_column(names[0])
    for name in names[1:]:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _strips(run: Run, point: Point) -> Iterator[str]:
    """Code bits of keys and values, one sign a layer, of the chosen recipe."""
    text_and_recipe = run.recipes.get(point.file)
    if not text_and_recipe or not (bound := text_and_recipe[1].model):
        return
    found = of_layers.of_recipe(text_and_recipe[1], bound.layers, point.bytes_context)
    yield "Bits in each layer of the chosen recipe, from the first on (+ stands for ten or more):"
    for side in ("keys", "values"):
        signs = [_sign(layer.sides[side].bits) for layer in found]
        yield f"  {side:6}  {_grouped(signs)}"
    if any(layer.tokens < 1 for layer in found):
        yield "Tokens stored in each layer, in tenths (+ stands for all):"
        yield f"  {'tokens':6}  {_grouped([_sign(10 * layer.tokens) for layer in found])}"
    if any(layer.heads for layer in found):
        yield "  Some heads differ; the page shows which."


def _sign(bits: float) -> str:
    return "+" if bits >= 9.5 else f"{bits:.0f}"


def _grouped(signs: Sequence[str]) -> str:
    """Ten layers, a space, ten layers: so that a layer can be counted."""
    return " ".join("".join(signs[i : i + 10]) for i in range(0, len(signs), 10))


def _dearest(run: Run) -> Iterator[str]:
    """What the fewest bits cost in each layer, and where that is the most."""
    if run.profile is None:
        return
    for side in ("keys", "values"):
        table = prices.table(run.profile, side)
        if not table.names:
            continue
        known = [price or 0.0 for price in table.prices[0]]
        order = sorted(range(len(known)), key=lambda i: -known[i])[:LISTED]
        named = ", ".join(f"{table.layers[i]} ({numbers.significant(known[i], 2)})" for i in order)
        bars = _grouped(_bars(known))
        yield f"Cost of {side} at {table.names[0]}:  {bars}\n  dearest layers: {named}"


def _bars(values: Sequence[float]) -> list[str]:
    most = max(values, default=0.0) or 1.0
    return [BLOCKS[max(1, round(value / most * (len(BLOCKS) - 1)))] for value in values]


def _scores(found: Scores) -> Table:
    length = f" at {found.length:,} tokens" if found.length else ""
    table = _table(
        "task",
        "16 bit",
        "compressed",
        "difference",
        "95 % interval",
        "items",
        title=f"{found.recipe}{length}",
    )
    table.add_column("verdict")
    for name, own in found.tasks.items():
        table.add_row(
            name,
            f"{own.dense.score:.2f}",
            f"{own.compressed.score:.2f}",
            f"{own.difference.mean:+.2f}",
            f"{own.difference.low:+.2f} to {own.difference.high:+.2f}",
            f"{own.n}",
            "at chance" if own.at_chance else own.verdict,
        )
    return table
