"""kvtune calibrate: model and text become a profile, and a table of each layer's sensitivity."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from kvtune.cli.amounts import clock
from kvtune.cli.options import (
    Aim,
    Continuation,
    Count,
    DryRun,
    Folder,
    Model,
    Seed,
    Template,
    Text,
    Where,
)
from kvtune.cli.output import Output

if TYPE_CHECKING:
    from kvtune.profile import Profile
    from kvtune.space import Side
    from kvtune.tune import Tuner

SIDES: tuple[Side, ...] = ("keys", "values")
BAR = 24  # characters of the longest bar


def calibrate(
    out: Output,
    model: Model,
    where: Where,
    text: Text,
    count: Count,
    output: Folder = None,
    template: Template = "search-fast",
    continuation: Continuation = 128,
    seed: Seed = 0,
    exact: Annotated[
        bool, typer.Option("--exact", help="Check the prices by one forward pass per cell.")
    ] = False,
    heads: Annotated[
        bool,
        typer.Option("--heads", help="Find the query heads that fetch facts, by needle runs."),
    ] = False,
    dry_run: DryRun = False,
) -> None:
    """Measure what each layer of MODEL is sensitive to.

    Writes profile.safetensors into the run folder, for kvtune search.
    """
    from kvtune.cli import plan, run
    from kvtune.cli.job import Job, folder_for, template_of

    job = Job.of(model, where, text, continuation, seed)
    folder, opened = folder_for(output, model), template_of(template)
    if dry_run:
        return plan.show(out, job, opened, count, folder, exact=exact)
    out.resume = run.command_line()
    limits = run.limits_of(folder, Aim())
    tuner = run.open_run(out, job, folder, opened, count, limits, Aim())
    job.save(folder, opened)
    profile = tuner.profile(exact, heads)
    out.data |= {"folder": str(folder), "cells": len(profile.cells)}
    _show_layers(out, sensitivity(tuner, profile))
    if exact:
        _show_exact(out, profile)
    if heads:
        _show_heads(out, profile)
    out.data |= {"next": f"kvtune search {folder}"}
    out.print(f"{len(profile.cells)} cells are priced in {folder}. Next:\n\n  {out.data['next']}")


def sensitivity(tuner: Tuner, profile: Profile) -> list[dict[str, Any]]:
    """The KL in nats of each layer's keys and values alone, under their smallest setting (and
    the first window, where several are open)."""
    from kvtune.cache import layer_bytes
    from kvtune.profile import Cell, setting

    prices, at = profile.prices(), tuner.settings.goal.context
    rows = []
    for layer, own in next(iter(tuner.windows.values())).items():
        shape = tuner.known.layers[layer].kv_heads, tuner.known.layers[layer].head_dim
        row: dict[str, Any] = {"layer": layer}
        for side in SIDES:
            sizes = {
                chain: layer_bytes(own.cell(side, chain), *shape, at) for chain in own.chains(side)
            }
            small = min(sizes, key=sizes.__getitem__)
            # of a side that opens nothing but 16 bits there is no cell
            price = prices.get(Cell(layer, side, setting(small), own.sinks, own.recent), 0.0)
            row |= {side: price, f"{side}_setting": str(small)}
        rows.append(row)
    return rows


def _show_layers(out: Output, rows: list[dict[str, Any]]) -> None:
    out.data["layers"] = rows
    most = max(row[side] for row in rows for side in SIDES)
    table = Table(box=SIMPLE_HEAD)
    table.add_column("layer", justify="right")
    for side in SIDES:
        table.add_column(f"{side}, KL", justify="right")
        table.add_column("", no_wrap=True)
    for row in rows:
        table.add_row(str(row["layer"]), *_cells(row["keys"], most), *_cells(row["values"], most))
    settings = {side: sorted({row[f"{side}_setting"] for row in rows}) for side in SIDES}
    told = "; ".join(f"{side} under {' or '.join(found)}" for side, found in settings.items())
    out.print(f"What each layer alone costs at its smallest: {told}.", table)


def _cells(price: float, most: float) -> tuple[str, str]:
    return f"{price:.5f}", "#" * round(BAR * price / most) if most > 0 else ""


def _show_heads(out: Output, profile: Profile) -> None:
    """By how many needle runs heads were found."""
    said = dict(profile.meta["retrieval"])
    out.data["retrieval"] = said
    which = "these count" if said["only_right"] else "too few, so all count"
    out.print(
        f"Retrieval heads: {said['right']} of {said['runs']} needle runs of {said['length']:,} "
        f"tokens are answered right ({which})."
    )


def _show_exact(out: Output, profile: Profile) -> None:
    """How well the prices order the cells as exhaustive forward passes do."""
    from kvtune.calibrate import spearman

    priced, exact = profile.tensors["prices"], profile.tensors["exact"]
    found = {"all": spearman(priced, exact)}
    for side in SIDES:
        rows = [i for i, cell in enumerate(profile.cells) if cell.side == side]
        found[side] = spearman(priced[rows], exact[rows])
    seconds: dict[str, float] = dict(profile.meta["seconds"])
    out.data |= {"spearman": found, "seconds": seconds}
    told = ", ".join(f"{name} {value:.3f}" for name, value in found.items())
    out.print(
        f"Rank correlation of prices and exact KL (Spearman): {told}.",
        f"Prices took {clock(seconds['price'])}, exact forwards {clock(seconds['exact'])}.",
    )
