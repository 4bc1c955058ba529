"""LlamaFactory's page, LlamaBoard, whose trainings know DataFlex.

The page starts `llamafactory-cli train FILE` by that name. While it is open, a private folder in
front of its own PATH holds a script so called, which comes here with the file: one that has keys of
DataFlex is trained on by `dataflex-cli train`, every other by LlamaFactory.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from omegaconf import DictConfig

from dataflex.bridge.running import passthrough
from dataflex.config.documents import read_settings
from dataflex.config.keys import DataFlexConfig
from gradstore.errors import StoreIOError

#: The command that the page starts.
COMMAND = "llamafactory-cli"


def open_page() -> None:
    """Run the page until it is closed.

    Raises:
        StoreIOError: the folder of temporary files cannot hold a script that runs.
    """
    with own_command():
        passthrough(["webui"])


@contextmanager
def own_command() -> Iterator[None]:
    """Give the processes that this one starts a `llamafactory-cli` that leads to `main`.

    Raises:
        StoreIOError: the folder of temporary files cannot hold a script that runs.
    """
    before = os.environ.get("PATH", os.defpath)
    with tempfile.TemporaryDirectory(prefix="dataflex-webui-") as folder:
        script = Path(folder) / COMMAND
        python = shlex.quote(sys.executable)
        # -P: a folder called dataflex where the page was started is not this package.
        script.write_text(f'#!/bin/sh\nexec {python} -P -m {__name__} "$@"\n', encoding="utf-8")
        script.chmod(0o700)
        os.environ["PATH"] = f"{folder}{os.pathsep}{before}"
        try:
            if shutil.which(COMMAND) != str(script):
                raise StoreIOError(
                    f"{folder} cannot hold a program that runs, so the page could not train with "
                    "DataFlex. Set TMPDIR to a folder that is not mounted noexec."
                )
            yield
        finally:
            os.environ["PATH"] = before


def main(arguments: Sequence[str]) -> None:
    """Run what the page started: the arguments of `llamafactory-cli`."""
    if len(arguments) == 2 and arguments[0] == "train" and asks_for_dataflex(Path(arguments[1])):
        # The same process, so that the page's button ends it; the page shows all that is logged.
        words = [sys.executable, "-P", "-m", "dataflex", "train", arguments[1], "--verbose"]
        os.execv(sys.executable, words)
    passthrough(arguments)


def asks_for_dataflex(path: Path) -> bool:
    """Answer whether a configuration has a key that only DataFlex knows."""
    given = read_settings(path)
    ours = DataFlexConfig.__dataclass_fields__.keys()
    return isinstance(given, DictConfig) and not ours.isdisjoint(given)


if __name__ == "__main__":
    main(sys.argv[1:])
