"""The proved front as a table, and what to do next."""

import shlex
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from kvtune.cli.amounts import clock, size
from kvtune.cli.output import Output

CHOSEN = "chosen"
ASK = "Why is the sky blue?"


def show(
    out: Output, summary: dict[str, Any] | None, folder: Path, model: str, max_kl: float
) -> None:
    """Prints the front, the chosen recipe and the next command; fills the data of --json.

    Without a summary, another worker of the study proves the front.
    """
    if summary is None:
        out.data |= {"proved_elsewhere": True}
        out.print("All trials are done; another worker of this study proves the front.")
        return
    points, at = summary["points"], summary["chosen"]
    place = str(folder / CHOSEN)
    command = shlex.join(["kvtune", "apply", place, "--model", model, "--prompt", ASK])
    kept = {name: value for name, value in summary.items() if name != "binding"}
    seconds = {stage: round(spent, 3) for stage, spent in out.say.seconds.items()}
    places = {"folder": str(folder), "recipe": place, "next": command}
    out.data |= {**kept, **places, "seconds": seconds}
    first = points[0]
    if points[at]["kl"] > max_kl:
        out.warn(f"No recipe is within --max-kl {max_kl:g}; the most accurate one was chosen.")
    out.print(
        _table(points, at),
        _searched(summary),
        f"Bytes at {first['bytes_context']:,} tokens, batch {first['batch']}; KL in nats, over "
        f"{first['positions']:,} positions of held-out text after {first['context']:,} tokens.",
        f"Chosen (*): {place}, {size(points[at]['bytes'])}, "
        f"{points[at]['ratio']:.2f}x smaller than 16 bit.",
        f"{_stages(summary)}Next:\n\n  {command}",
    )


def _stages(summary: dict[str, Any]) -> str:
    """The wall time of each stage; nothing where an older run did not say."""
    spent = summary.get("stages", {})
    told = ", ".join(f"{stage} {clock(seconds)}" for stage, seconds in spent.items())
    return f"Stages took {clock(sum(spent.values()))}: {told}. " if spent else ""


def _searched(summary: dict[str, Any]) -> str:
    """What became of the trials, and how well the price table foresaw them."""
    found = summary["search"]
    parts = [f"{found['trials']} trials"]
    parts += [f"{found[kind]} {kind}" for kind in ("stopped", "infeasible") if found[kind]]
    rank = found["rank_correlation"]
    foreseen = "" if rank is None else f"; predicted and measured KL rank alike by {rank:.3f}"
    return f"{', '.join(parts)}{foreseen} (Spearman)." if foreseen else f"{', '.join(parts)}."


def _table(points: list[dict[str, Any]], chosen: int) -> Table:
    table = Table(box=SIMPLE_HEAD)
    table.add_column("")
    names = ["bits", "smaller", "KL", "95 % interval", "flips", "KL, one pass", "best uniform"]
    timed = any(point["latency"] is not None for point in points)
    for name in [*names, *(["attention"] if timed else [])]:
        table.add_column(name, justify="right", no_wrap=True)
    for index, point in enumerate(points):
        latency = [f"{point['latency']:.0f} us"] if timed else []
        table.add_row("*" if index == chosen else "", *_cells(point), *latency)
    return table


def _cells(point: dict[str, Any]) -> list[str]:
    rival = point["best_uniform_kl"]
    return [
        f"{point['bits']:.2f}",
        f"{point['ratio']:.2f}x",
        f"{point['kl']:.5f}",
        f"{point['kl_low']:.5f} to {point['kl_high']:.5f}",
        f"{point['flips']:.1%}",
        f"{point['held_out_kl']:.5f}",
        "none" if rival is None else f"{rival:.5f}",
    ]
