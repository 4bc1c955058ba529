"""One process of a run under torchrun: `python -m dataflex.launch.worker CONFIG key=value ...`."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

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


if __name__ == "__main__":
    set_up_logging()
    sys.exit(worker(sys.argv[1:]))
