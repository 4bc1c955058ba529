"""One process of a run under torchrun: `python -m dataflex.launch.worker CONFIG key=value ...`."""

from __future__ import annotations

import atexit
import json
import os
import sys
import threading
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NoReturn

from dataflex.bridge.arguments import device_count
from dataflex.launch.configuration import read
from dataflex.launch.preflight import check
from dataflex.launch.train import FAILURES, run
from dataflex.run.messages import DEBUG, explain, set_up_logging, show_traceback


def worker(arguments: Sequence[str]) -> int:
    """Train as one process of torchrun; return its exit code."""
    path, overrides = Path(arguments[0]), list(arguments[1:])
    if not device_count():
        # accelerate would call the device "cpu:0", which torch.load restores no checkpoint to.
        os.environ.setdefault("ACCELERATE_TORCH_DEVICE", "cpu")
    try:
        config = read(path, overrides)
        run(config, check(config))
    except (Exception, KeyboardInterrupt) as error:
        failure = explain(error)
        if failure is None:
            raise
        if DEBUG in os.environ:
            show_traceback(type(error), error, error.__traceback__)
        if FAILURES in os.environ:
            path = Path(os.environ[FAILURES]) / f"{int(os.environ.get('RANK', '0'))}.json"
            path.write_text(json.dumps(asdict(failure)), encoding="utf-8")
        return failure.code
    return 0


def leave(code: int) -> NoReturn:
    """End this process as multiprocessing ends a child: the interpreter is not taken down.

    Threads of torch's process groups can outlive them. One that asks for an interpreter on its way
    out aborts the process, and a run that has saved everything ends with exit code -6.
    """
    threading._shutdown()  # type: ignore[attr-defined]  # as at every exit, before the handlers
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    set_up_logging()
    leave(worker(sys.argv[1:]))
