"""kvtune doctor: what works on this machine, each failing line with its cure."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.table import Table

from kvtune.cli.output import Output
from kvtune.errors import UnsupportedError


def doctor(out: Output) -> None:
    """Check what kvtune needs on this machine; a failing line has its cure beside it."""
    from kvtune.cli.checks import every

    checks = []
    for _name, run in (found := every()):
        checks.append(run())
        out.say("checks", len(checks), len(found))
    out.data["checks"] = [vars(check) for check in checks]
    table = Table(box=SIMPLE_HEAD)
    for column in ("", "what", "found", "cure"):
        table.add_column(column)
    for check in checks:
        table.add_row(check.state, check.name, check.found, check.cure)
    out.print(table)
    if failed := [check.name for check in checks if check.state == "FAILS"]:
        raise UnsupportedError(f"kvtune will not work here: {', '.join(failed)}.", "See the cures.")
    out.print("Everything that kvtune needs works.")
