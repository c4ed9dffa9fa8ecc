"""Laws of kvtune/files.py: a path holds the old or the new file, whatever happens."""

import errno
import hashlib
import json
import os
import random
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import NoReturn

import pytest

from kvtune import files
from kvtune.errors import MissingInputError, ResourceError, UsageError

WRITER = """
import itertools, sys
from pathlib import Path
from kvtune.files import write_atomic
for number in itertools.count():
    write_atomic(Path(sys.argv[1]), b"%d\\n" % number * 20_000)
"""

LIMITED = """
import resource, sys
from pathlib import Path
from kvtune.errors import ResourceError
from kvtune.files import write_atomic
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    write_atomic(Path(sys.argv[1]), b"new" * 4096)
except ResourceError as error:
    print(error)
"""


def strays(folder: Path) -> list[Path]:
    return list(folder.glob(f"*{files.SUFFIX}"))


def fail(error: BaseException) -> object:
    def raiser(*_: object) -> NoReturn:
        raise error

    return raiser


def test_a_written_file_holds_its_bytes_and_nothing_else_is_left(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "a.bin"
    for data in (b"old", b"", b"x" * 1_000_000):
        files.write_atomic(path, data)
        assert path.read_bytes() == data
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_the_mode_follows_the_umask(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        files.write_atomic(tmp_path / "a", b"1")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o666 & ~mask


def test_a_link_stays_and_its_target_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "far" / "target")
    for data in (b"through a dangling link", b"again"):
        files.write_atomic(link, data)
        assert link.is_symlink()
        assert (tmp_path / "far" / "target").read_bytes() == data


@pytest.mark.parametrize("step", ["fsync", "replace"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_keeps_the_old_file_and_says_what_is_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, number: int
) -> None:
    path = tmp_path / "a"
    files.write_atomic(path, b"old")
    monkeypatch.setattr(os, step, fail(OSError(number, os.strerror(number))))
    with pytest.raises(ResourceError, match=r"a could not be written: 12345 bytes.*Free"):
        files.write_atomic(path, b"n" * 12345)
    assert path.read_bytes() == b"old"
    assert not strays(tmp_path)


def test_a_real_limit_on_size_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a"
    files.write_atomic(path, b"old")
    command = [sys.executable, "-c", LIMITED, str(path)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "12288 bytes are needed" in said
    assert path.read_bytes() == b"old"
    assert not strays(tmp_path)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.EIO, "broken")])
def test_any_other_failure_passes_and_leaves_no_temporary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    monkeypatch.setattr(os, "fsync", fail(error))
    with pytest.raises(type(error)) as caught:
        files.write_atomic(tmp_path / "a", b"new")
    assert caught.value is error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS])
def test_a_place_that_may_not_be_written_is_a_usage_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setattr(os, "open", fail(OSError(number, os.strerror(number))))
    with pytest.raises(UsageError, match="could not be written"):
        files.write_atomic(tmp_path / "a", b"new")


def test_a_folder_or_a_device_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"")
    for path in (tmp_path, Path(os.devnull)):
        with pytest.raises(UsageError, match="not a regular file"):
            files.write_atomic(path, b"new")
    with pytest.raises(UsageError, match="could not be written"):
        files.write_atomic(tmp_path / "a" / "under a file", b"new")
    assert not Path(os.devnull).is_file()


def test_a_writer_killed_at_any_moment_leaves_a_whole_file(tmp_path: Path) -> None:
    path, chance = tmp_path / "a", random.Random(0)
    files.write_atomic(path, b"start\n" * 20_000)
    for _ in range(6):
        writer = subprocess.Popen([sys.executable, "-c", WRITER, str(path)])
        before = path.stat().st_mtime_ns
        while path.stat().st_mtime_ns == before and writer.poll() is None:
            time.sleep(0.001)
        time.sleep(chance.random() * 0.02)
        writer.send_signal(signal.SIGKILL)
        assert writer.wait() == -signal.SIGKILL
        lines = path.read_bytes().split(b"\n")
        assert len(lines) == 20_001 and len(set(lines[:-1])) == 1 and lines[-1] == b""
    files.sweep(tmp_path)
    assert list(tmp_path.iterdir()) == [path]


def test_sweep_takes_what_nobody_will_finish_and_nothing_else(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as dead:
        dead.wait()
    host = files._HOST
    kept = [f"{host}-{os.getpid()}-0a{files.SUFFIX}", f"elsewhere-1-0a{files.SUFFIX}", "a.toml"]
    gone = [f"{host}-{dead.pid}-0a{files.SUFFIX}", f"old-elsewhere-1-0a{files.SUFFIX}"]
    for name in kept + gone:
        (tmp_path / name).write_bytes(b"")
    long_ago = time.time() - files.STALE_SECONDS - 60
    os.utime(tmp_path / gone[1], (long_ago, long_ago))
    os.utime(tmp_path / kept[0], (long_ago, long_ago))
    files.sweep(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(kept)


def test_both_hashes_are_the_sha256_of_the_bytes(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    expected = hashlib.sha256(b"abc").hexdigest()
    assert files.sha256(tmp_path / "a") == files.sha256_bytes(b"abc") == expected
    for missing in (tmp_path / "b", tmp_path, tmp_path / "a" / "b"):
        with pytest.raises(MissingInputError):
            files.sha256(missing)


def test_equal_values_have_one_json_text() -> None:
    text = files.canonical_json({"b": [1, 2.5, None], "a": "é"})
    assert text == r'{"a":"\u00e9","b":[1,2.5,null]}'
    assert files.canonical_json(json.loads(text)) == text
    with pytest.raises(ValueError, match="JSON"):
        files.canonical_json({"a": float("nan")})


def test_the_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("KVTUNE_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/home/someone")
    assert files.cache_home() == Path("/home/someone/.cache/kvtune")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert files.cache_home() == Path("/home/someone/.cache/kvtune")
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/big")
    assert files.cache_home() == Path("/var/big/kvtune")
    monkeypatch.setenv("KVTUNE_HOME", "~/own")
    assert files.cache_home() == Path("/home/someone/own")
