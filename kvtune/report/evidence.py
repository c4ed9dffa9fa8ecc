"""The sections of the page about what was measured: prices, spectra, predictions, scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import PurePath

from torch import Tensor

from kvtune.cli.amounts import clock
from kvtune.report import axes, numbers, prices, rank, scatter, spectra
from kvtune.report import figures as drawn
from kvtune.report.folder import Run
from kvtune.report.markup import Child, Markup, joined, table, tag
from kvtune.report.prices import PriceTable
from kvtune.report.rank import Pair
from kvtune.report.records import Candidate, Scores, Task, Trial
from kvtune.report.sections import (
    Figures,
    chart,
    details,
    numbers_of,
    rows_high,
    section,
    switch,
)


def price_table(run: Run, figures: Figures) -> Markup | None:
    """What each setting costs in each layer."""
    if run.profile is None or not run.profile.cells:
        return None
    found = {side: prices.table(run.profile, side) for side in ("keys", "values")}
    sides = {side: own for side, own in found.items() if own.names}
    for side, own in sides.items():
        figures[f"prices.{side}"] = drawn.price_map(own)
    first = next(iter(sides))
    tall = max(len(own.names) for own in sides.values())
    said = "Heat map: KL of each setting in each layer; the tables below have the numbers."
    return section(
        "prices",
        "What each layer costs",
        tag(
            "p",
            "The KL that a setting of one layer costs while all else stays at 16 bits.",
        ),
        tag("div", switch("prices", "Side", {side: side for side in sides}), class_="switches"),
        chart("prices", f"prices.{first}", said, rows_high(tall)),
        *(details(f"Prices of {side} in nats", _prices(own)) for side, own in sides.items()),
    )


def _prices(own: PriceTable) -> Markup:
    head = ("setting", *(f"layer {layer}" for layer in own.layers))
    rows = [
        (name, *(numbers.significant(price, 2) for price in row))
        for name, row in zip(own.names, own.prices, strict=True)
    ]
    return table(head, rows, f"KL in nats by setting of {own.side} and layer")


def spectrum(run: Run, figures: Figures) -> Markup | None:
    """How few directions hold most of a layer's energy."""
    energies = spectra.energies(run.profile) if run.profile else {}
    if not energies:
        return None
    for side, energy in energies.items():
        lines = {share: spectra.directions(energy, share) for share in (0.9, 0.99)}
        figures[f"spectra.{side}"] = drawn.spectrum(energy, lines)
    intro = (
        "How much of the mean square of keys (before RoPE, unless after it is said), values and "
        "queries the strongest directions of a head hold, or of all kv heads together. The lines "
        "show where 90 % and 99 % are reached: the lower they lie, the fewer channels would do."
    )
    said = "Heat map: cumulative energy by layer and directions; the table below has the numbers."
    return section(
        "spectra",
        "Spectra",
        tag("p", intro),
        tag("div", switch("spectra", "Of", {side: side for side in energies}), class_="switches"),
        chart("spectra", f"spectra.{next(iter(energies))}", said, 380),
        details("Directions that hold 90, 95 and 99 %", _directions(energies)),
    )


def _directions(energies: Mapping[str, Tensor]) -> Markup:
    rows = [
        (f"{side}, {100 * share:.0f} %", *map(str, spectra.directions(energy, share)))
        for side, energy in energies.items()
        for share in spectra.SHARES
    ]
    layers = len(next(iter(energies.values())))
    head = ("side, share", *(f"layer {layer}" for layer in range(layers)))
    return table(head, rows, "Directions that hold a share of the energy")


def rank_and_bits(run: Run, figures: Figures) -> Markup | None:
    """Rank and bits together against bits alone, where both were searched."""
    if run.summary is None or not (met := rank.pairs(run.summary)):
        return None
    figures["rank"] = scatter.rank_and_bits(*rank.fronts(run.summary))
    head = ("bits alone", "KL", "rank and bits", "KL", "times lower", "from")
    said = "Chart: KL over bits of both fronts; the table below has the numbers."
    title = "Both fronts at the bytes of each point of bits alone"
    return section(
        "rank",
        "Rank and bits",
        tag("p", rank.verdict(run.summary)),
        chart("rank", "rank", said, 400),
        details(title, table(head, [_met(pair) for pair in met], title, words=6)),
    )


def _met(pair: Pair) -> list[str]:
    alone = [f"{pair.alone.bits:.2f}", numbers.significant(pair.alone.kl)]
    if pair.mixed is None:
        return [*alone, "none so small", "", "", ""]
    mixed = [f"{pair.mixed.bits:.2f}", numbers.significant(pair.mixed.kl)]
    return [*alone, *mixed, f"{pair.times:.2f}" if pair.times else "", pair.mixed.origin]


def all_axes(run: Run, figures: Figures) -> Markup | None:
    """Tokens, bits and rank on one front against each alone, where all were searched."""
    if run.summary is None or not (met := axes.met(run.summary)):
        return None
    figures["axes"] = scatter.fronts(axes.fronts(run.summary))
    head = ("from", "bits", "KL", "all axes, bits", "KL", "it saves by")
    rows = [_beside(own, *pair) for own in met for pair in zip(own.own, own.best, strict=True)]
    said = "Chart: KL over bits of all fronts; the table below has the numbers."
    title = "The front of all axes at the bytes of each point of the others"
    return section(
        "axes",
        "Tokens, bits and rank",
        tag("p", axes.verdict(run.summary)),
        chart("axes", "axes", said, 400),
        details(title, table(head, rows, title, words=1)),
    )


def _beside(met: axes.Met, own: Candidate, best: Candidate) -> list[str]:
    told = [f"{own.bits:.2f}", numbers.significant(own.kl), f"{best.bits:.2f}"]
    return [met.name, *told, numbers.significant(best.kl), ", ".join(best.axes)]


def predictions(run: Run, figures: Figures) -> Markup | None:
    """How well prices predict what trials measure."""
    rows = run.trials.rows if run.trials else ()
    if not scatter.comparable(rows):
        return None
    figures["predictions"] = scatter.predictions(rows)
    searched = run.summary.search if run.summary else None
    alike = searched.rank_correlation if searched else None
    told = f" Their rank correlation is {alike:.3f}." if alike is not None else ""
    failed = len([row for row in rows if row.state == "infeasible"])
    lost = f" {failed} of {len(rows)} trials were infeasible." if failed else ""
    intro = (
        "Each mark is a trial of the search: the sum of its prices, and what a forward pass "
        f"measured.{told}{lost}"
    )
    said = "Chart: predicted against measured KL; the table below has the numbers."
    return section(
        "predictions",
        "Predicted and measured",
        tag("p", intro),
        chart("predictions", "predictions", said, 400),
        details("All trials", _trials(rows)),
    )


def _trials(rows: Sequence[Trial]) -> Markup:
    listed = [
        [str(row.number), row.origin, row.state]
        + [numbers.significant(value) for value in (row.bits, row.predicted, row.kl)]
        for row in rows
    ]
    head = ("trial", "from", "state", "bits", "predicted KL", "measured KL")
    return table(head, listed, "Trials of the search", words=3)


def scores(run: Run, figures: Figures) -> Markup | None:
    """What recipes score on tasks, beside the 16-bit cache on the same items."""
    if not run.scores:
        return None
    intro = (
        "Scores between 0 and 1 with 95 % intervals, on the same items for both. "
        "A task on which the uncompressed model is at chance says nothing; it is hollow, and not "
        "in the mean."
    )
    parts = [part for i, own in enumerate(run.scores) for part in _recipe_scores(i, own, figures)]
    return section("scores", "Tasks", tag("p", intro), *parts)


def _recipe_scores(index: int, found: Scores, figures: Figures) -> list[Child]:
    name = f"scores.{index}"
    figures[name] = scatter.scores(found)
    said = f"Chart: task scores of {found.recipe} with intervals; the table below has the numbers."
    length = f" at {found.length:,} tokens" if found.length else ""
    head = ("task", "verdict", "16 bit", "compressed", "difference", "95 % interval", "items")
    rows = [_task(task, own) for task, own in found.tasks.items()]
    return [
        tag("h3", f"{found.recipe or 'recipe'}{length}"),
        chart(f"scores-{index}", name, said, 90 + 44 * len(rows)),
        table((*head, "chance"), rows, f"Scores of {found.recipe}", words=2),
        _mean(found),
    ]


def _task(name: str, own: Task) -> list[Child]:
    verdict = "at chance" if own.at_chance else own.verdict
    change = f"{own.difference.mean:+.2f}"
    span = f"{own.difference.low:+.2f} to {own.difference.high:+.2f}"
    means = [f"{own.dense.score:.2f}", f"{own.compressed.score:.2f}"]
    return [name, verdict, *means, change, span, str(own.n), f"{own.chance:.2f}"]


def _mean(found: Scores) -> Markup | None:
    told = [
        f"{name} {said}" for name, value in (found.mean or {}).items() if (said := _said(value))
    ]
    if not told:
        return None
    return tag("p", f"Mean over the tasks that tell: {', '.join(told)}.", class_="note")


def _said(value: object) -> str:
    """A number, or a mean with its interval; empty for anything else."""
    if isinstance(value, Mapping):
        centre = _said(value.get("score", value.get("mean")))
        low, high = _said(value.get("low")), _said(value.get("high"))
        return f"{centre} ({low} to {high})" if low and high else centre
    return f"{value:.2f}" if isinstance(value, float | int) else ""


def _flat(values: Mapping[str, object], before: str = "") -> dict[str, float]:
    """Numbers of tables in tables, by their path."""
    found: dict[str, float] = {}
    for key, value in values.items():
        name = f"{before} {key}".strip().replace("_", " ")
        if isinstance(value, Mapping):
            found |= _flat(value, name)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found[name] = value
    return found


def about(run: Run, place: str) -> Markup:
    """What was run, on what, and what is missing."""
    told = {name: value for name, value in {**_work(run), **_machine(run)}.items() if value}
    lacking = [tag("li", f"{own.part}: ", tag("code", own.command)) for own in run.missing(place)]
    return section(
        "run",
        "The run",
        numbers_of(told),
        _hashes(run),
        _seconds(run),
        joined([tag("h3", "Not in this folder"), tag("ul", *lacking)]) if lacking else None,
    )


def _work(run: Run) -> dict[str, Child]:
    job, summary = run.job, run.summary
    found: dict[str, Child] = {"command": tag("code", run.command) if run.command else None}
    if job:
        sizes = f"{job.text.sequences} sequences, {job.text.context} tokens of context"
        data = ", ".join(_bare(part) for part in job.text.data.split(","))
        found |= {
            "text": data,
            "sizes": f"{sizes}, {job.continuation} measured behind each",
            "seed": str(job.seed),
        }
    if summary and (search := summary.search):
        limits = [f"{name} {value:g}" for name, value in search.constraints.items()]
        counts = {"infeasible": search.infeasible, "stopped early": search.stopped}
        lost = [f"{count} {name}" for name, count in counts.items() if count]
        found |= {
            "objectives": ", ".join(search.objectives),
            "limits": ", ".join(limits),
            "trials": ", ".join([f"{search.trials}", *lost]) if search.trials is not None else None,
            "interaction": ", ".join(
                f"{k} {v:.3g}" for k, v in _flat(search.interaction or {}).items()
            ),
        }
    return found


def _bare(name: str) -> str:
    """A file's name without its folders, which are nobody's business."""
    return PurePath(name).name if PurePath(name).is_absolute() else name


def _machine(run: Run) -> dict[str, Child]:
    if not (held := run.summary):
        return {}
    versions = {"torch": held.torch, "transformers": held.transformers, "Python": held.python}
    told = ", ".join(f"{name} {value}" for name, value in versions.items() if value)
    return {"device": held.device, "versions": told}


def _hashes(run: Run) -> Markup | None:
    """The hashes of model and texts."""
    rows: dict[str, str] = {}
    if run.profile:
        meta = run.profile.meta
        rows |= {
            "model": str(meta.get("fingerprint", "")),
            "text, calibrate": str(meta.get("text", "")),
        }
    for _, read in run.recipes.values():
        texts = read.measured.get("texts")
        if isinstance(texts, dict):
            rows |= {f"text, {role}": str(value) for role, value in texts.items()}
    known = [(name, tag("code", value)) for name, value in rows.items() if value]
    return (
        details("Hashes of model and texts", table(("what", "sha256"), known, "Hashes", words=2))
        if known
        else None
    )


def _seconds(run: Run) -> Markup | None:
    spent = run.summary.seconds if run.summary else {}
    if not spent:
        return None
    rows = [(stage, clock(seconds)) for stage, seconds in spent.items()]
    rows.append(("all", clock(sum(spent.values()))))
    return details("Time of each stage", table(("stage", "time"), rows, "Time of each stage"))
