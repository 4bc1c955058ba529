"""How a worker's process ends: with its own exit code, all that was promised done."""

from __future__ import annotations

import subprocess
import sys

ENDING = """
import atexit, os, sys, threading, time
from dataflex.launch.worker import leave

class Late:
    def __del__(self, abort=os.abort):
        abort()  # as a library's thread does that needs an interpreter on its way out

late = Late()
atexit.register(print, "handler")
threading.Thread(target=lambda: (time.sleep(0.5), print("thread", end=" "))).start()
leave(3)
"""


def test_threads_and_handlers_are_done_and_nothing_is_taken_down() -> None:
    ended = subprocess.run([sys.executable, "-c", ENDING], capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (3, "thread handler\n"), ended.stderr
