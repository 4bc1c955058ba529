"""Under torchrun on a machine without a GPU: the same results, and one message for a failure.

test_screen.py has what two of its processes say, and that they agree.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")

FORCED = {"FORCE_TORCHRUN": "1", "DISABLE_VERSION_CHECK": "1"}


def selection(run: Path, step: int) -> dict[str, Any]:
    return dict(json.loads((run / "dataflex" / "selections" / f"step_{step}.json").read_text()))


def test_one_process_trains_as_without_torchrun(cli: Any, config: Any, tmp_path: Path) -> None:
    short = {"train_step": 3, "max_samples": 40}
    forced = config(output_dir=str(tmp_path / "forced"), **short)
    result = cli("train", forced, env=FORCED)
    assert result.code == 0, result.err[-3000:]
    plain = config(output_dir=str(tmp_path / "plain"), **short)
    assert cli("train", plain).code == 0
    chosen = [selection(tmp_path / name, 2)["indices"] for name in ("forced", "plain")]
    assert chosen[0] == chosen[1]
    adapters = [(tmp_path / name / "adapter_model.safetensors").read_bytes()
                for name in ("forced", "plain")]  # fmt: skip
    assert adapters[0] == adapters[1]


def test_ctrl_c_reaches_the_workers_and_is_one_message(
    cli: Any, config: Any, tmp_path: Path
) -> None:
    (tmp_path / "stopping.py").write_text(
        "import os, signal, time\n"
        "from dataflex.selectors.random import RandomSelector\n\n"
        "class Stopping(RandomSelector):\n"
        "    def select(self, count, context):\n"
        "        os.kill(os.getppid(), signal.SIGINT)\n"
        "        time.sleep(60)\n"
    )
    path = config(component_name="custom", component_params={"target": "stopping:Stopping"},
                  target_dataset=None, max_samples=40)  # fmt: skip
    result = cli("train", path, env=FORCED, cwd=tmp_path)
    assert result.code == 130, result.err[-3000:]
    assert result.err.count("error: ") == 1
    assert "resume_from_checkpoint=true" in result.message
    assert "Traceback" not in result.err


@pytest.mark.parametrize(
    ("scoring", "more"),
    [
        ("projected", {}),
        ("projected", {"gradient_type": "sgd", "preconditioner": "ekfac"}),
        (
            "projected",
            {
                "rerank": {"top": 0.3, "by": "cg", "curvature_rows": 7, "iterations": 3},
                "tokens_per_batch": 256,
            },
        ),
        ("direct", {}),
        ("direct", {"subset": "knn_uniform"}),
    ],
    ids=["projected", "projected, ekfac", "projected, rerank", "direct", "direct, knn_uniform"],
)
def test_two_processes_share_the_work_and_select_what_one_does(
    scoring: str, more: dict[str, Any], cli: Any, config: Any, tmp_path: Path
) -> None:
    """Rows 0-519 make three units: both ranks compute, rank 0 commits. Masks are those of rows.

    Direct scores have no units: fewer rows make as many batches for both ranks. The rows of a
    curvature are shared by their batches, small ones, of which one rank has more.
    """
    params = {"proj_dim": 128, "scoring": scoring, **more}
    rows = 60 if "rerank" in more else 520 if scoring == "projected" else 160
    changes = {"max_samples": rows, "train_step": 6, "warmup_step": 4, "save_steps": 50,
               "per_device_train_batch_size": 1, "lora_dropout": 0.1,
               "component_params": params}  # fmt: skip
    one = config("one.yaml", output_dir=str(tmp_path / "one"), **changes,
                 gradient_accumulation_steps=2)  # fmt: skip
    two = config("two.yaml", output_dir=str(tmp_path / "two"), **changes,
                 gradient_accumulation_steps=1)  # fmt: skip
    assert cli("train", one).code == 0
    result = cli("train", two, ranks=2)
    assert result.code == 0, result.err[-3000:]
    chosen = [selection(tmp_path / name, 4) for name in ("one", "two")]
    assert chosen[0]["indices"] == chosen[1]["indices"]
    scores = [np.array(c["metric"]["score"]) for c in chosen]
    np.testing.assert_allclose(scores[0], scores[1], atol=1e-5)


def test_a_failure_of_the_store_ends_every_rank(cli: Any, config: Any, tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "foreign.txt").write_text("not ours")
    result = cli("train", config(gradstore=str(tmp_path / "store")), ranks=2)
    assert result.code == 2


def test_a_configuration_is_refused_before_any_worker_starts(cli: Any, config: Any) -> None:
    result = cli("train", config(update_step=0), env=FORCED)
    assert result.code == 2
    assert result.err.splitlines()[0].startswith("error: update_step is 0")


def test_a_workers_failure_is_told_once_with_its_code(
    cli: Any, config: Any, tmp_path: Path
) -> None:
    """Only the workers look at the rows: those of the target have no response."""
    data = tmp_path / "data"
    data.mkdir()
    rows = [{"instruction": f"Say {i}.", "input": "", "output": str(i)} for i in range(60)]
    (data / "train.json").write_text(json.dumps(rows))
    (data / "goal.json").write_text(json.dumps([{**row, "output": None} for row in rows]))
    (data / "dataset_info.json").write_text(
        json.dumps({"tiny_train": {"file_name": "train.json"}, "goal": {"file_name": "goal.json"}})
    )
    path = config(dataset_dir=str(data), target_dataset="goal")
    result = cli("train", path, env={**FORCED, "NPROC_PER_NODE": "1"})
    assert result.code == 2, result.err[-3000:]
    assert result.err.count("error: ") == 1
    assert "Traceback" not in result.err
    assert "ChildFailedError" not in result.err
    assert "target set 'goal'" in result.message
