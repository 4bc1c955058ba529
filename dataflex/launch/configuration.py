"""From a file to a configuration whose names and inputs exist: what needs no heavy import."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dataflex.bridge import arguments
from dataflex.config.keys import RunConfig, load
from dataflex.launch.inputs import check_inputs
from dataflex.launch.packages import check_packages


def read(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a configuration; check keys, values, component, packages, model, data sets, folders.

    Nothing heavy is imported: an answer takes a second, where the strategies (torch) and
    LlamaFactory (transformers) take ten.

    Args:
        path: a YAML or JSON file.
        overrides: `key=value`, as on the command line.

    Raises:
        BadInput: every fault of the first of these kinds that has one.
        StoreIOError: a folder to write to is read-only.
    """
    config = load(path, overrides, arguments.accepted_keys())
    config.check_names()
    check_packages(config.llamafactory)
    check_inputs(config)
    return config
