"""Errors of gradstore, and the exit code of each failure.

Every error a user can cause is a `StoreError` whose message names the value, the limit and the next
step; the command line prints that message alone and exits with `exit_code`.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, SupportsIndex


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
        """Store `differences`, one line per differing field, beside the full message."""
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


def expect(fits: bool, what: str, value: object, wanted: str) -> None:
    """Raise BadInput, which says what is wanted, unless an argument fits."""
    if not fits:
        plain = isinstance(value, str | int | float | None)
        shown = repr(value) if plain else f"of type {type(value).__name__}"
        raise BadInput(f"{what} is {shown}; give {wanted}.")


def expect_whole(value: object, what: str, least: int | None = 1) -> int:
    """Return a whole number, of at least `least`; raise BadInput for another value."""
    wanted = "a whole number" + ("" if least is None else f" of at least {least}")
    if isinstance(value, bool) or not isinstance(value, SupportsIndex):
        expect(False, what, value, wanted)
        raise AssertionError
    number = operator.index(value)
    expect(least is None or number >= least, what, number, wanted)
    return number


def expect_path(value: object, what: str) -> None:
    """Raise BadInput unless an argument is a path."""
    expect(isinstance(value, str | os.PathLike), what, value, "a path")


@dataclass(frozen=True)
class Fault:
    """One thing on disk that is not as it was committed.

    Attributes:
        file: path relative to the store.
        expected: what the commit promises.
        found: what the disk holds.
    """

    file: str
    expected: str
    found: str

    def __str__(self) -> str:
        return f"{self.file}: expected {self.expected}, found {self.found}"


class DamagedFile(DamagedData):
    """A file whose bytes are not the committed ones; carries the `Fault`."""

    def __init__(self, fault: Fault, store: str = "") -> None:
        """Build the message from the fault, the store where it is known, and the next steps."""
        where = f' in store "{store}"' if store else ""
        super().__init__(
            f"damaged data{where}: {fault}. `dataflex-cli gradstore verify` lists every fault, "
            "`gradstore repair` puts back what it can; else restore the store from a copy, or "
            "start another with gradstore=PATH"
        )
        self.fault = fault


class TooLarge(DamagedFile):
    """A document above the most that is read whole; others may have written it, so it stays."""

    def __init__(self, fault: Fault, store: str = "") -> None:
        """Build the message from the fault, the store, and the way out."""
        StoreError.__init__(
            self,
            f'{fault.file} of store "{store}" has {fault.found}, and {fault.expected} are read of '
            "a document. It is left as it is. If it is a plan, its rows are too many for one "
            "store: split them over several, each with gradstore=PATH of its own",
        )
        self.fault = fault
