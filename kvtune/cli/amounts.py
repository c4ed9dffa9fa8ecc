"""Amounts as people write and read them: 32k tokens, 10m of time, 2 %, 45.3 MB."""

import re

import typer

_TOKENS = re.compile(r"(\d+(?:\.\d+)?)([kKmM]?)")
_TIME = re.compile(r"(\d+(?:\.\d+)?)(s|m|h|d|)")
_SECONDS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}


def tokens(text: str) -> int:
    """Reads 512, 32k (= 32768) or 1m tokens."""
    found = _TOKENS.fullmatch(str(text).strip())
    scale = {"": 1, "k": 1024, "m": 1024**2}[found[2].lower()] if found else 0
    count = float(found[1]) * scale if found else 0.0
    if count < 1 or count != int(count):
        raise typer.BadParameter(f"{text!r} is no number of tokens; write 512 or 32k.")
    return int(count)


def duration(text: str) -> float:
    """Reads 90s, 10m, 1h or plain seconds."""
    found = _TIME.fullmatch(str(text).strip().lower())
    if not found or not float(found[1]):
        raise typer.BadParameter(f"{text!r} is no time; write 90s, 10m or 1h.")
    return float(found[1]) * _SECONDS[found[2]]


def share(text: str) -> float:
    """Reads 2% or 0.02."""
    bare = str(text).strip()
    try:
        value = float(bare.removesuffix("%")) / (100 if bare.endswith("%") else 1)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise typer.BadParameter(f"{text!r} is no share; write 2% or 0.02.")
    return value


def size(count: float) -> str:
    """Writes bytes in the largest unit that leaves a whole part: 45.3 MB, in powers of 1000."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def clock(seconds: float) -> str:
    """Writes a time: 0.4 s, 42 s, 3 min 20 s, 1 h 5 min."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
