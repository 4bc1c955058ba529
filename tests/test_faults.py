"""Each fault that the store must withstand, and each promise of the README, has a test by name.

A test of fault 7 is called `test_fault_07_...`: so `pytest -k fault_07` shows what is said of it.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

#: Number -> what goes wrong, and what must happen then.
FAULTS = {
    1: "a gradient is not finite: the row says so and is left out; too many stop the export",
    2: "all labels of a row are masked: it is never selected",
    3: "a gradient is zero: the row says so; nothing is divided by it",
    4: "a row overflows its dtype: it has a scale of its own, and is never clipped",
    5: "a train or target set is empty or has no usable row: refused before the model is loaded",
    6: "k is no count, or more than there are usable rows: refused with both numbers",
    7: "equal rows are legitimate and counted; a plan that names a position twice is refused",
    8: "scores tie: the lower row is first, on every device",
    9: "rows of a data set changed: refused with their number and the first",
    10: "a data set is in another order: refused as that",
    11: "tokenizer, template, cutoff or projection changed: refused with every difference",
    12: "the same seed gives another random stream: refused by the canary",
    13: "Adam's moments are missing or of other shapes: refused, never plain gradients instead",
    14: "an optimizer's file would run code: not opened",
    15: "an older schema is read and migrated; a newer one is refused and nothing written",
    16: "kill -9 anywhere: what was committed is there, the rest is done again",
    17: "power loss: what was committed is there, what was not is set aside and done again",
    18: "two jobs on one store: the second is told who has it; past the lock one of them wins",
    19: "a dead writer's lock: taken over with a warning",
    20: "the disk is full: told with bytes needed and free; nothing committed is touched",
    21: "a chunk is cut, missing, empty, swapped, or has a flipped bit: reported, never filled in",
    22: "a commit or a unit's record was edited: the chain is broken",
    23: "an index is older than its commit, or damaged: built again, never searched",
    24: "a worker dies, or another number goes on: only unfinished units are done again",
    25: "the store is read-only: read as ever, and refused to a writer at once",
    26: "the file system lacks link, rename, fsync or flock: refused at creation",
    27: "a hostile store: names, symlinks, codecs and sizes are checked before an array is opened",
    28: "a clock jumps: none is asked for the truth",
}


def defined_in(path: Path) -> set[str]:
    """Names of the tests in a file."""
    found = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    return {node.name for node in found
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}  # fmt: skip


NAMES = {name for path in (ROOT / "tests").rglob("test_*.py") for name in defined_in(path)}


@pytest.mark.parametrize("number", FAULTS)
def test_each_fault_has_a_test_named_after_its_number(number: int) -> None:
    begins = f"test_fault_{number:02}_"
    assert [name for name in NAMES if name.startswith(begins)], f"no {begins}...: {FAULTS[number]}"


def test_no_test_is_named_after_a_fault_that_is_not_listed() -> None:
    named = [name for name in NAMES if re.match(r"test_fault_\d", name)]
    odd = [
        n for n in named if not re.match(r"test_fault_\d\d_[a-z]", n) or int(n[11:13]) not in FAULTS
    ]
    assert not odd


def test_each_promise_of_the_readme_names_tests_that_exist() -> None:
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    table = page.split("What the store promises")[1].split("The store outlives the run")[0]
    rows = [line for line in table.splitlines() if line.startswith("| ")][1:]
    assert len(rows) == 7
    for row in rows:
        named = re.findall(r"\[([\w.]+)\]\((tests/[\w/]+\.py)\): `(test_\w+)`", row)
        assert len(named) == row.count("`") / 2 > 0, f"no test is named: {row}"
        for shown, file, test in named:
            assert Path(file).name == shown
            assert test in defined_in(ROOT / file), f"{file} has no {test}"
