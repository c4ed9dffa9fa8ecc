"""What a verb prints: results on stdout, all else on stderr, or one object with --json."""

import json
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import typer
from rich.console import Console, RenderableType

from kvtune.cli.faults import Fault, fault
from kvtune.cli.options import Manners
from kvtune.cli.progress import Stages

WIDE = 160  # columns of a table that goes into a file or a pipe


@dataclass
class Output:
    """One call of a verb: what it found, in `data`, and how it speaks."""

    verb: str
    manners: Manners
    data: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    resume: str = ""  # the command that goes on after an interruption

    def __post_init__(self) -> None:
        self.errors = Console(stderr=True, soft_wrap=True)
        self.say = Stages(self.errors, self.manners.quiet)

    def print(self, *things: RenderableType) -> None:
        """Prints results for people."""
        if self.manners.json:
            return
        self.say.close()
        console = Console(width=None if sys.stdout.isatty() else WIDE)
        for thing in things:
            # text must come out as it is; only tables are laid out
            plain = isinstance(thing, str)
            console.print(thing, markup=False, highlight=False, soft_wrap=plain)

    def note(self, text: str) -> None:
        """Says something on the way, on stderr."""
        if not self.manners.quiet:
            self.say.close()
            self.errors.print(text, markup=False, highlight=False)

    def warn(self, text: str) -> None:
        """Says something that the user should know, once."""
        if text in self.warnings:
            return
        self.warnings.append(text)
        if not self.manners.json:
            self.say.close()
            self.errors.print(f"Warning: {text}", markup=False, highlight=False)

    def end(self, failed: Fault | None) -> None:
        """Prints the error, or with --json the one object."""
        self.say.close()
        if self.manners.json:
            print(envelope(self.verb, self.data, self.warnings, failed))
        elif failed:
            complain(failed)


def envelope(verb: str, data: dict[str, Any], said: list[str], failed: Fault | None) -> str:
    """The one object of --json, in a text without NaN."""
    whole = {
        "schema": f"kvtune.{verb}/1",
        "ok": failed is None,
        "data": data,
        "warnings": said,
        "error": failed.table() if failed else None,
    }
    return json.dumps(whole, indent=1, allow_nan=False)


def complain(failed: Fault) -> None:
    """Prints an error and its cure on stderr."""
    console = Console(stderr=True, soft_wrap=True)
    console.print(f"Error: {failed.what}", markup=False, highlight=False, style="bold red")
    if failed.hint:
        console.print(failed.hint, markup=False, highlight=False)


def perform(verb: str, manners: Manners, work: Callable[[Output], None]) -> int:
    """Does a verb's work; returns the exit code, whatever happens."""
    out = Output(verb, manners)
    failed = None
    try:
        with _stoppable(out), _listening(out):
            work(out)
    except (typer.Exit, SystemExit, BrokenPipeError):
        raise  # rich exits by itself when nobody reads any more; the front door sees to the rest
    except BaseException as error:
        failed = fault(error, out.resume)
        if manners.debug:
            traceback.print_exc()
    out.end(failed)
    return failed.exit_code if failed else 0


@contextmanager
def _stoppable(out: Output) -> Iterator[None]:
    """Ctrl-C and SIGTERM end a verb in good order."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, out.say.interrupted) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


@contextmanager
def _listening(out: Output) -> Iterator[None]:
    """Python's warnings become ours when kvtune gave them; others are shown with -v only."""

    def heard(message: Any, category: Any, filename: str, *rest: Any, **more: Any) -> None:
        if "kvtune" in filename or out.manners.verbose:
            out.warn(str(message))

    with warnings.catch_warnings():
        warnings.simplefilter("default")
        warnings.showwarning = heard
        yield
