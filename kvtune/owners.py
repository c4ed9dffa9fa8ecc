"""The name of a worker: machine, process and its start, so that its death shows on that machine."""

from __future__ import annotations

import os
import platform
import secrets
from pathlib import Path

UNKNOWN = "-"  # where /proc is missing: a death then shows when the lease is over
DEAD = "ZX"  # states of a process that has ended and is not reaped yet


def token() -> str:
    """Returns a name that no other worker has, on any machine: four words."""
    pid = os.getpid()
    return f"{_machine()} {pid} {_began(pid)} {secrets.token_hex(4)}"


def gone(owner: str) -> bool:
    """Tells whether a worker is known to be dead; one on another machine never is."""
    machine, pid, began, _ = owner.rsplit(" ", 3)
    return began != UNKNOWN and machine == _machine() and began != _began(int(pid))


def _machine() -> str:
    """Names what its process numbers are unique in: a container counts its own."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{platform.node()}/{boot}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return platform.node() or UNKNOWN


def _began(pid: int) -> str:
    """Returns when a process began, in clock ticks since the machine did."""
    try:
        # the second field is the command's name in brackets, which may hold anything
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return UNKNOWN
    return UNKNOWN if fields[0] in DEAD else fields[19]
