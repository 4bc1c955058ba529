"""Figures in README.md and docs/figures.md are those of benchmarks/results."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
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


@pytest.mark.parametrize("rounding", [0.0, 1e-17])
def test_a_difference_that_no_seed_varies_is_not_marked(
    tables: dict[str, Any], rounding: float
) -> None:
    found = tables["difference"]([0.3, 0.3, 0.3 + rounding], [0.2, 0.2, 0.2])
    assert found.mean == pytest.approx(0.1)
    assert found.p == 1
    assert tables["carried"]([found.p]) == [False]
    assert tables["difference"]([0.3, 0.3, 0.3], [0.3, 0.3, 0.3]).p == 1
    assert tables["difference"]([0.3, 0.3, 0.3001], [0.2, 0.2, 0.2]).p < 1e-5


def test_a_mean_over_seeds_has_its_interval(tables: dict[str, Any]) -> None:
    # Mean 2, standard error 1/sqrt(3), t(2) at 97.5% is 4.302653.
    assert tables["with_interval"]([1.0, 2.0, 3.0]) == "2.000 (-0.484 to 4.484)"
    assert tables["with_interval"]([1.0], 2) == "1.00"


def test_a_line_tells_which_of_its_columns_have_fewer_seeds(tables: dict[str, Any]) -> None:
    loss = {"less": {"1": 2.0, "2": 3.0}, "bm25": {"1": 2.5, "2": 4.0}}
    columns = {"loss": loss, "loss, clipped": {"less": {"1": 2.0}}}
    shown = tables["_seed_table"](columns, "loss", {}).splitlines()
    assert [line.split(" | ")[-1] for line in shown[2:]] == ["2 (1 clipped) |", "2 |"]


@pytest.mark.parametrize(
    ("method", "family"),
    [
        ("rds_plus, top", "hidden states"),
        ("near (hidden states), top", "hidden states"),
        ("near (hidden states)", "hidden states"),
        ("tsds", "hidden states"),
        ("bm25, round_robin", "words"),
        ("random", "words"),
        ("mirror, relative: false", "losses"),
        ("loss", "losses"),
        ("less", "gradients"),
        ("landmarks, 100", "gradients"),
        ("less, sgd, fisher, round_robin", "gradients, Fisher metric"),
        ("bergson trak", "bergson"),
    ],
)
def test_a_method_is_drawn_as_what_it_goes_by_however_it_chooses(
    script: Any, method: str, family: str
) -> None:
    assert script("plots").family(method) == family


def test_every_plot_shows_what_the_csvs_say(script: Any) -> None:
    plots = script("plots")
    stale = [name for name, gather in plots.PLOTS.items() if not plots.shows(name, gather())]
    assert not stale, f"run `python benchmarks/plots.py`: {stale}"


def test_a_plot_of_other_numbers_is_told(script: Any) -> None:
    plots = script("plots")
    first, *others = plots.rules()
    changed = plots.Point(first.method, first.operations, first.loss + 1e-3, first.half, 8)
    assert plots.shows("rules", [first, *others])
    assert not plots.shows("rules", [changed, *others])


def test_a_plots_names_lie_apart_and_near_their_points(script: Any) -> None:
    spread_out = script("plots").spread_out
    assert spread_out([0.0, 0.2, 5.0], 1.0) == pytest.approx([-0.4, 0.6, 5.0])
    # Moved apart, the first two meet the third.
    assert spread_out([0.0, 0.0, 1.2], 1.0) == pytest.approx([-0.6, 0.4, 1.4])


def test_a_stopped_run_of_rules_goes_on_with_the_next_method(
    script: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    rules = script("rules")
    run = SimpleNamespace(step=10, seed=1, skills=np.array(["left"]), train_to=lambda step: None)
    measured: list[str] = []

    def method(name: str, *, fails: bool) -> Any:
        def choose(world: Any, target: int) -> Any:
            if fails:
                raise KeyboardInterrupt
            measured.append(name)
            return np.array([0])

        return choose

    def world(run: Any, *_: Any, **__: Any) -> Any:
        return SimpleNamespace(run=run, timed=lambda choose: (choose(), 0.0))

    methods = {"one": method("one", fails=False), "two": method("two", fails=True)}
    monkeypatch.setattr(rules, "METHODS", methods)
    monkeypatch.setattr(rules, "STATES", ((10, 0.0),))
    monkeypatch.setattr(rules, "World", world)
    monkeypatch.setattr(rules, "start", lambda seed: run)
    monkeypatch.setattr(rules.torch, "set_num_threads", lambda threads: None)
    monkeypatch.setattr(rules.tables, "rules", lambda path: "")
    monkeypatch.setattr(sys, "argv", ["rules.py", "--seeds", "1", "--csv", str(tmp_path / "r.csv")])
    with pytest.raises(KeyboardInterrupt):
        rules.main()
    methods["two"] = method("two", fails=False)
    measured.clear()
    assert rules.main() == 0
    assert set(measured) == {"two"}
    kept = [(line["method"], line["share"]) for line in rules.read(tmp_path / "r.csv")]
    assert kept == [("one", "0.125"), ("two", "0.125")]


def test_a_table_does_not_mix_machines(tables: dict[str, Any]) -> None:
    lines = [
        {"cpu": "old", "chip": "", "rows": "1"}, {"cpu": "host", "chip": "GPU", "rows": "2"},
        {"cpu": "new", "chip": "", "rows": "3"}, {"cpu": "new", "chip": "", "rows": "4"},
    ]  # fmt: skip
    assert [line["rows"] for line in tables["one_machine"](lines)] == ["2", "3", "4"]


@pytest.mark.parametrize("name", ["projecting", "growth"])
def test_a_table_that_nobody_measured_says_so(
    tables: dict[str, Any], name: str, tmp_path: Path
) -> None:
    assert tables[name](tmp_path / "none.csv") == "Not measured yet."
