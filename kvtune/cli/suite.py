"""The proof suite on the command line: options, the table, its file and its gate."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from kvtune.cli import amounts
from kvtune.cli.options import Text, Where
from kvtune.cli.output import Output
from kvtune.cli.verdicts import Verdict
from kvtune.errors import UsageError
from kvtune.task import find, names

PANEL = "Suite"
RUN = "run.json"


@dataclass(frozen=True)
class Suite:
    """Which tasks are asked, how many items, at which length, and what drop is allowed."""

    suite: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            rich_help_panel=PANEL,
            help=f"Tasks over a long context: quick, full, or some of {', '.join(names())}.",
        ),
    ] = None
    suite_items: Annotated[
        int, typer.Option(min=2, rich_help_panel=PANEL, help="Items of each task.")
    ] = 24
    suite_length: Annotated[
        int | None,
        typer.Option(
            parser=amounts.tokens,
            metavar="TOKENS",
            rich_help_panel=PANEL,
            help="Tokens of an item; the longest at which the dense model works when left out.",
        ),
    ] = None
    suite_seed: Annotated[int, typer.Option(rich_help_panel=PANEL, help="Of all items.")] = 0
    max_drop: Annotated[
        float | None,
        typer.Option(
            parser=amounts.share,
            metavar="SHARE",
            rich_help_panel=PANEL,
            help="How far the mean score may fall below the dense model's: 5% or 0.05.",
        ),
    ] = None
    output: Annotated[
        Path | None,
        typer.Option(
            "-o", "--output", metavar="FILE", rich_help_panel=PANEL, help="Write the scores there."
        ),
    ] = None

    def any(self) -> bool:
        """Whether a suite, or what needs one, was asked for."""
        return any(x is not None for x in (self.suite, self.max_drop, self.output))

    def check(self) -> None:
        """Refuses names that are no tasks, and options that need a suite, before any work.

        Raises:
            UsageError: as said.
        """
        if self.suite is None:
            if self.max_drop is not None or self.output is not None:
                what = "--max-drop and -o need the scores of a suite."
                raise UsageError(what, "Add --suite quick.")
            return
        from kvtune.suite import chosen

        chosen(self.suite)


def scored(
    out: Output,
    path: Path,
    opened: tuple[Any, Any],
    suite: Suite,
    text: Text,
    where: Where,
    force: bool,
    draft: tuple[Any, Any] | None = None,
) -> list[Verdict]:
    """Runs the suite, prints and writes its scores; returns the verdict on --max-drop.

    Raises:
        UsageError: a limit, but the dense model is at chance on every task.
    """
    if suite.suite is None:
        return []
    from kvtune.prefill import Draft
    from kvtune.suite import run
    from kvtune.texts import read

    prose = "\n\n".join(document.text for document in read(text.data, where.offline))
    found = run(
        *opened,
        path,
        suite.suite,
        items=suite.suite_items,
        seed=suite.suite_seed,
        length=suite.suite_length,
        data=prose,
        force=force,
        draft=draft and Draft(*draft),
        say=out.say,
    )
    table = found.table()
    out.data["suite"] = table
    judged = _verdict(suite.max_drop, found.difference)
    out.print(*_shown(table), *(verdict.sentence() for verdict in judged))
    for place in _places(path, suite.output):
        from kvtune.files import write_atomic

        write_atomic(place, json.dumps(table, indent=1, allow_nan=False).encode())
        out.note(f"The scores lie in {place}.")
    return judged


def _verdict(limit: float | None, difference: Any) -> list[Verdict]:
    if limit is None:
        return []
    if difference is None:
        what = "The dense model is at chance on every task, so --max-drop cannot be judged."
        raise UsageError(what, "Give other tasks or a shorter --suite-length.")
    ends = (-difference.high, -difference.low)
    return [Verdict.of("max-drop", 0.0 - difference.mean, limit, ends)]


def _places(path: Path, output: Path | None) -> list[Path]:
    """The file asked for, and the run folder's own when the recipe lies in one."""
    found = [output] if output is not None else []
    whole = path.resolve()
    # a recipe's folder may be known by the recipe.toml in it
    own = whole.parent if whole.name == "recipe.toml" else whole
    for folder in own.parents:
        if (folder / RUN).is_file():
            found.append(folder / "scores" / f"{own.name.removesuffix('.toml')}.json")
            break
    return found


def _shown(table: dict[str, Any]) -> list[Table | str]:
    """The rich table of a suite, and below it what the tasks ask."""
    grid = Table(box=SIMPLE_HEAD)
    for head in ("task", "dense", "recipe", "difference (95 %)", "chance", "verdict"):
        grid.add_column(head, justify="left" if head in ("task", "verdict") else "right")
    for name, row in table["tasks"].items():
        grid.add_row(name, *_cells(row), f"{row['chance']:.1%}", _words(row))
    if (mean := table["mean"]) is not None:
        grid.add_section()
        grid.add_row("mean", *_cells(mean), "", _words(mean))
    said = f"{table['items']} items a task of at most {table['length']:,} tokens."
    if table["too_long"]:
        said += f" Too long for that: {', '.join(table['too_long'])}."
    told = [f"{name}: {find(name).describe()}" for name in table["tasks"]]
    return [grid, said, *told]


def _cells(row: dict[str, Any]) -> list[str]:
    sides = [
        f"{side['score']:.1%} ({side['low']:.0%} to {side['high']:.0%})"
        for side in (row["dense"], row["compressed"])
    ]
    gap = row["difference"]
    return [*sides, f"{gap['mean']:+.1%} ({gap['low']:+.0%} to {gap['high']:+.0%})"]


def _words(row: dict[str, Any]) -> str:
    if row.get("at_chance"):
        return "dense is at chance"
    needs = f"; {row['needs']} items may do" if row["needs"] else ""
    return f"{row['verdict']}{needs}"
