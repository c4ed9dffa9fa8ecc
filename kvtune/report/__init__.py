"""Report: a run folder as one self-contained HTML page, and as text for a terminal."""

from typing import Any

from kvtune.report.folder import Run, read
from kvtune.report.page import page
from kvtune.report.terminal import view

__all__ = ["FILE", "Run", "found", "page", "read", "view"]

FILE = "report.html"


def found(run: Run) -> dict[str, Any]:
    """What a run folder holds, as plain values: counts, the chosen point, and what is missing."""
    chosen = run.chosen
    return {
        "folder": str(run.folder),
        "model": run.model,
        "points": len(run.summary.points) if run.summary else 0,
        "chosen": chosen.model_dump() if chosen else None,
        "cells": len(run.profile.cells) if run.profile else 0,
        "trials": len(run.trials.rows) if run.trials else 0,
        "scores": [one.recipe for one in run.scores],
        "missing": [
            {"part": own.part, "command": own.command} for own in run.missing(str(run.folder))
        ],
    }
