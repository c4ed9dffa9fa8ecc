"""Amounts as people write and read them: 32k tokens, 10m of time, 2 %, 45.3 MB."""

import re

import typer

_TOKENS = re.compile(r"(\d+(?:\.\d+)?)([kKmM]?)")
_TIME = re.compile(r"(\d+(?:\.\d+)?)(s|m|h|d|)")
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(b|kb|mb|gb|tb|kib|mib|gib|tib|)")
_UNITS = {"": 1, "b": 1} | {
    f"{letter}{kind}": base**power
    for power, letter in enumerate("kmgt", 1)
    for kind, base in (("b", 1000), ("ib", 1024))
}
_SHORT = re.compile(r"(\d+(?:\.\d+)?)\s*(us|ms|s|)")
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


def size_of(text: str) -> int:
    """Reads 20MB, 1.5GiB or plain bytes."""
    found = _SIZE.fullmatch(str(text).strip().lower())
    count = round(float(found[1]) * _UNITS[found[2]]) if found else 0
    if count < 1:
        raise typer.BadParameter(f"{text!r} is no size; write 20MB, 1.5GiB or bytes.")
    return count


def microseconds(text: str) -> float:
    """Reads 900us, 1.5ms, or plain microseconds."""
    found = _SHORT.fullmatch(str(text).strip().lower())
    if not found or not float(found[1]):
        raise typer.BadParameter(f"{text!r} is no time of a step; write 900us or 1.5ms.")
    return float(found[1]) * {"": 1, "us": 1, "ms": 1e3, "s": 1e6}[found[2]]


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
