"""`gradstore eval` on the embedded model: retrained models are banked, resumed and reused."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from sklearn.metrics import average_precision_score

from gradstore import open_store
from gradstore.evaluation import draw_subsets
from gradstore.evaluation.bank import Bank, _subset_hash

TINY = Path(__file__).resolve().parents[2] / "examples" / "tiny" / "data"
SUBSETS = 6


def entries(bank: Path) -> dict[str, Any]:
    """What each banked retraining measured, by file."""
    found = {p.name: json.loads(p.read_text()) for p in sorted((bank / "entries").glob("*.json"))}
    return {name: entry["losses"] for name, entry in found.items()}


def entry_of_first_subset(bank: Path) -> str:
    """Name of the file of the first subset that the command draws."""
    (path,) = (bank / "entries").glob(f"{_subset_hash(draw_subsets(40, 1)[0])[:32]}-42.json")
    return path.name


def mean_loss_by_hand(cli: Any, config: Any, folder: Path, keys: dict[str, Any]) -> float:
    """LlamaFactory's own evaluation after its own training on a file of the first subset.

    The file's rows are in the order in which the run of all 40 has them, and are not shuffled.
    """
    held = json.loads((TINY / "train.json").read_text())
    info = json.loads((TINY / "dataset_info.json").read_text())
    order = torch.randperm(40, generator=torch.Generator().manual_seed(42)).tolist()
    part = [held[row] for row in order if draw_subsets(40, 1)[0, row]]
    (folder / "part.json").write_text(json.dumps(part))
    for target in info.values():
        target["file_name"] = str(TINY / target["file_name"])
    info["part"] = {**info["tiny_train"], "file_name": "part.json"}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    ours = ("component_name", "component_params", "target_dataset", "warmup_step", "update_step",
            "update_times", "gradstore_run")  # fmt: skip
    path = config("plain.yaml", **keys | dict.fromkeys(ours), train_type="static", dataset="part",
                  dataset_dir=str(folder), output_dir=str(folder / "plain"), do_eval=True,
                  eval_dataset="tiny_target", per_device_eval_batch_size=1,
                  disable_shuffling=True)  # fmt: skip
    trained = cli("train", path)
    assert trained.code == 0, trained.err[-3000:]
    return float(json.loads((folder / "plain" / "eval_results.json").read_text())["eval_loss"])


def lds_by_hand(bank: Path, store: Path) -> float:
    """LDS of the cosines of the store's features with the losses in the bank."""
    held = {each.role: each for each in open_store(store).generations()}
    train, target = (held[role].read(0, held[role].rows).astype(np.float64)
                     for role in ("train", "target"))  # fmt: skip
    lengths = np.linalg.norm(target, axis=1)[:, None] * np.linalg.norm(train, axis=1)
    cosines, masks = target @ train.T / lengths, draw_subsets(40, SUBSETS)
    measured = entries(bank)
    losses = np.array([measured[f"{_subset_hash(mask)[:32]}-42.json"] for mask in masks])
    found = [spearmanr(masks @ cosines[q], -losses[:, q]).statistic for q in range(len(cosines))]
    return float(np.mean(found))


def test_a_killed_evaluation_goes_on_and_a_second_one_retrains_nothing(
    cli: Any, config: Any, tmp_path: Path
) -> None:
    keys = {"component_params": {"proj_dim": 64, "gradient_type": "sgd"}, "max_samples": 40,
            "max_steps": 4, "gradient_accumulation_steps": 1, "warmup_step": 1,
            "gradstore_run": "a", "update_step": 1}  # fmt: skip
    path, store, bank = config(**keys), tmp_path / "run" / "gradstore", tmp_path / "bank"
    built = cli("gradstore", "build", path)
    assert built.code == 0, built.err[-3000:]
    asked = ("gradstore", "eval", store, path, "--bank", bank, "--subsets", SUBSETS)

    refused = cli(*asked)
    assert refused.code == 2, refused.err[-3000:]
    assert f"{SUBSETS} retrainings are missing" in refused.message
    assert "about" in refused.message
    assert not entries(bank)

    child = cli(*asked, "--budget", SUBSETS, background=tmp_path / "told").code
    until = time.monotonic() + 180
    while len(entries(bank)) < 2 and time.monotonic() < until:
        time.sleep(0.02)
    os.kill(child, signal.SIGKILL)
    before = entries(bank)
    assert 2 <= len(before) < SUBSETS

    done = cli(*asked, "--budget", SUBSETS - len(before), "--json")
    assert done.code == 0, done.err[-3000:]
    assert f"retrained {SUBSETS} of {SUBSETS}" in done.err
    assert "train_runtime" not in done.err  # a line for each retraining is told, no more
    after = entries(bank)
    assert before.items() <= after.items()
    assert len({tuple(losses) for losses in after.values()}) == SUBSETS
    first = json.loads(done.out)
    assert first["retrainings"] == SUBSETS
    assert first["retrained_now"] == SUBSETS - len(before)
    assert first["mean"] == pytest.approx(lds_by_hand(bank, store), abs=1e-6)
    assert -1 <= first["low"] < first["mean"] < first["high"] <= 1

    assert mean_loss_by_hand(cli, config, tmp_path, keys) == pytest.approx(
        np.mean(after[entry_of_first_subset(bank)]), rel=1e-5
    )

    # A model retrained by another process gives the same losses: none leaks into the next.
    name = sorted(after)[-1]
    (bank / "entries" / name).unlink()
    again = cli(*asked, "--budget", 1, "--json")
    assert again.code == 0, again.err[-3000:]
    assert entries(bank) == after
    table = cli(*asked)
    assert table.code == 0, table.err[-3000:]
    assert f"{first['mean']:.3f}" in table.out

    # The component's own product is judged, unless another is asked for.
    judged = {}
    fisher = "component_params.preconditioner=fisher"
    for named in (("--preconditioner", "fisher"), (fisher,), (fisher, "--preconditioner", "none")):
        answer = cli(*asked, *named, "--json")
        assert answer.code == 0, answer.err[-3000:]
        judged[named] = json.loads(answer.out)
    by_option, by_component, overruled = judged.values()
    assert by_option == by_component
    assert by_option["product"]["preconditioner"] == "fisher"
    assert by_option["mean"] != first["mean"]
    assert overruled == {**first, "retrained_now": 0}

    steps = ("gradstore", "eval", store, path, "--metric", "tail_patch", "--k", 2, "--json")
    patched = cli(*steps, "--bank", bank)
    assert patched.code == 0, patched.err[-3000:]
    assert "steps from the model as it is configured, learning rate 0.002" in patched.err
    gains = json.loads(patched.out)
    assert gains["retrainings"] == 0
    assert gains["queries"] == gains["tail_patch_log"]["queries"] == 32
    assert (
        gains["tail_patch_log"]["low"] > 0
    )  # rows of highest influence gain more than random ones
    assert 0 < gains["mean"] < gains["tail_patch_log"]["mean"]  # p is below 1, and so is its slope
    kept = {entry: entry.stat().st_mtime_ns for entry in (bank / "steps").rglob("*.json")}
    assert len(kept) > 2
    again = cli(*steps, "--bank", bank)
    assert json.loads(again.out) == gains
    assert {entry: entry.stat().st_mtime_ns for entry in (bank / "steps").rglob("*.json")} == kept

    other = cli(*asked, "learning_rate=0.001")
    assert other.code == 3, other.err[-3000:]
    assert "learning_rate" in other.message
    redrawn = cli(*asked, "--order", "redrawn")
    assert redrawn.code == 3, redrawn.err[-3000:]
    assert "order: 'run' in the bank, 'redrawn' now" in redrawn.message


def test_scores_of_a_file_are_judged_by_planted_rows_and_by_a_bank(
    cli: Any, config: Any, tmp_path: Path
) -> None:
    keys = {"component_params": {"proj_dim": 64, "gradient_type": "sgd"}, "max_samples": 40,
            "max_steps": 4, "target_dataset": "tiny_target_add,tiny_target_vowels"}  # fmt: skip
    path, bank, file = config(**keys), tmp_path / "bank", tmp_path / "scores.npy"
    skills = [row["skill"] for row in json.loads((TINY / "train.json").read_text())[:40]]
    asked = [row["skill"] for name in ("add", "vowels")
             for row in json.loads((TINY / "targets" / f"{name}.json").read_text())]  # fmt: skip
    scores = np.random.default_rng(1).normal(size=(len(asked), 40))
    np.save(file, scores)

    def judged(metric: str, *options: object) -> Any:
        found = cli("gradstore", "eval", "-", path, "--scores", file, "--json", "--metric", metric,
                    *options)  # fmt: skip
        assert found.code == 0, found.err[-3000:]
        return json.loads(found.out)

    planted = np.array([[skill == own for skill in skills] for own in asked])
    ranked = np.take_along_axis(planted, np.argsort(-scores, axis=1), axis=1)
    assert len(np.unique(planted, axis=0)) == 2
    for metric, options, expected in (
        ("recall", ("--k", 12), ranked[:, :12].sum(axis=1) / ranked.sum(axis=1)),
        ("mrr", (), 1 / (ranked.argmax(axis=1) + 1)),
        ("auprc", (), [average_precision_score(*each)
                       for each in zip(planted, scores, strict=True)]),
    ):  # fmt: skip
        found = judged(metric, "--planted", "skill", *options)
        assert found["values"] == pytest.approx(list(expected)), metric
        assert found["metric"] == metric

    # A bank of this training, filled by a formula: each row lowers each query's loss by so much.
    effects = np.random.default_rng(2).normal(size=scores.shape)
    by_bank = ("--bank", bank, "--share", 0.1, "--controls", 3)
    refused = cli("gradstore", "eval", "-", path, "--scores", file, "--metric", "qld", *by_bank)
    assert refused.code == 2, refused.err[-3000:]
    assert f"{len(asked) + 3} retrainings are missing" in refused.message
    described = json.loads((bank / "bank.json").read_text())["configuration"]
    sizes = [described.pop(key) for key in ("bank_rows", "bank_queries")]
    assert sizes == [40, len(asked)]
    noise = np.random.default_rng(0).random((3, 40))
    order = np.argsort(-np.concatenate([scores, noise]), axis=1)
    masks = np.ones((len(asked) + 3, 40), dtype=bool)
    np.put_along_axis(masks, order[:, :4], False, axis=1)
    Bank(bank, described, *sizes).fill(
        masks, lambda rows, seed: 9 - effects[:, rows].sum(axis=1), budget=len(masks), seed=42
    )
    found = judged("qld", *by_bank)
    own = [effects[q, order[q, :4]].sum() for q in range(len(asked))]
    random = [effects[:, order[-c, :4]].sum(axis=1) for c in (3, 2, 1)]
    assert found["values"] == pytest.approx(list(own - np.mean(random, axis=0)))
    assert (found["retrainings"], found["retrained_now"]) == (len(masks), 0)

    missing = cli("gradstore", "eval", "-", path, "--scores", file, "--metric", "recall",
                  "--planted", "poison")  # fmt: skip
    assert missing.code == 2
    assert "has no column 'poison'" in missing.message
