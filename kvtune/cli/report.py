"""kvtune report: a run folder as one HTML page, and as text."""

from pathlib import Path
from typing import Annotated

import typer

from kvtune.cli.output import Output

Directory = Annotated[Path, typer.Argument(metavar="DIR", help="A run folder.")]
Target = Annotated[
    Path | None, typer.Option("-o", "--output", help="The page; DIR/report.html when left out.")
]
Opened = Annotated[bool, typer.Option("--open", help="Show the page in the browser.")]


def report(out: Output, folder: Directory, output: Target = None, open_: Opened = False) -> None:
    """Show what the run folder DIR holds: one self-contained HTML page, and its main numbers here.

    The page shows the front, each recipe layer by layer, prices, spectra, predictions and task
    scores, as far as the folder holds them. It needs no network and no server.
    """
    from kvtune import report as reports
    from kvtune.files import write_atomic

    run = reports.read(folder)
    target = output or folder / reports.FILE
    made = reports.page(run)
    write_atomic(target, made)
    out.data |= {"page": str(target), "bytes": len(made), **reports.found(run)}
    out.print(*reports.view(run), str(target))
    if open_ and typer.launch(target.resolve().as_uri()) != 0:
        out.warn(f"No browser could be opened; open {target} yourself.")
