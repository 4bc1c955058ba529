"""How damage is told: which file, what was expected, what was found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gradstore.errors import DamagedData


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
        """Spells the fault out, with the way on when the store is known."""
        where = f' in store "{store}"' if store else ""
        super().__init__(
            f"damaged data{where}: {fault}. `dataflex-cli gradstore verify` lists every fault; "
            "restore the store from a copy, or start another with gradstore=PATH"
        )
        self.fault = fault


@dataclass(frozen=True)
class VerifyReport:
    """What a check of every byte found.

    Attributes:
        faults: every fault, in the order of the files checked.
        files: number of files checked.
        bytes: number of bytes read and hashed.
        generations: names of the committed generations that were checked.
        uncommitted: names of planned generations without a commit; not a fault.
    """

    faults: tuple[Fault, ...]
    files: int
    bytes: int
    generations: tuple[str, ...]
    uncommitted: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """True when nothing is damaged."""
        return not self.faults

    def raise_if_damaged(self) -> None:
        """Raises DamagedData (exit 4) that names every fault, if there is one."""
        if self.faults:
            raise DamagedData(_summary(self.faults))

    def to_dict(self) -> dict[str, object]:
        """Gives the report as plain JSON values, for `gradstore verify --json`."""
        return {
            "ok": self.ok,
            "files": self.files,
            "bytes": self.bytes,
            "generations": list(self.generations),
            "uncommitted": list(self.uncommitted),
            "faults": [vars(fault) for fault in self.faults],
        }


def _summary(faults: Sequence[Fault]) -> str:
    lines = "\n".join(f"  {fault}" for fault in faults)
    return f"{len(faults)} damaged file(s):\n{lines}"
