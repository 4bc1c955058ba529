"""Figures in README.md and docs/figures.md are those of benchmarks/results."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Load the script that writes the tables; scripts of benchmarks import each other."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    try:
        return runpy.run_path(str(BENCHMARKS / "tables.py"))
    finally:
        sys.modules.pop("report", None)


def test_every_page_says_what_the_csvs_say(tables: dict[str, Any]) -> None:
    stale = [
        page.name
        for page in tables["PAGES"]
        if tables["filled"](text := page.read_text(encoding="utf-8")) != text
    ]
    assert not stale, f"run `python benchmarks/tables.py`: {stale}"


def test_only_differences_that_seeds_carry_are_marked(tables: dict[str, Any]) -> None:
    # Holm at 5% of three: .001 <= .05/3, .02 <= .05/2, .06 > .05; a failed one ends it.
    assert tables["carried"]([0.06, 0.001, 0.02]) == [False, True, True]
    assert tables["carried"]([0.03, 0.03, 0.001]) == [False, False, True]


def test_a_difference_is_paired_by_seed(tables: dict[str, Any]) -> None:
    # Differences 1, 2, 3: mean 2, standard error 1/sqrt(3), t(2) at 97.5% is 4.302653.
    found = tables["difference"]([2.0, 4.0, 6.0], [1.0, 2.0, 3.0])
    assert found.mean == pytest.approx(2.0)
    assert found.half == pytest.approx(4.302653 / 3**0.5, rel=1e-6)
    assert found.p == pytest.approx(0.0742, abs=1e-4)
