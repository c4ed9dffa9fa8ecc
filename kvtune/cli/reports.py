"""The files that a CI system reads: JUnit XML and a Markdown summary, whatever happens."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from kvtune.cli.faults import fault
from kvtune.cli.junit import junit
from kvtune.cli.markdown import markdown
from kvtune.cli.output import Output
from kvtune.cli.verdicts import Report
from kvtune.errors import GateError, KvtuneError, UsageError
from kvtune.files import write_atomic

PANEL = "CI"
STEP = "GITHUB_STEP_SUMMARY"  # where GitHub Actions wants a step's Markdown


@dataclass(frozen=True)
class Reports:
    """Where a proof is reported, beside stdout."""

    junit: Annotated[
        Path | None,
        typer.Option(metavar="FILE", rich_help_panel=PANEL, help="Write JUnit XML, a case a gate."),
    ] = None
    summary: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            rich_help_panel=PANEL,
            help=f"Write a Markdown table; - adds it to the file that ${STEP} names.",
        ),
    ] = None

    def any(self) -> bool:
        """Whether there is a file to write."""
        return self.junit is not None or self.summary is not None

    def check(self) -> None:
        """Refuses, before anything is measured, a place that cannot be written.

        Raises:
            UsageError: a folder, or no summary of a step outside of GitHub Actions.
        """
        if self.summary == "-" and not os.environ.get(STEP):
            what = f"--summary - is for GitHub Actions, which sets ${STEP}; it is not set here."
            raise UsageError(what, "Give --summary FILE.")
        for option, file in (("--junit", self.junit), ("--summary", self._place())):
            if file is not None and file.is_dir():
                raise UsageError(f"{option} {file} is a folder.", "Give the name of a file.")

    def _place(self) -> Path | None:
        if self.summary == "-":
            return Path(os.environ[STEP]) if os.environ.get(STEP) else None
        return Path(self.summary) if self.summary else None

    def write(self, report: Report) -> None:
        """Writes both files; errors as `files.write_atomic`."""
        if self.junit is not None:
            write_atomic(self.junit, junit(report))
        if (place := self._place()) is not None:
            # a step's file may hold what earlier commands of the step said
            appends = self.summary == "-" and place.is_file()
            before = place.read_bytes() + b"\n" if appends and place.stat().st_size else b""
            write_atomic(place, before + markdown(report).encode())


@contextmanager
def reported(out: Output, files: Reports, recipe: str, model: str) -> Iterator[Report]:
    """Hands out a report to fill, and writes it when the work is done, failed or was stopped."""
    report, began = Report(recipe, model), time.monotonic()
    try:
        files.check()
        yield report
    except BaseException as error:
        # a missed gate is a measurement, anything else is none
        report.fault = None if isinstance(error, GateError) else fault(error)
        report.seconds = time.monotonic() - began
        try:
            files.write(report)
        except (KvtuneError, OSError) as second:
            out.warn(str(second))  # the first error is the one to end with
        raise
    report.seconds = time.monotonic() - began
    files.write(report)
