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

from gradstore.evaluation import draw_subsets
from gradstore.evaluation.bank import _subset_hash

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
    """LlamaFactory's own evaluation after its own training on a file of the first subset."""
    held = json.loads((TINY / "train.json").read_text())
    info = json.loads((TINY / "dataset_info.json").read_text())
    part = [held[row] for row in np.flatnonzero(draw_subsets(40, 1)[0])]
    (folder / "part.json").write_text(json.dumps(part))
    for target in info.values():
        target["file_name"] = str(TINY / target["file_name"])
    info["part"] = {**info["tiny_train"], "file_name": "part.json"}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    ours = ("component_name", "component_params", "target_dataset", "warmup_step", "update_step",
            "update_times", "gradstore_run")  # fmt: skip
    path = config("plain.yaml", **keys | dict.fromkeys(ours), train_type="static", dataset="part",
                  dataset_dir=str(folder), output_dir=str(folder / "plain"), do_eval=True,
                  eval_dataset="tiny_target", per_device_eval_batch_size=1)  # fmt: skip
    trained = cli("train", path)
    assert trained.code == 0, trained.err[-3000:]
    return float(json.loads((folder / "plain" / "eval_results.json").read_text())["eval_loss"])


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
    assert -1 <= first["low"] <= first["mean"] <= first["high"] <= 1

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
    assert overruled == first

    patched = cli("gradstore", "eval", store, path, "--metric", "tail_patch", "--k", 2, "--json")
    assert patched.code == 0, patched.err[-3000:]
    assert "steps from the model as it is configured, learning rate 0.002" in patched.err
    gains = json.loads(patched.out)
    assert gains["retrainings"] == 0
    assert gains["queries"] == 32
    assert gains["low"] > 0  # rows of highest influence gain more than random ones

    other = cli(*asked, "learning_rate=0.001")
    assert other.code == 3, other.err[-3000:]
    assert "learning_rate" in other.message
