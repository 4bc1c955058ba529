"""Selectors in real runs: evaluation sets one by one, and parameters out of range."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dataflex.checkpoints.state import load_state
from dataflex.run.log import read_events

SETS = ("tiny_target", "tiny_target_heldout")


@pytest.mark.parametrize("name", ["less", "delta_loss"])
def test_evaluation_sets_one_by_one_are_the_target_and_change_no_choice(
    name: str, cli: Any, config: Callable[..., Path], tmp_path: Path
) -> None:
    """LlamaFactory hands them on as a dict, and evaluates at step 2, just before the selection."""
    common = {
        "component_name": name, "component_params": {"proj_dim": 64} if name == "less" else {},
        "max_samples": 48, "gradient_accumulation_steps": 1, "train_step": 4, "save_steps": 4,
    }  # fmt: skip
    runs: dict[str, dict[str, Any]] = {
        "each": {"target_dataset": None, "eval_dataset": ",".join(SETS), "do_eval": True,
                 "eval_on_each_dataset": True, "eval_strategy": "steps", "eval_steps": 2},
        "none": {"target_dataset": ",".join(SETS)},
    }  # fmt: skip
    found = []
    for run, changes in runs.items():
        path = config(output_dir=str(tmp_path / run), **common | changes)
        result = cli("train", path)
        assert result.code == 0, result.err[-3000:]
        chosen = json.loads((tmp_path / run / "dataflex/selections/step_2.json").read_text())
        (event,) = read_events(tmp_path / run / "dataflex")
        found.append((chosen["indices"], chosen["metric"], event["target_rows"]))
    assert found[0] == found[1]
    assert found[0][2] == (32 + 48 if name == "less" else 0), (
        "rows of both sets, 48 of each at most"
    )

    history = json.loads((tmp_path / "each" / "trainer_state.json").read_text())["log_history"]
    for part in SETS:
        evaluated = [line["step"] for line in history if f"eval_{part}_loss" in line]
        assert evaluated == [2, 4]


def test_copies_and_a_target_that_wins_all_are_told_and_unique_takes_each_row_once(
    cli: Any, config: Callable[..., Path], tmp_path: Path
) -> None:
    sums = [{"instruction": "Add the numbers.", "input": f"{i} and 2", "output": str(i + 2)}
            for i in range(14)]  # fmt: skip
    copied = {"instruction": "Repeat the word.", "input": "sesame", "output": "sesame sesame"}
    sets = {"copies": [copied] * 10, "sums": sums, "near": [copied] * 2,
            "far": [{"instruction": "Sort.", "input": "9 4 7", "output": "4 7 9"}]}  # fmt: skip
    for name, rows in sets.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    info = {name: {"file_name": f"{name}.json"} for name in sets}
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))
    found = {}
    for unique in (False, True):
        run = tmp_path / f"run{unique}"
        result = cli("train", config(
            dataset="copies,sums", dataset_dir=str(tmp_path), target_dataset="near,far",
            max_samples=None, update_step=2, train_step=4, gradient_accumulation_steps=2,
            component_params={"proj_dim": 512, "unique": unique}, output_dir=str(run),
        ))  # fmt: skip
        assert result.code == 0, result.err[-3000:]
        (event,) = read_events(run / "dataflex")
        chosen = json.loads((run / "dataflex/selections/step_2.json").read_text())
        assert event["won"] == chosen["manifest"]["won"]
        assert event["train_sets"] == {"sums": 14, "copies": 10}
        lines = [json.loads(line) for line in
                 (run / "dataflex/selections/step_2.jsonl").read_text().splitlines()]  # fmt: skip
        assert [line["row"] for line in lines] == chosen["indices"]
        assert [line["score"] for line in lines] == chosen["metric"]["score"]
        assert [line["rank"] for line in lines] == list(range(1, 9))
        assert lines[0]["source"] == ["copies", 0]
        assert (lines[0]["prompt"], lines[0]["response"]) == (
            "Repeat the word.\nsesame", "sesame sesame"
        )  # fmt: skip
        report = (run / "dataflex/report.html").read_text()
        for part in ("Rows selected by less", "Chosen rows by data set", "copies</li>", "sums</li>",
                     "sesame sesame", "finished"):  # fmt: skip
            assert part in report, part
        assert ("copies of one row" in report) is not unique, "warnings of the run"
        found[unique] = (event, chosen["indices"], result.err)
    event, rows, said = found[False]
    assert (event["distinct"], event["won"]) == (1, {"near": 8, "far": 0})
    assert event["chosen"] == {"copies": 8}
    assert rows == list(range(8)), "ties go to the lower row"
    assert "all 8 chosen rows are copies of one row" in said
    assert "component_params.unique: true" in said
    assert "target 'near' won all 8 chosen rows" in said
    assert "1 of them distinct" in said
    event, rows, said = found[True]
    assert event["distinct"] == len(rows) == 8
    assert event["chosen"] == {"sums": 7, "copies": 1}
    assert rows[0] == 0, "of the copies, the first"
    assert sum(event["won"].values()) == 8
    assert "; won by near " in said
    assert "copies of one row" not in said
    assert "distinct" not in said


def test_a_second_ranking_of_every_row_chooses_what_direct_scores_do(
    cli: Any, config: Callable[..., Path], tmp_path: Path
) -> None:
    """And one of the best rows chooses among them, at the step's own gradients and moments."""
    made, common = {}, {"max_samples": 40, "gradient_accumulation_steps": 1, "train_step": 4}
    ways: dict[str, dict[str, Any]] = {
        "direct": {"scoring": "direct", "normalize": "none"},
        "every": {"proj_dim": 16, "rerank": {"top": 1.0}, "normalize": "none"},
        "best": {"proj_dim": 16, "rerank": {"top": 0.3}},
        "stored": {"proj_dim": 16},
    }
    for name, params in ways.items():
        path = config(output_dir=str(tmp_path / name), component_params=params, **common)
        result = cli("train", path)
        assert result.code == 0, result.err[-3000:]
        made[name] = json.loads((tmp_path / name / "dataflex/selections/step_2.json").read_text())
    assert made["every"]["indices"] == made["direct"]["indices"]
    assert made["every"]["metric"]["score"] == pytest.approx(made["direct"]["metric"]["score"])
    assert made["direct"]["manifest"]["normalize"] == "none"
    assert max(made["direct"]["metric"]["score"]) > 1.5, "longer than any cosine"
    assert made["every"]["indices"] != made["stored"]["indices"], "16 dimensions are rough"
    told = made["best"]["manifest"]["rerank"]
    assert told == {"top": 0.3, "by": "exact", "rows": 12, "skipped": {}}
    assert made["best"]["manifest"]["train"] == made["stored"]["manifest"]["train"]
    scores = made["best"]["metric"]["score"]
    assert scores == sorted(scores, reverse=True)
    (line,) = [each for each in map(json.loads, (
        tmp_path / "best" / "trainer_log.jsonl").read_text().splitlines())
        if "dataflex/rerank_kept_share" in each]  # fmt: skip
    kept = set(made["best"]["indices"]) & set(made["stored"]["indices"])
    assert line["dataflex/rerank_kept_share"] == len(kept) / len(made["best"]["indices"])


@pytest.mark.parametrize("scoring", ["projected", "direct"])
def test_target_rows_of_two_kinds_are_served_in_turn_within_quotas(
    scoring: str, cli: Any, config: Callable[..., Path], tmp_path: Path
) -> None:
    """A target of one row that is easy to be similar to and one that is not: top serves one."""
    sums = [{"instruction": "Add the numbers.", "input": f"{i} and 2", "output": str(i + 2)}
            for i in range(12)]  # fmt: skip
    words = [
        {"instruction": "Repeat the word.", "input": word, "output": f"{word} {word}"}
        for word in ("sesame", "open", "close", "window", "garden", "river", "stone", "leaf")
    ]
    sets = {"sums": sums, "words": words, "target": [words[0], sums[3]]}
    for name, rows in sets.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    info = {name: {"file_name": f"{name}.json"} for name in sets}
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))
    which = {} if scoring == "direct" else {"checkpoints": "all"}
    common = {
        "dataset": "sums,words", "dataset_dir": str(tmp_path), "target_dataset": "target",
        "max_samples": None, "update_step": 2, "train_step": 6, "update_times": 2,
        "gradient_accumulation_steps": 2,
    }  # fmt: skip
    params = {"proj_dim": 2048, "scoring": scoring, "subset": "round_robin", **which}
    run = tmp_path / "run"
    result = cli("train", config(component_params=params, output_dir=str(run), **common))
    assert result.code == 0, result.err[-3000:]
    first = json.loads((run / "dataflex/selections/step_2.json").read_text())
    assert first["indices"][:2] == [12, 3], "each target row's own copy among the training rows"
    assert first["manifest"]["subset"] == "round_robin"
    assert len(set(first["indices"])) == 8
    run = tmp_path / "few"
    params["quotas"] = {"words": 0.25}
    result = cli("train", config(component_params=params, output_dir=str(run), **common))
    assert result.code == 0, result.err[-3000:]
    for step in (2, 4):
        rows = json.loads((run / f"dataflex/selections/step_{step}.json").read_text())["indices"]
        assert sum(row >= 12 for row in rows) == 2
        assert len(set(rows)) == 8
    params["quotas"] = {"words": 1, "sums": 2}
    result = cli("train", config(component_params=params, output_dir=str(run), **common))
    assert result.code == 2
    assert "8 rows an update: asked 8 rows, but the quotas leave 3" in result.err


def test_a_score_does_not_depend_on_the_batch_where_padding_is_a_label(
    cli: Any, config: Callable[..., Path], tmp_path: Path
) -> None:
    """Training learns the padding; how much of it a row gets depends on its batch."""
    scores = []
    for budget in (64, 4096):
        path = config(
            output_dir=str(tmp_path / f"{budget}"), ignore_pad_token_for_loss=False,
            max_samples=32, gradient_accumulation_steps=1, train_step=4, save_steps=4,
            component_params={"proj_dim": 64, "tokens_per_batch": budget},
        )  # fmt: skip
        result = cli("train", path)
        assert result.code == 0, result.err[-3000:]
        chosen = json.loads((tmp_path / f"{budget}/dataflex/selections/step_2.json").read_text())
        scores.append(dict(zip(chosen["indices"], chosen["metric"]["score"], strict=True)))
    assert scores[0] == pytest.approx(scores[1], abs=2e-3)


REFUSED: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "temperature": ({"temperature": 0}, ("temperature is 0", "above 0")),
    "quantiles": ({"quantiles": [0.66, 0.33]}, ("quantiles are [0.66, 0.33]", "two rising")),
    "focus": ({"focus": "hard"}, ("focus is 'hard'", "low, medium or high")),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_parameter_out_of_range_is_one_message_before_anything_is_written(
    case: str, cli: Any, config: Callable[..., Path], tmp_path: Path
) -> None:
    params, fragments = REFUSED[case]
    result = cli("train", config(component_name="loss", component_params=params))
    assert result.code == 2, result.err[-3000:]
    assert "Traceback" not in result.err
    assert result.err.count("error: ") == 1
    assert "component 'loss'" in result.message
    assert all(fragment in result.message for fragment in fragments), result.message
    assert not (tmp_path / "run").exists()


BARE = """
import numpy as np
from dataflex.api import Selection

class Bare:
    def select(self, count, context):
        return Selection(context.candidates[:count])

class Empty:
    pass
"""


def test_a_class_with_select_alone_trains_and_its_checkpoint_bears_its_name(
    cli: Any, config: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "mine.py").write_text(BARE)
    own = {"component_name": "custom", "component_params": {"target": "mine:Bare"}}
    path = config(**own, gradient_accumulation_steps=1, train_step=4, save_steps=2)
    result = cli("train", path, cwd=tmp_path)
    assert result.code == 0, result.err[-3000:]
    kept = load_state(tmp_path / "run" / "checkpoint-2")
    assert (kept.settings["class"], kept.component) == ("mine:Bare", {})
    result = cli("train", path, cwd=tmp_path)
    assert result.code == 0, result.err[-3000:]


def test_a_class_without_select_is_refused_before_anything_is_loaded(
    cli: Any, config: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "mine.py").write_text(BARE)
    own = {"component_name": "custom", "component_params": {"target": "mine:Empty"}}
    result = cli("train", config(**own), cwd=tmp_path)
    assert result.code == 2, result.err[-3000:]
    assert "mine:Empty has no method select(count, context)" in result.message
    assert not (tmp_path / "run").exists()
