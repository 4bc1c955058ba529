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


# ---- LDS ---------------------------------------------------------------------------------------


def as_csv(path: Path, *lines: dict[str, Any]) -> Path:
    columns = list(dict.fromkeys(key for line in lines for key in line))
    text = [",".join(columns)]
    text += [",".join(f'"{line.get(key, "")}"' for key in columns) for line in lines]
    path.write_text("\n".join(text) + "\n", encoding="utf-8")
    return path


MACHINE = {"date": "d", "cpu": "old", "cores": 2, "threads": 1, "torch": "2", "load": 1, "chip": ""}


def lds_line(score: str, mean: float, **more: Any) -> dict[str, Any]:
    ends = {"low": mean - 0.05, "high": mean + 0.05}
    return {**MACHINE, "subsets": 30, "score": score, "figure": "lds", "mean": mean, **ends,
            "run": "", **more}  # fmt: skip


def test_lds_is_shown_with_its_paired_differences_and_says_what_intervals_are_over(
    tables: dict[str, Any], tmp_path: Path
) -> None:
    beside = {"minus_default_mean": 0.02, "minus_default_low": -0.01, "minus_default_high": 0.05}
    path = as_csv(
        tmp_path / "lds.csv",
        lds_line("old", 0.1),
        lds_line("new", 0.3, interval="skills and models", fraction=0.5, **beside),
    )
    shown = tables["trusted"]("", path)
    assert "| new | 0.300 (0.250 to 0.350) | +0.020 (-0.010 to +0.050) |" in shown
    assert "| old | 0.100 (0.050 to 0.150)\\* |  |" in shown
    assert "over skills and models, each drawn anew. \\* over the 32 queries alone" in shown
    assert tables["trusted_elsewhere"](path) == "Not measured yet."


def test_lds_of_other_states_and_fractions_has_columns_of_its_own(
    tables: dict[str, Any], tmp_path: Path
) -> None:
    state = {"state": "100 steps, 400 rows", "fraction": 0.5, "interval": "skills and models"}
    path = as_csv(
        tmp_path / "lds.csv",
        lds_line("less", 0.2, state="", fraction=0.5),
        lds_line("less", 0.4, **state),
        lds_line("less", 0.6, **state, figure="qld 1%") | {"fraction": ""},
        lds_line("less", 0.5, state="", fraction=0.95, run="smooth"),
    )
    shown = tables["trusted_elsewhere"](path)
    assert shown.splitlines()[0] == (
        "| score | LDS, 100 steps, 400 rows, 50% of the rows (95%) | QLD 1%, 100 steps, 400 rows "
        "(95%) | LDS, smooth, 95% of the rows (95%) |"
    )
    assert "| less | 0.400 (0.350 to 0.450) | 0.600 (0.550 to 0.650) | 0.500" in shown
    assert "0.400" not in tables["trusted"]("", path)
    assert "| less | 0.200" in tables["trusted"]("", path)


def test_a_line_of_lds_holds_every_query_and_its_difference_to_the_default(script: Any) -> None:
    lds = script("lds")
    default, exact = lds.BESIDE.values()

    def found(*values: float) -> Any:
        drawn = lds.Resamples.draw(3, 5)
        return lds.resampled(list(values), drawn)

    measured = {default: found(0.1, 0.2, 0.3), "other": found(0.2, 0.3, 0.4)}
    by_score = {line["score"]: line for line in lds.lines_of("lds", measured)}
    other = by_score["other"]
    assert other["values"] == "0.2000 0.3000 0.4000"
    # A constant difference has no spread over the queries.
    assert [other[f"minus_default_{end}"] for end in ("mean", "low", "high")] == [0.1, 0.1, 0.1]
    assert by_score[default]["minus_default_mean"] == ""
    assert other["minus_exact_mean"] == "", f"{exact} is not measured"
    assert by_score[default].keys() == other.keys()


def test_states_of_lds_are_named_and_banked_apart(script: Any) -> None:
    begins = script("lds_states").Beginning
    every = [
        begins(), begins(smooth=True), begins(steps=10), begins(steps=100),
        begins(steps=100, rate=4.0), begins(steps=100, rows=32), begins(steps=100, clip=0.1),
        begins(steps=100, pool=400), begins(steps=100, smooth=True),
    ]  # fmt: skip
    folders = [each.folder(Path("bank")) for each in every]
    assert len(set(folders)) == len(every)
    assert len({str(each.setting) for each in every}) == len(every)
    # Models that were banked before states had names are still found.
    assert folders[:2] == [Path("bank"), Path("bank/smooth")]
    assert every[0].setting == {"model": "examples/tiny", "epochs": 1, "seed": 1}
    assert every[4].state == "100 steps, rate x 4"


# ---- rules and real ----------------------------------------------------------------------------


def rules_line(method: str, seed: int, **more: Any) -> dict[str, Any]:
    return {**MACHINE, "method": method, "step": 60, "seed": seed, "share": 0.5, "loss": 1.0,
            "cpu_s": 1.0, "clip": "", **more}  # fmt: skip


def test_pairs_of_two_machines_are_told(tables: dict[str, Any], tmp_path: Path) -> None:
    path = as_csv(
        tmp_path / "rules.csv",
        *(rules_line("less", seed, share=0.4 + seed / 100) for seed in (1, 2)),
        rules_line("less, checkpoints: all", 1, cpu="old"),
        rules_line("less, checkpoints: all", 2, cpu="new"),
    )
    shown = tables["over_checkpoints"](path)
    assert "Of 2 pairs 1 are of two processors. All: old, " in shown
    assert "Last: old, " in shown


def test_shares_by_rule_are_those_of_the_lines_that_have_them(
    tables: dict[str, Any], tmp_path: Path
) -> None:
    assert tables["rules_each"](as_csv(tmp_path / "old.csv", rules_line("less", 1))) == (
        "Not measured yet."
    )
    path = as_csv(
        tmp_path / "rules.csv",
        rules_line("old", 1),
        *(rules_line("less", seed, **{"share of left": seed / 10}) for seed in (1, 2, 3)),
    )
    shown = tables["rules_each"](path)
    assert "| after 60 steps | left (95%) | seeds |" in shown
    assert "| `less` | 0.20 (-0.05 to 0.45) | 3 |" in shown
    assert "`old`" not in shown


def real_line(method: str, seed: int, **more: Any) -> dict[str, Any]:
    return {**MACHINE, "method": method, "target": "tools_en", "seed": seed, "share": 0.5,
            "loss": 1.0, "exact": "", "score": "", "choose_s": 1, "train_s": 2, **more}  # fmt: skip


def test_real_rows_chosen_by_another_part_are_a_table_of_their_own(
    tables: dict[str, Any], tmp_path: Path
) -> None:
    path = as_csv(
        tmp_path / "real.csv",
        real_line("less", 1, loss=1.5),
        real_line("less", 1, part=0.05, loss=2.5),
        real_line("less", 1, part=0.1, target="planted", loss=""),
    )
    assert "| `less` | 1.500 |" in tables["real"](path)
    assert "2.500" not in tables["real"](path)
    assert tables["real_parts"](path).startswith("5% of the rows:\n\n|")
    assert "| `less` | 2.500 |" in tables["real_parts"](path)
