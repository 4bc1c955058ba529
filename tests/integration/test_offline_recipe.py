"""LESS's recipe, examples/offline/less.sh, on fewer rows; and a target that is added later."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
from pathlib import Path
from typing import Any

import numpy as np

from gradstore import open_store

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "examples" / "offline" / "less.sh"
SETS = ("tiny_target_date", "tiny_target_sort")

#: What makes each command short; what the script itself says goes before.
FEWER = {
    "train": ("num_train_epochs=2", "disable_tqdm=true", "lora_rank=4", "lora_target=q_proj"),
    "build": ("max_samples=40", "lora_rank=4", "lora_target=q_proj",
              "component_params.proj_dim=256"),
}  # fmt: skip


def commands(runs: Path) -> list[list[str]]:
    """Return the script's commands, its two variables filled in."""
    text = SCRIPT.read_text().replace("\\\n", " ")
    filled = text.replace("$here", "examples/offline").replace("$runs", str(runs))
    lines = [line for line in filled.splitlines() if "-cli " in line and not line.startswith("#")]
    return [shlex.split(line) for line in lines]


#: Stands in for both programs: notes the call, and leaves what the script looks for. As in truth,
#: `select` refuses a folder that holds anything, and a training writes its results at its end.
PROGRAM = """#!/usr/bin/env bash
set -euo pipefail
echo "$(basename "$0") $*" >>"$CALLS"
for word in "$@"; do
  case "$word" in output_dir=*) folder=${word#*=} ;; esac
done
if [ "$1" = train ]; then
  mkdir -p "$folder"
  [ "${DIES_IN:-}" != "$(basename "$folder")" ] || exit 1
  touch "$folder/train_results.json"
elif [ "$2" = select ]; then
  folder=${*: -1}
  [ ! -e "$folder" ] || exit 2
  mkdir -p "$folder"
  touch "$folder/dataset_info.json"
fi
"""


def test_the_script_runs_again_without_a_second_warm_up(tmp_path: Path) -> None:
    for name in ("llamafactory-cli", "dataflex-cli"):
        (tmp_path / name).write_text(PROGRAM)
        (tmp_path / name).chmod(0o755)
    calls, runs = tmp_path / "calls", tmp_path / "runs"
    inherited = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "CALLS": str(calls),
                 "RUNS": str(runs)}  # fmt: skip

    def run(**more: str) -> tuple[int, list[str]]:
        """Exit code of the script, and the commands that it ran: train, build, select, train."""
        calls.write_text("")
        ended = subprocess.run(["bash", str(SCRIPT)], env={**inherited, **more}, check=False)
        words = [line.split() for line in calls.read_text().splitlines()]
        return ended.returncode, [w[2] if w[1] == "gradstore" else w[1] for w in words]

    assert run(DIES_IN="warmup") == (1, ["train"])
    assert run() == (0, ["train", "build", "select", "train"])
    assert run() == (0, ["build", "select", "train"])
    assert (runs / "selected" / "dataset_info.json").is_file()


def less_influence(store: Path, sets: tuple[str, ...]) -> np.ndarray:
    """LESS's matching of stored features: arXiv 2402.04333, definition 3.1 and section 4.2.

    Sum over checkpoints of the mean learning rate times the cosine of a training row's and a target
    row's feature; mean over a sub-task's rows; maximum over sub-tasks.
    """
    opened = open_store(store)
    total: dict[str, Any] = {name: 0.0 for name in sets}
    for train in (g for g in opened.generations() if g.role == "train"):
        step = train.name.split("/")[-1]
        rows = train.read(0, train.rows).astype(np.float64)
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        for name in sets:
            part = opened.generation(f"target/{name}/{step}")
            target = part.read(0, part.rows).astype(np.float64)
            target /= np.linalg.norm(target, axis=1, keepdims=True)
            total[name] = total[name] + train.record.learning_rate * (rows @ target.T)
    return np.max([scores.mean(axis=1) for scores in total.values()], axis=0)


def test_the_four_commands_select_what_less_does_and_a_target_is_added_later(
    cli: Any, tmp_path: Path
) -> None:
    steps = commands(tmp_path)
    assert [Path(argv[0]).name for argv in steps] == [
        "llamafactory-cli", "dataflex-cli", "dataflex-cli", "llamafactory-cli"
    ]  # fmt: skip
    for argv in steps:
        kind = argv[2] if argv[1] == "gradstore" else argv[1]
        fewer = {"max_samples=80": "max_samples=16", "80": "6"}
        given = [fewer.get(part, part) for part in argv]
        result = cli(*given[1:], *FEWER.get(kind, ()), program=given[0])
        assert result.code == 0, (argv, result.err[-3000:])

    store = tmp_path / "warmup" / "gradstore"
    before = {g.name: g.commit_sha for g in open_store(store).generations()}
    assert len([name for name in before if name.startswith("train/")]) == 2, "one an epoch"
    expected = less_influence(store, SETS)
    best = np.argsort(-expected, kind="stable")[:6]
    told = json.loads(cli("gradstore", "score", store, "--checkpoints", "all", "--json").out)
    rates = [g.record.learning_rate for g in open_store(store).generations() if g.role == "train"]
    np.testing.assert_allclose(told["scores"], expected / sum(rates), atol=2e-6)
    lines = (tmp_path / "selected" / "tiny_train.jsonl").read_text().splitlines()
    chosen = [json.loads(line) for line in lines]
    rows = json.loads((ROOT / "examples" / "tiny" / "data" / "train.json").read_text())
    assert [row["output"] for row in chosen] == [rows[i]["output"] for i in best]
    assert (tmp_path / "selected-run" / "adapter_model.safetensors").is_file()

    files = {p: p.stat().st_mtime_ns for p in store.rglob("train/**/*") if p.is_file()}
    result = cli(*steps[1][1:], *FEWER["build"], "target_dataset=tiny_target_spell")
    assert result.code == 0, result.err[-3000:]
    after = {g.name: g.commit_sha for g in open_store(store).generations()}
    added = set(after) - set(before)
    assert {name.rsplit("/", 1)[0] for name in added} == {"target/tiny_target_spell"}
    assert {name: after[name] for name in before} == before
    assert files
    assert {p: p.stat().st_mtime_ns for p in files} == files, "no training row was touched"
    assert "gradients of train/" not in result.err, "nor computed"
    told = json.loads(
        cli("gradstore", "score", store, "--checkpoints", "all", "--target", "tiny_target_spell",
            "--json").out
    )  # fmt: skip
    expected = less_influence(store, ("tiny_target_spell",))
    np.testing.assert_allclose(told["scores"], expected / sum(rates), atol=2e-6)
