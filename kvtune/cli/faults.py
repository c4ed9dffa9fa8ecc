"""What an exception means to a user: its words, the next command and the exit code."""

import errno
from dataclasses import asdict, dataclass
from typing import Any

from kvtune.errors import KvtuneError, ResourceError

INTERRUPTED = 130
USAGE = 2
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})


@dataclass(frozen=True)
class Fault:
    """An error as it stands in `--json`."""

    type: str
    what: str
    hint: str
    exit_code: int

    def table(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def fault(error: BaseException, resume: str = "") -> Fault:
    """Puts an exception into words; `resume` is the command that goes on after an interruption."""
    name = type(error).__name__
    if isinstance(error, KvtuneError):
        return Fault(name, error.what, error.hint, error.exit_code)
    if isinstance(error, KeyboardInterrupt):
        hint = f"To go on, run: {resume}" if resume else ""
        said = "Interrupted; what was finished is saved." if resume else "Interrupted."
        return Fault("Interrupted", said, hint, INTERRUPTED)
    # typer's own errors are of another class in each version, but all of them have this method
    if words := getattr(error, "format_message", None):
        return Fault(
            "UsageError", words(), "See: kvtune --help", getattr(error, "exit_code", USAGE)
        )
    if what := _exhausted(error):
        return Fault("ResourceError", *what, ResourceError.exit_code)
    first = (str(error).strip().splitlines() or ["no message"])[0]
    return Fault(name, f"{name}: {first}", "For the traceback, run again with --debug.", 1)


def _exhausted(error: BaseException) -> tuple[str, str] | None:
    """Returns words and a cure when memory or disk ran out."""
    if isinstance(error, OSError) and error.errno in _FULL:
        return "The disk is full.", "Free some space, or give -o on another disk."
    text = str(error).lower()
    # torch's own class would have to be imported to be named
    gone = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    if gone or (isinstance(error, RuntimeError) and "can't allocate memory" in text):
        return "Out of memory.", "Give fewer --sequences, a shorter --context, or --device cpu."
    return None
