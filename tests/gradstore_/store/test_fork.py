"""A forked worker does not hold the lock of its parent."""

from __future__ import annotations

import os
from pathlib import Path

from gradstore.storage.local import StoreFiles
from gradstore.storage.lock import WriterLock


def test_a_forked_child_lets_go_of_the_lock(tmp_path: Path) -> None:
    held = WriterLock(StoreFiles(tmp_path))
    held.acquire()
    (go, release), (ready, tell) = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:  # a data-loader worker that outlives its parent
        os.write(tell, b"x")
        os.read(go, 1)
        os._exit(0)
    try:
        os.read(ready, 1)
        assert held._fd is not None
        os.close(held._fd)  # what the kernel does for a parent that is killed
        held._fd = None
        with WriterLock(StoreFiles(tmp_path)):
            pass
    finally:
        os.write(release, b"x")
        os.waitpid(child, 0)
        for end in (go, release, ready, tell):
            os.close(end)
