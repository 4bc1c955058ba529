"""One interpreter of Triton's kernels for the files that ask one."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from interpreted import Interpreter


@pytest.fixture(scope="session")
def triton() -> Iterator[Interpreter]:
    place = Path(__file__).with_name("interpreted.py")
    found = importlib.util.spec_from_file_location("interpreted", place)
    assert found
    assert found.loader
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    process = module.Interpreter()
    yield process
    process.close()
