"""What can go wrong, and the exit code each failure ends with.

Every error a user can cause is a `StoreError` whose message names the value, the limit and the next
step; the command line prints that message alone and exits with `exit_code`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar


class StoreError(Exception):
    """Base of all failures that are the user's or the disk's, not a bug."""

    exit_code: ClassVar[int] = 1


class BadInput(StoreError):
    """An argument, a data set or a configuration that cannot be worked with."""

    exit_code = 2


class ProvenanceMismatch(StoreError):
    """Features that must not be compared were about to be."""

    exit_code = 3

    def __init__(self, message: str, differences: Sequence[str] = ()) -> None:
        """Keeps `differences`, one line per differing field, beside the full message."""
        super().__init__(message)
        self.differences = tuple(differences)


class DamagedData(StoreError):
    """Bytes on disk are not the bytes that were committed."""

    exit_code = 4


class StoreIOError(StoreError):
    """The disk is full, read-only, or not ours to write."""

    exit_code = 5


class StoreBusy(StoreError):
    """Another process is writing to this store."""

    exit_code = 6
