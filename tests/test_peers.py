"""benchmarks/against_peers.py gives every method its agreement with LESS's exact scores."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

PEERS = Path(__file__).resolve().parent.parent / "benchmarks" / "peers"


@pytest.fixture
def here(script: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The benchmark, whose own processes run in this one: their imports take most of the time."""
    against_peers = script("against_peers")
    monkeypatch.syspath_prepend(str(PEERS))

    def run(command: Sequence[object], **_: object) -> None:
        _, file, *arguments = map(str, command)
        monkeypatch.setattr(sys, "argv", [file, *arguments])
        runpy.run_path(file, run_name="__main__")

    def run_of_bench(_: Any, command: Sequence[object], *, ours: bool) -> tuple[float, float]:
        assert ours
        run(command)
        return 1.0, 1.0

    monkeypatch.setattr(against_peers.subprocess, "run", run)
    monkeypatch.setattr(against_peers.Bench, "run", run_of_bench)
    return against_peers


def test_every_method_of_ours_has_a_high_agreement_with_exact_less(
    here: Any, script: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    options = ["--model", "tiny", "--rows", "24", "--dim", "16384", "--pairs", "1"]
    options += ["--parts", "ours"]
    monkeypatch.setattr(sys, "argv", ["", *options, "--csv", str(tmp_path / "peers.csv")])
    here.main()
    lines = {line["method"]: line for line in script("report").read(tmp_path / "peers.csv")}
    adapter = {name: float(line["spearman"]) for name, line in lines.items() if "base" not in name}
    assert set(adapter) == {"ours, sjlt", "ours, dense", "ours, published Adam, sjlt"}
    # The published feature differs from exact LESS by the projection alone: its error of a cosine
    # is 1 / sqrt(16,384).
    assert adapter["ours, published Adam, sjlt"] > 0.97
    assert min(adapter.values()) > 0.9
    assert all(float(lines[name]["top"]) == 1.0 for name in adapter)
    base = lines["ours, base model's linear layers"]
    assert int(base["d"]) % 256 == 0  # as many numbers of each layer as bergson keeps
    assert base["spearman"] != ""


def test_agreement_counts_ranks_and_the_best_rows(script: Any) -> None:
    agreement = script("against_peers").agreement
    exact = np.arange(40.0)
    assert agreement(exact * 3 + 1, exact) == {"spearman": 1.0, "top": 1.0}
    assert agreement(-exact, exact) == {"spearman": -1.0, "top": 0.0}
    # Fewer rows than the exact ones: no best 5% of all rows.
    assert agreement(exact[:16], exact) == {"spearman": 1.0, "top": ""}
    assert agreement(None, exact) == {"spearman": "", "top": ""}
