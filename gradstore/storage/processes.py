"""A process by a name that no later one has, and whether this kernel still runs it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

_BOOT = Path("/proc/sys/kernel/random/boot_id")


def boot_id() -> str:
    """Name the running kernel; "" where it has no name."""
    try:
        return _BOOT.read_text(encoding="ascii").strip()
    except OSError:
        return ""


@dataclass(frozen=True)
class Process:
    """A process of any machine.

    Attributes:
        machine: the kernel and the table of processes that it is in, since containers have tables
            of their own; "" where the kernel does not say.
        pid: its number in that table.
        started: when it began, as the kernel counts: a number is given again.
    """

    machine: str
    pid: int
    started: str

    @classmethod
    def this(cls) -> Process:
        """Name the running process."""
        return cls(_machine(), os.getpid(), _started(os.getpid()))

    def lives(self) -> bool | None:
        """Tell whether it runs; None where this kernel can't know."""
        if not self.machine or not self.started or self.machine != _machine():
            return None
        return _started(self.pid) == self.started


def _machine() -> str:
    try:
        table = os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""
    boot = boot_id()
    return f"{boot} {table}" if boot else ""


def _started(pid: int) -> str:
    """Return when a process began; "" for one that is none, or has ended and is not cleared up."""
    try:
        line = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    fields = line.rpartition(")")[2].split()  # the name before it may hold anything
    return "" if fields[0] in "ZX" else fields[19]
