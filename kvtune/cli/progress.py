"""Progress on stderr, bars on a terminal and else plain lines; and the time of each stage."""

import os
import time
from types import FrameType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from kvtune.cli.amounts import clock

EVERY = 10.0  # seconds between two plain lines of one stage
PATIENT = "trials"  # the stage whose steps are worth finishing after Ctrl-C
WAITING = b"\nThis trial is finished first; interrupt again to stop at once.\n"


class Stages:
    """Shows what `say(stage, done, total)` reports, and times it."""

    def __init__(self, console: Console, quiet: bool) -> None:
        self.seconds: dict[str, float] = {}
        self._console, self._quiet = console, quiet
        self._bars: Progress | None = None
        self._tasks: dict[str, TaskID] = {}
        self._stage, self._left = "", 0
        self._last = self._said = time.monotonic()
        self._first = (self._last, 0)  # when the stage's first report came, and how much was done
        self._stopping = False

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Takes one report; done = 0 opens a stage.

        Raises:
            KeyboardInterrupt: a step that was to be finished first is done.
        """
        now = time.monotonic()
        if done:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self._last
        if opens := stage != self._stage:
            self._first = (now, done)
        self._last, self._stage, self._left = now, stage, total - done
        if not self._quiet:
            self._show(stage, done, total, opens)
        if self._stopping:
            raise KeyboardInterrupt

    def close(self) -> None:
        """Leaves the bars as they are."""
        if self._bars is not None:
            self._bars.stop()
            self._bars = None

    def interrupted(self, number: int, frame: FrameType | None) -> None:
        """Handles Ctrl-C and SIGTERM: a trial that runs is finished first, anything else stops."""
        if self._stopping or self._stage != PATIENT or not self._left:
            raise KeyboardInterrupt
        self._stopping = True
        os.write(2, WAITING)  # a handler must not wait for a console that another line holds

    def _show(self, stage: str, done: int, total: int, opens: bool) -> None:
        if self._console.is_terminal:
            self._bar(stage, done, total)
        elif opens or (total > 1 and self._last - self._said >= EVERY):
            self._said = self._last
            self._console.print(self._line(stage, done, total), highlight=False)

    def _line(self, stage: str, done: int, total: int) -> str:
        if done == 0 or total == 1:
            return stage
        began, already = self._first
        if done == already:  # the first step may hold work that the others do not repeat
            return f"{stage} {done}/{total}"
        left = (self._last - began) / (done - already) * (total - done)
        return f"{stage} {done}/{total}, {clock(left)} left"

    def _bar(self, stage: str, done: int, total: int) -> None:
        if self._bars is None:
            self._bars = _bars(self._console)
            self._bars.start()
        if stage not in self._tasks:
            self._tasks[stage] = self._bars.add_task(stage, total=None)
        counted = total if done or total > 1 else None  # one step has no share to show
        self._bars.update(self._tasks[stage], completed=done, total=counted)


def _bars(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    )
