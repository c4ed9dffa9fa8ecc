"""A report as Markdown: a table of gates, as GitHub renders it in a step's summary."""

from __future__ import annotations

import re

from kvtune.cli.verdicts import HEADS, Report

# entities where a backslash is not safe inside a table, and backslashes elsewhere
_ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;", "|": "&#124;", "\\": "&#92;"}
_SPECIAL = re.compile(r"[&<>|\\]|[`*_{}\[\]()#+!~$]|\s+")


def markdown(report: Report) -> str:
    """The whole text: a heading, the gates, and the numbers of the proof or the error."""
    blocks = [f"### {_verdict(report)}: {escaped(report.recipe)} on {escaped(report.model)}"]
    if report.fault is not None:
        told = f"{report.fault.what} {report.fault.hint}".strip()
        return "\n\n".join([*blocks, escaped(told)]) + "\n"
    if report.verdicts:
        rows = [HEADS, *(verdict.cells() for verdict in report.verdicts)]
        lines = [_row([escaped(cell) for cell in row]) for row in rows]
        lines.insert(1, _row([":---", *["---:"] * (len(HEADS) - 2), ":---"]))
        blocks.append("\n".join(lines))
    return "\n\n".join([*blocks, *map(escaped, report.lines)]) + "\n"


def _verdict(report: Report) -> str:
    if report.fault is not None:
        return "kvtune could not measure"
    if not report.verdicts:
        return "kvtune measured"
    return "kvtune gates failed" if report.failed else "kvtune gates passed"


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def escaped(text: str) -> str:
    """A text that Markdown and HTML show as it is, on one line."""
    return _SPECIAL.sub(lambda found: _escape(found[0]), text.strip())


def _escape(found: str) -> str:
    return " " if found.isspace() else _ENTITIES.get(found, f"\\{found}")
