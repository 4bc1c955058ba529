"""Build a store in this process, which ends by SIGKILL before a change: ADDRESS CHANGE [worker]."""

from __future__ import annotations

import os
import runpy
import signal
import sys
from pathlib import Path

from gradstore.storage.leases import Worker
from gradstore.storage.location import location
from gradstore.storage.objects import ObjectFiles

HERE = Path(__file__).parent


def main(address: str, where: str, *shared: str) -> None:
    """Build, and die."""
    kit = runpy.run_path(str(HERE.parent / "conftest.py"))["StoreKit"]()
    build = runpy.run_path(str(HERE / "conftest.py"))["Build"](kit)

    def at(operation: str, path: Path) -> None:
        if f"{operation} {path}" == where:
            os.kill(os.getpid(), signal.SIGKILL)

    files = ObjectFiles(location(address), at)  # type: ignore[arg-type]
    build.run(address, Worker(1, 2) if shared else None, files=files)


if __name__ == "__main__":
    main(*sys.argv[1:])
