"""dynamic_reorder from the command line: what is served, what is told, what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dataflex.run.log import read_events

TINY = Path(__file__).resolve().parents[2] / "examples" / "tiny" / "data"
SORTED = {"score_params": {"score_field": "difficulty"}}

Write = Callable[..., Path]


@pytest.fixture
def reorder(config: Write, tmp_path: Path) -> Write:
    """`reorder("name", component_name=..., **changes)`: 8 steps of 6 rows, one pass of 48 rows."""

    def write(name: str = "run", **changes: Any) -> Path:
        return config(f"{name}.yaml", **{
            "dataset": "tiny_scored", "max_samples": 48, "target_dataset": None,
            "train_type": "dynamic_reorder", "component_name": "sorting",
            "component_params": SORTED, "output_dir": str(tmp_path / name), "lora_dropout": 0.0,
            "save_steps": 100, **changes,
        })  # fmt: skip

    return write


def served(run: Path) -> list[int]:
    """Positions in the order they were trained on."""
    events = read_events(run / "dataflex")
    assert {event["event"] for event in events} == {"reorder"}
    files = [run / "dataflex" / "selections" / f"step_{event['step']}.json" for event in events]
    return [i for path in files for i in json.loads(path.read_text())["indices"]]


def difficulties(rows: int = 48) -> list[int]:
    return [row["difficulty"] for row in json.loads((TINY / "scored.json").read_text())[:rows]]


def test_raw_and_index_serve_the_same_rows_and_tell_of_them(
    reorder: Write, cli: Any, tmp_path: Path
) -> None:
    params = {**SORTED, "pattern": "zigzag", "pattern_params": {"layers": 3}}
    for at in ("raw", "index"):
        path = reorder(at, component_params={**params, "apply_at": at})
        result = cli("train", path, faults={"trace": str(tmp_path / f"{at}.txt")}, draws=True)
        assert result.code == 0, result.err[-3000:]
    assert (tmp_path / "raw.txt").read_text() == (tmp_path / "index.txt").read_text()
    rows = served(tmp_path / "index")
    assert sorted(rows) == list(range(48)), "one pass serves every row once"
    ranks = np.concatenate([np.arange(0, 48, 3), np.arange(1, 48, 3)[::-1], np.arange(2, 48, 3)])
    assert rows == np.argsort(difficulties(), kind="stable")[ranks].tolist()
    assert served(tmp_path / "raw") == list(range(48)), "raw rows lie in order already"

    events = read_events(tmp_path / "raw" / "dataflex")
    assert [(e["step"], e["served_rows"]) for e in events] == [(0, 12), (2, 18), (5, 18)]
    assert [e["numbers"]["passes"] for e in events] == [0.25, 0.625, 1.0]
    lowest, highest = (int(events[1]["numbers"][f"score_{end}"]) for end in ("min", "max"))
    line = f"serves 18 rows, scores {lowest} to {highest}, 0.62 passes so far"
    assert f"step 2: sorting {line}" in result.err
    assert "Updates of this run" in result.out
    assert '"dataflex/passes": 1.0' in (tmp_path / "raw" / "trainer_log.jsonl").read_text()
    assert (tmp_path / "raw" / "dataflex" / "picture.png").is_file()


def test_packed_rows_follow_the_order_of_raw_rows(reorder: Write, cli: Any, tmp_path: Path) -> None:
    """Stage pt packs: as if the file had been sorted beforehand. The rows last for two passes."""
    rows = json.loads((TINY / "scored.json").read_text())[:200]
    rising = sorted(rows, key=lambda row: -row["difficulty"])
    info = {name: {"file_name": f"{name}.json"} for name in ("mixed", "sorted")}
    for name, content in (("dataset_info", info), ("mixed", rows),
                          ("sorted", [{**row, "difficulty": 1} for row in rising])):  # fmt: skip
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    for name in ("mixed", "sorted"):
        path = reorder(name, dataset=name, dataset_dir=str(tmp_path), max_samples=None, stage="pt",
                       component_params={**SORTED, "polarity": "lower_is_better"})  # fmt: skip
        result = cli("train", path, faults={"trace": str(tmp_path / f"{name}.txt")})
        assert result.code == 0, result.err[-3000:]
    lines = (tmp_path / "mixed.txt").read_text().splitlines()
    assert len({line.split()[1] for line in lines}) > 4, "several packed rows, not one again"
    assert lines == (tmp_path / "sorted.txt").read_text().splitlines()


def test_two_processes_share_the_scoring_and_choose_what_one_chooses(
    reorder: Write, cli: Any, tmp_path: Path
) -> None:
    changes = {"component_name": "dynamic_sorting", "warmup_step": 0, "train_step": 3,
               "component_params": {"score_params": {"max_samples": 40}}}  # fmt: skip
    alone = reorder("alone", **changes)
    both = reorder("both", **changes, per_device_train_batch_size=1)
    assert cli("train", alone).code == 0
    result = cli("train", both, ranks=2)
    assert result.code == 0, result.err[-3000:]
    assert served(tmp_path / "alone") == served(tmp_path / "both")
    (one,), (other,) = (read_events(tmp_path / run / "dataflex") for run in ("alone", "both"))
    assert one["tokens"] == other["tokens"] > 0
    scores = json.loads((tmp_path / "alone/dataflex/selections/step_0.json").read_text())
    known = [s for s in scores["metric"]["score"] if s is not None]
    assert known == sorted(known)
    assert one["numbers"]["score_max"] == known[-1]


def test_a_selectors_scores_are_used_again_on_the_same_rows_alone(
    reorder: Write, cli: Any, tmp_path: Path
) -> None:
    chosen = reorder("select", train_type="dynamic_select", component_name="loss",
                     component_params={}, warmup_step=0, train_step=3)  # fmt: skip
    assert cli("train", chosen).code == 0
    selection = tmp_path / "select" / "dataflex" / "selections" / "step_0.json"
    content = json.loads(selection.read_text())
    params = {"pattern": "sorting", "score_params": {"cache_path": str(selection)}}
    again = reorder("again", component_name="reuse_selector_scores", component_params=params,
                    warmup_step=0, update_step=8, update_times=1)  # fmt: skip
    result = cli("train", again)
    assert result.code == 0, result.err[-3000:]
    scores = dict(zip(content["indices"], content["metric"]["score"], strict=True))
    middle = float(np.median(list(scores.values())))
    assert served(tmp_path / "again") == sorted(range(48), key=lambda i: scores.get(i, middle))

    other = cli("train", again, "cutoff_len=12", f"output_dir={tmp_path / 'other'}")
    assert other.code == 3
    assert "made on other training rows" in other.message


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "unknown pattern": ({"pattern": "foldng"}, "pattern is 'foldng'; choose shuffle, sorting"),
    "negative window": ({"window_size": -4}, "window_size is -4"),
    "rho too big": (
        {"pattern": "saw", "pattern_params": {"num_sections": 3, "folding_ratio": 0.2}},
        "folding_ratio is 0.2: the folded parts of 3 sections would overlap",
    ),
    "unknown key": ({"score_param": {}}, "'score_param' (did you mean 'score_params'?)"),
    "no such file": ({"score_params": {"score_path": "no.npy"}}, "'no.npy' does not exist"),
    "a file of another kind": ({"score_params": {"score_path": "no.csv"}}, "expected a file .npy"),
    "missing column, raw": (
        {"score_params": {"score_field": "quality"}},
        "data set 'tiny_scored' has no column 'quality'; its columns are difficulty, input, "
        "instruction, output, skill.",
    ),
    "missing column, index": (
        {"score_params": {"score_field": "quality"}, "apply_at": "index"},
        "data set 'tiny_scored' has no column 'quality'",
    ),
    "column of words": (
        {"score_params": {"score_field": "skill"}}, "column 'skill': expected numbers",
    ),
    "wrong length": (
        {"score_params": {"score_path": str(TINY / "difficulty.jsonl")}, "apply_at": "index"},
        "has 480 scores, but there are 48 training rows",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_bad_parameters_are_refused_before_training(case: str, reorder: Write, cli: Any) -> None:
    params, message = REFUSED[case]
    result = cli("train", reorder(component_params=params))
    assert result.code == 2, result.err[-2000:]
    assert message in result.message


def test_raw_rows_are_refused_where_they_cannot_be_put_in_order(reorder: Write, cli: Any) -> None:
    result = cli("train", reorder(val_size=0.2, mix_strategy="interleave_under",
                                  tokenized_path="tokens"))  # fmt: skip
    assert result.code == 2
    for key in ("val_size is 0.2", "mix_strategy is 'interleave_under'", "tokenized_path is"):
        assert key in result.message
    assert "component_params.apply_at: index" in result.message
    packed = cli("train", reorder(packing=True, component_params={**SORTED, "apply_at": "index"}))
    assert packed.code == 2
    assert "packing is on" in packed.message
