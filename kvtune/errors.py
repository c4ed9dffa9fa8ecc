"""The errors that users meet: what was wrong, where, the
value, the next command; each with its exit code."""

from difflib import get_close_matches
from typing import ClassVar


class KvtuneError(Exception):
    """Anything that kvtune refuses or fails at in words.

    Args:
        what: what was wrong, with the value.
        hint: the next command or the cure, shown on its own line.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, what: str, hint: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.what} {self.hint}".strip()


class UsageError(KvtuneError):
    """A wrong argument, name or setting."""

    exit_code = 2


class GateError(KvtuneError):
    """A recipe that was measured and missed a gate."""

    exit_code = 3


class IntegrityError(KvtuneError):
    """A file that is damaged, changed, too new, or meant for another model."""

    exit_code = 4


class UnsupportedError(KvtuneError):
    """A model, method or feature that kvtune does not support."""

    exit_code = 5


class ResourceError(KvtuneError):
    """Out of memory or disk."""

    exit_code = 6


class MissingInputError(KvtuneError):
    """A file, model or text that is not there, or cannot be fetched offline."""

    exit_code = 7


def suggest(name: str, known: tuple[str, ...]) -> str:
    """Returns a hint that names the nearest known word, or lists them all."""
    if close := get_close_matches(name, known, n=1, cutoff=0.5):
        return f"Did you mean {close[0]!r}?"
    return f"Known: {', '.join(known)}."
