"""`--dry-run` tells what a run takes, and leaves everything as it was."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from gradstore import open_store
from gradstore.pace import duration


def table(out: str) -> dict[str, list[str]]:
    """Rows of the forecast by the pass's name."""
    cells = [[c.strip() for c in line.split("│")[1:-1]] for line in out.splitlines()]
    return {row[0]: row[1:] for row in cells if len(row) == 7}


def seconds(shown: str) -> float:
    number, unit = shown.split()
    return float(number) * {"s": 1, "min": 60, "h": 3600}[unit]


def blocks(folder: Path) -> int:
    """Bytes that a folder takes on disk."""
    return sum(512 * p.stat().st_blocks for p in [folder, *folder.rglob("*")])


def test_a_forecast_is_what_the_run_takes_and_writes_nothing(
    cli: Any, config: Any, tmp_path: Path, disk_path: Path
) -> None:
    folder = disk_path / "run"
    path = config(component_params={"proj_dim": 4096}, output_dir=str(folder))
    before = sorted(tmp_path.iterdir())
    result = cli("train", path, "--dry-run")
    assert result.code == 0, result.err[-3000:]
    assert sorted(tmp_path.iterdir()) == before
    assert not folder.exists()
    told = table(result.out)
    assert told["training, 8 steps"][:2] == ["1", "48"]
    train, target = told["gradients of train"], told["gradients of tiny_target"]
    assert train[:2] == ["2", "96"]
    assert target[:2] == ["2", "32"]

    assert cli("train", path).code == 0
    events = [json.loads(line) for line in
              (folder / "dataflex" / "events.jsonl").read_text().splitlines()]  # fmt: skip
    assert seconds(train[3]) > 0
    assert seconds(target[3]) > 0
    assert [int(e["tokens"]) for e in events] == [
        int(train[2].replace(",", "")) + int(target[2].replace(",", ""))
    ] * 2
    (total,) = re.findall(r"and ([0-9.]+) MiB in the store", result.out)
    assert float(total) * 2**20 == pytest.approx(blocks(folder / "gradstore"), rel=0.05)

    states = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    built = cli("gradstore", "build", path, "--dry-run")
    assert built.code == 0, built.err[-3000:]
    assert table(built.out)["gradients of train"][:2] == ["4", "96"]  # of 4 checkpoints
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*")} == states
    assert len(open_store(folder / "gradstore").generations()) == 4


def test_a_second_ranking_is_named_with_the_most_that_it_costs(cli: Any, config: Any) -> None:
    params = {"rerank": {"top": 0.25, "by": "cg", "curvature_rows": 6, "iterations": 9}}
    result = cli("train", config(component_params={"proj_dim": 64, **params}), "--dry-run")
    assert result.code == 0, result.err[-3000:]
    told = table(result.out)
    assert told["whole gradients of tiny_target"][:2] == ["2", "32"]
    assert told["whole gradients of the best 0.25 of rows"][:2] == ["2", "24"]
    products = told["Gauss-Newton products, at most"]
    assert products[:2] == ["18", "6"]
    assert seconds(products[3]) > 0


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"update_step": 0}, "update_step is 0"),
        ({"update_step": 400}, "the training set has 96"),  # known once rows are loaded
        ({"train_type": "static", "dataset": "of_nobody"}, "of_nobody"),
        ({"template": "qwen"}, "resize_vocab"),  # known once the model is loaded
        (
            {
                "train_type": "static",
                "streaming": True,
                "val_size": 1000,
                "max_steps": 2,
                "max_samples": None,
            },
            "none of its rows is left: its files have none, or val_size",
        ),
    ],
)
def test_a_dry_run_refuses_what_the_run_would(
    changes: dict[str, Any], says: str, cli: Any, config: Any, tmp_path: Path
) -> None:
    result = cli("train", config(**changes), "--dry-run")
    assert result.code == 2
    assert says in result.message
    assert not (tmp_path / "run").exists()


def test_of_static_training_all_is_checked_and_the_rows_are_loaded(
    cli: Any, config: Any, tmp_path: Path
) -> None:
    path = config(train_type="static", max_samples=30, tokenized_path=str(tmp_path / "kept"))
    before = sorted(tmp_path.iterdir())
    result = cli("train", path, "--dry-run")
    assert result.code == 0, result.err[-3000:]
    line = result.out.splitlines()[-1]
    assert "no pass of ours to forecast" in line
    assert "30 rows loaded" in line
    assert sorted(tmp_path.iterdir()) == before


def test_seconds_are_read_as_they_are_shown() -> None:
    for value in (0.5, 60.0, 3000.0, 40_000.0):
        assert seconds(duration(value)) == pytest.approx(value, rel=0.05)
