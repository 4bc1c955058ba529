"""`gradstore replay` on the embedded model: the real run's end, and what reweighted runs say."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy.stats import spearmanr
from sklearn.metrics import ndcg_score

#: 20 rows in micro-batches of 3, two a step: the last step of an epoch has one, of 2 rows.
RUN: dict[str, Any] = {
    "max_samples": 20,
    "per_device_train_batch_size": 3,
    "gradient_accumulation_steps": 2,
    "num_train_epochs": 2,
    "lora_dropout": 0,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 2,
    "weight_decay": 0.1,
    "max_grad_norm": 0.5,
    "optim": "adamw_torch",
    "save_steps": 4,
    "train_type": "static",
    **dict.fromkeys(
        ("component_name", "component_params", "warmup_step", "update_step", "update_times")
    ),
}


def test_a_replay_ends_where_the_run_did_and_says_what_reweighted_runs_say(
    cli: Any, config: Any, tmp_path: Path
) -> None:
    path, table = config(**RUN), tmp_path / "replay.parquet"
    trained = cli("train", path)
    assert trained.code == 0, trained.err[-3000:]
    half = tmp_path / "run" / "checkpoint-4"
    replayed = cli("gradstore", "replay", path, f"resume_from_checkpoint={half}",
                   "--rows", "0-19", "-o", table)  # fmt: skip
    assert replayed.code == 0, replayed.err[-3000:]
    assert "helped" in replayed.out
    listed = pq.read_table(table).to_pydict()
    assert listed["row"] == list(range(20))
    assert set(listed["target"]) == {"tiny_target"}
    assert set(listed["times"]) == {1}  # the second of two epochs
    others, order = tmp_path / "others.parquet", np.random.default_rng(0).permutation(20)
    scores = np.array(listed["score"]) + np.random.default_rng(1).normal(
        scale=np.std(listed["score"]), size=20
    )
    pq.write_table(pa.table({"row": order, "score": scores[order]}), others)
    exact = np.array(listed["score"])
    best, found = ({*np.argsort(-each)[:5]} for each in (exact, scores))
    for metric, option, expected in (
        ("spearman", (), spearmanr(scores, exact).statistic),
        ("overlap", ("--share", 0.25), len(best & found) / 5),
        ("ndcg", ("--k", 5), ndcg_score([np.maximum(exact, 0)], [scores], k=5)),
    ):
        judged = cli("gradstore", "eval", "-", path, "--metric", metric, *option,
                     "--truth", table, "--scores", others, "--json")  # fmt: skip
        assert judged.code == 0, judged.err[-3000:]
        assert 0.1 < expected < 0.95, metric
        assert json.loads(judged.out)["mean"] == pytest.approx(expected), metric

    oracle = Path(__file__).parent / "replay_oracle.py"
    done = cli(oracle, path, half, tmp_path / "run", table, program="python", heavy=True)
    assert done.code == 0, done.err[-3000:]
    found = json.loads(done.out.splitlines()[-1])
    assert found["steps"] == [8, 4]
    assert found["sizes"] == [[3, 3], [3, 3], [3, 3], [2]] * 2
    assert found["taken"] == 4
    assert found["rates"][0] == 0 < found["rates"][1] < found["rates"][2] > found["rates"][7]
    assert max(found["whole"], found["rest"]) <= 1e-6
    assert found["fused"] <= 1e-5
    assert len(found["relative"]) == 20
    assert max(found["relative"]) <= 1e-3


def test_a_dry_run_says_the_price_and_a_price_above_the_limits_is_refused(
    cli: Any, config: Any, tmp_path: Path
) -> None:
    path = config(**RUN)
    dry = cli("gradstore", "replay", path, "--dry-run")
    assert dry.code == 0, dry.err[-3000:]
    assert "8 steps" in dry.out
    assert "states" in dry.out
    assert "in all about" in dry.out

    for limit, named in (
        ("--hours=0.000001", "limit 0.0036 s"),
        ("--memory=0.0001", "limit 105 KiB"),
    ):
        refused = cli("gradstore", "replay", path, limit)
        assert refused.code == 2, refused.err[-3000:]
        assert "replay of 8 steps would take about" in refused.message
        assert named in refused.message
    assert not (tmp_path / "run").exists()


def test_a_replay_killed_on_its_way_back_goes_on_to_the_same_table(
    cli: Any, config: Any, tmp_path: Path
) -> None:
    path, table, whole = config(**RUN), tmp_path / "replay.parquet", tmp_path / "whole.parquet"
    asked = ("gradstore", "replay", path, "--segment", 1)
    uninterrupted = cli(*asked, "-o", whole)
    assert uninterrupted.code == 0, uninterrupted.err[-3000:]
    assert not whole.with_name("whole.parquet.states").exists()

    states = tmp_path / "replay.parquet.states"
    child = cli(*asked, "-o", table, background=tmp_path / "told").code
    until = time.monotonic() + 180
    while not (states / "backwards.safetensors").exists() and time.monotonic() < until:
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    assert (states / "backwards.safetensors").exists(), (tmp_path / "told").read_text()[-3000:]
    assert not table.exists()

    other = cli(*asked, "-o", table, "learning_rate=0.001")
    assert other.code == 3, other.err[-3000:]
    assert "learning_rate was 0.002, is 0.001" in other.message

    again = cli(*asked, "-o", table)
    assert again.code == 0, again.err[-3000:]
    left = re.search(r"goes on from .*: (\d) of 8 segments are left", again.err)
    assert left is not None, again.err[-3000:]
    assert int(left[1]) < 8
    assert pq.read_table(table).equals(pq.read_table(whole))  # to the bit
    assert not states.exists()


def test_ctrl_c_ends_a_replay_with_130(cli: Any, config: Any, until: Any, tmp_path: Path) -> None:
    told = tmp_path / "told"
    path = config(**RUN | {"num_train_epochs": 500})
    process = cli("gradstore", "replay", path, background=told).code
    try:
        until(told, "replay of 2000 steps")
    finally:
        os.kill(process, signal.SIGINT)
    assert cli.ended(process) == 130, told.read_text()[-3000:]
    assert "error: interrupted. Run the same command again." in told.read_text()


@pytest.mark.parametrize(
    ("key", "named"),
    [
        ("lora_dropout=0.1", "lora_dropout is 0.1"),
        ("streaming=true", "streaming is on, but gradstore replay"),
        ("packing=true", "packing is on, but gradstore replay"),
        ("bf16=true", "bf16 is True"),
    ],
)
def test_a_run_that_no_replay_follows_is_refused_before_a_model_is_loaded(
    cli: Any, config: Any, key: str, named: str
) -> None:
    refused = cli("gradstore", "replay", config(**RUN), key, *(
        ["max_steps=3"] if "streaming" in key else []))  # fmt: skip
    assert refused.code == 2, refused.err[-3000:]
    assert named in refused.message
    assert "Loading weights" not in refused.err
