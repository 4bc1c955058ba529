"""Pictures: every panel says what it shows, over an axis that is its own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from dataflex.report.picture import draw
from dataflex.run.log import RunLog

Drawn = Callable[[], Figure]


@pytest.fixture
def drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Drawn:
    """Draw the picture of `tmp_path`; give its figure, with everything laid out."""
    held: list[Figure] = []
    save = Figure.savefig

    def keep(self: Figure, *args: Any, **kwargs: Any) -> None:
        save(self, *args, **kwargs)
        held.append(self)

    monkeypatch.setattr(Figure, "savefig", keep)

    def figure() -> Figure:
        path = draw(tmp_path / "dataflex")
        assert path is not None
        assert path.stat().st_size > 5_000
        return held[-1]

    return figure


def trained(folder: Path, steps: int = 12) -> None:
    """The Trainer's own record: a loss every second step, evaluations at 6 and 12."""
    history: list[dict[str, Any]] = [{"step": s, "loss": 2 / s} for s in range(2, steps + 1, 2)]
    history += [{"step": s, "eval_loss": 1.0} for s in (6, 12)]
    content = {"global_step": steps, "log_history": history}
    (folder / "trainer_state.json").write_text(json.dumps(content))


def select(log: RunLog, step: int, sets: dict[str, int] | None = None) -> None:
    scores = np.array([0.5, 0.4, np.nan, 0.1])
    log.selection(step, np.array([3, 1, 30, 7]), scores, {})
    log.update("select", step, "less", "", chosen=sets or {"mine": 4}, train_rows=40,
               train_sets={name: 20 for name in sets or ["mine"]})  # fmt: skip


def titles(figure: Figure) -> list[str]:
    return [axis.get_title(loc="left") for axis in figure.axes if axis.get_title(loc="left")]


def labelled(figure: Figure) -> dict[str, str]:
    """Title of each panel -> the label of its x axis."""
    return {axis.get_title(loc="left"): axis.get_xlabel() for axis in figure.axes}


def texts(figure: Figure, panel: int) -> list[str]:
    legend = figure.axes[panel].get_legend()
    return [] if legend is None else [text.get_text() for text in legend.get_texts()]


def test_a_selection_shows_losses_scores_and_rows_each_over_its_own_axis(
    drawn: Drawn, tmp_path: Path
) -> None:
    trained(tmp_path)
    log = RunLog(tmp_path)
    for step in (4, 8):
        select(log, step)
    figure = drawn()
    assert figure.get_suptitle() == (
        f"Rows selected by less\nrun {tmp_path.parent.name}/{tmp_path.name}, 12 steps"
    )
    assert labelled(figure) | {"": ""} == {
        "training loss, updates dotted": "optimizer step",
        "scores of the chosen rows, a line per update":
            "chosen row, from the largest score to the smallest",
        "which rows of mine were chosen: a column is one row, a line an update": "row of mine",
        "": "",
    }  # fmt: skip
    losses, scores, rows = figure.axes[:3]
    assert texts(figure, 0) == ["training", "evaluation"]
    assert losses.lines[0].get_xdata().tolist() == [2, 4, 6, 8, 10, 12]
    assert all(tick == int(tick) for axis in (losses, scores, rows) for tick in axis.get_xticks())
    assert scores.lines[0].get_ydata().tolist() == [0.5, 0.4, 0.1]
    assert texts(figure, 1) == ["step 4", "step 8"]
    assert [tick.get_text() for tick in rows.get_yticklabels()] == ["step 4", "step 8"]
    assert rows.get_xlim() == (0, 40)


def test_one_selection_is_a_line_of_scores(drawn: Drawn, tmp_path: Path) -> None:
    select(RunLog(tmp_path), 4)
    (line,) = drawn().axes[0].lines
    assert len(line.get_xdata()) == 3


def test_many_selections_are_a_band_over_the_steps(drawn: Drawn, tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    for step in range(10, 400, 10):
        select(log, step)
    figure = drawn()
    assert titles(figure)[0] == "scores of the chosen rows: smallest to largest, mean"
    assert figure.axes[0].get_xlabel() == "optimizer step"
    assert len(figure.axes[0].lines) == 1, "so many updates are not marked"
    assert len(figure.axes[1].get_yticklabels()) == 8


def test_rows_of_several_data_sets_are_shown_by_set_beside_all_rows(
    drawn: Drawn, tmp_path: Path
) -> None:
    log = RunLog(tmp_path)
    select(log, 4, {"_hidden": 3, "$x$": 1})
    select(log, 8, {"_hidden": 0, "$x$": 4})
    figure = drawn()
    panel = figure.axes[1]
    assert titles(figure)[1] == "data sets of the chosen rows"
    assert sorted(texts(figure, 1)) == ["$x$", "_hidden"], "as they are, neither left out"
    bars = [tick.get_text() for tick in panel.get_xticklabels()]
    assert bars == ["all rows", "step 4", "step 8"]
    names = texts(figure, 1)
    heights = {name: [bar.get_height() for bar in panel.containers[i]]
               for i, name in enumerate(names)}  # fmt: skip
    assert heights == {"_hidden": [0.5, 0.75, 0], "$x$": [0.5, 0.25, 1]}
    assert panel.get_xlabel() == ""


def test_of_many_data_sets_the_largest_are_named(drawn: Drawn, tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    select(log, 4, {f"set_{i}": 60 - i for i in range(50)})
    assert texts(drawn(), 1) == [*(f"set_{i}" for i in range(7)), "43 others"]


def test_a_reorder_shows_the_order_over_the_steps_of_the_run(drawn: Drawn, tmp_path: Path) -> None:
    trained(tmp_path)
    log = RunLog(tmp_path)
    for step, scores in ((0, [1.0, 2.0, 3.0]), (6, [3.0, 2.0, 1.0])):
        log.selection(step, np.array([2, 0, 1]), np.array(scores), {})
        log.update("reorder", step, "zigzag", "", train_rows=3)
    figure = drawn()
    assert titles(figure)[1:] == ["score of the rows, in the order they are trained on"]
    points = np.asarray(figure.axes[1].collections[0].get_offsets())
    assert points.tolist() == [[1, 1], [3, 2], [5, 3], [7, 3], [9, 2], [11, 1]]
    assert figure.axes[1].get_xlabel() == "optimizer step"
    assert figure.axes[0].get_xlabel() == "", "the panels share it"


def test_an_order_without_scores_shows_positions(drawn: Drawn, tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    log.selection(0, np.array([2, 0, 1]), None, {})
    log.update("reorder", 0, "shuffle", "", train_rows=3)
    figure = drawn()
    assert titles(figure) == ["position in the training set of the rows, in the order they are "
                              "trained on"]  # fmt: skip
    points = np.asarray(figure.axes[0].collections[0].get_offsets())
    assert points[:, 1].tolist() == [2, 0, 1]


def test_a_mixture_and_weights_are_shown_over_all_steps(drawn: Drawn, tmp_path: Path) -> None:
    trained(tmp_path)
    log = RunLog(tmp_path)
    for step, share in ((0, 0.5), (4, 0.25)):
        log.update("mix", step, "doremi", "", proportions={"a": share, "b": 1 - share},
                   weights={"a": share, "b": 1 - share})  # fmt: skip
    log.update("weight", 6, "doremi", "", weight_min=0.5, weight_mean=1.0, weight_max=2.0)
    figure = drawn()
    assert titles(figure) == [
        "training loss, updates dotted", "mixture of the domains", "weights of the domains",
        "weights of the samples: smallest to largest, mean",
    ]  # fmt: skip
    assert [axis.get_xlabel() for axis in figure.axes] == ["", "", "", "optimizer step"]
    assert len({axis.get_xlim() for axis in figure.axes}) == 1
    assert texts(figure, 1) == texts(figure, 2) == ["a", "b"]


def test_names_that_no_font_has_are_boxes_and_nothing_on_the_screen(
    drawn: Drawn, tmp_path: Path
) -> None:
    """Warnings are errors here."""
    select(RunLog(tmp_path), 4, {"\u6570\u636e": 2, "\x1b[2J": 2, "$\\frac": 1})
    assert any("\\x1b" in text for text in texts(drawn(), 1))


def test_a_run_that_logged_nothing_has_no_picture(tmp_path: Path) -> None:
    trained(tmp_path)
    (tmp_path / "dataflex").mkdir()
    assert draw(tmp_path / "dataflex") is None


def test_kinds_of_one_data_set_are_shown_in_place_of_positions(
    drawn: Drawn, tmp_path: Path
) -> None:
    log = RunLog(tmp_path)
    for step, counts in ((4, {"date": 3, "add": 1}), (8, {"date": 4})):
        kinds = {"column": "skill", "chosen": counts, "all": {"add": 30, "date": 10}}
        log.selection(step, np.array([3, 1, 30, 7]), None, {"kinds": kinds})
        log.update("select", step, "less", "", chosen={"mine": 4}, train_rows=40,
                   train_sets={"mine": 40})  # fmt: skip
    figure = drawn()
    (panel,) = figure.axes
    assert titles(figure) == ["chosen rows by skill"]
    assert texts(figure, 0) == ["add", "date"]
    heights = [[bar.get_height() for bar in bars] for bars in panel.containers]
    assert heights == [[0.75, 0.25, 0], [0.25, 0.75, 1]]
    assert panel.get_xlabel() == ""
