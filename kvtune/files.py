"""Whole files or none: atomic writes, hashes, canonical JSON and the cache folder."""

import errno
import hashlib
import json
import os
import re
import socket
import sys
import time
from contextlib import suppress
from pathlib import Path
from secrets import token_hex

from kvtune.errors import KvtuneError, MissingInputError, ResourceError, UsageError

SUFFIX = ".kvtune-tmp"
STALE_SECONDS = 24 * 3600.0

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_REFUSED = frozenset(
    {
        errno.EACCES,
        errno.EPERM,
        errno.EROFS,
        errno.EEXIST,
        errno.EISDIR,
        errno.ENOTDIR,
        errno.ELOOP,
        errno.ENAMETOOLONG,
    }
)
# Windows alone would change line ends in what it takes for text
_BINARY: int = getattr(os, "O_BINARY", 0)
_HOST = re.sub(r"[^A-Za-z0-9]", "_", socket.gethostname())[:64]


def write_atomic(path: Path, data: bytes) -> None:
    """Writes a file that holds, at any moment and after any crash, its old or its new bytes.

    A missing folder is made. A symbolic link is followed, so the link itself stays.

    Args:
        path: the file to make or replace; its mode becomes 0666 less the umask.
        data: all its bytes.

    Raises:
        ResourceError: the disk or the quota is full.
        UsageError: the place cannot be written, or is not a regular file.
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file():
        raise UsageError(f"{path} is not a regular file.", "Give another name.")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _replace(target, data)
    except OSError as error:
        if (told := _explain(error, path, len(data))) is None:
            raise
        raise told from error


def _replace(target: Path, data: bytes) -> None:
    """Writes beside the target, then renames over it; leaves no temporary behind."""
    temporary = target.parent / f"{_HOST}-{os.getpid()}-{token_hex(8)}{SUFFIX}"
    try:
        # the system takes the umask from 0666 itself: reading the umask would mean setting it,
        # which another thread could see
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _BINARY, 0o666)
        with open(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    _sync_folder(target.parent)


def _sync_folder(folder: Path) -> None:
    """Makes a rename last through a power cut, where the system can open a folder."""
    if sys.platform == "win32":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        # some network file systems cannot sync a folder; the file itself is safe by now
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


def _explain(error: OSError, path: Path, size: int) -> KvtuneError | None:
    """Returns the error in a user's words, or None where we know no more than the system."""
    reason = (error.strerror or str(error)).lower()
    if error.errno in _FULL:
        what = f"{path} could not be written: {size} bytes are needed ({reason})."
        return ResourceError(what, "Free some space, or give a path on another disk.")
    if error.errno in _REFUSED:
        return UsageError(
            f"{path} could not be written: {reason}.", "Give a path that you may write to."
        )
    return None


def sweep(folder: Path) -> None:
    """Removes the temporaries that killed writers left in a folder.

    Those of living processes of this machine stay; those of other machines, whose processes
    cannot be seen from here, go after a day.
    """
    for stray in folder.glob(f"*{SUFFIX}"):
        with suppress(OSError):
            if _abandoned(stray):
                stray.unlink()


def _abandoned(stray: Path) -> bool:
    """Returns whether nobody will finish this temporary."""
    owner = re.fullmatch(rf"{_HOST}-(\d+)-[0-9a-f]+{re.escape(SUFFIX)}", stray.name)
    if owner and sys.platform != "win32":
        return not _alive(int(owner[1]))
    return time.time() - stray.stat().st_mtime > STALE_SECONDS


def _alive(process: int) -> bool:
    """Returns whether a process of this machine runs (never asked on Windows: it would kill)."""
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def sha256(path: Path) -> str:
    """Returns the sha256 of a file, in 64 hex digits.

    Raises:
        MissingInputError: there is no such file.
    """
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise MissingInputError(f"There is no file {path}.") from error


def sha256_bytes(data: bytes) -> str:
    """Returns the sha256 of some bytes, in 64 hex digits."""
    return hashlib.sha256(data).hexdigest()


def canonical_json(obj: object) -> str:
    """Returns the one JSON text of a value: sorted keys, no spaces, ASCII only.

    Raises:
        ValueError: a number is not finite.
        TypeError: a value has no JSON form.
    """
    return json.dumps(
        obj, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False
    )


def cache_home() -> Path:
    """Returns the folder for what is kept between runs: $KVTUNE_HOME, or the user's cache."""
    if home := os.environ.get("KVTUNE_HOME"):
        return Path(home).expanduser()
    # a relative value is to be ignored, says the XDG base directory specification
    if (base := os.environ.get("XDG_CACHE_HOME")) and os.path.isabs(base):
        return Path(base) / "kvtune"
    return Path.home() / ".cache" / "kvtune"
