"""Every example YAML: it runs, a kill in mid-interval changes nothing, nor do two processes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dataflex.checkpoints.state import load_state
from dataflex.run.log import read_events

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = sorted(
    path
    for kind in ("train_lora", "train_full")
    for path in (ROOT / "examples" / kind).rglob("*.yaml")
)

#: A run of 8 steps: warm-up 0-1, updates at 2 and 5, checkpoints at 3 and 6 (in mid-interval).
SHORT = ("max_samples=48", "warmup_step=2", "update_step=3", "update_times=2",
         "train_step=8", "logging_steps=1", "save_steps=3", "disable_tqdm=true",
         "do_eval=false", "overwrite_cache=true", "report_to=none")  # fmt: skip

#: How most examples name their model.
TINY = "model_name_or_path: examples/tiny/model\n"

#: What single examples need beside that, by folder and file name.
MORE: dict[str, tuple[str, ...]] = {
    "reorders/folding": ("max_samples=480",),  # its file has a score for each of them
    "selectors/less_rerank": ("component_params.rerank.iterations=4",),  # each is a pass
    # Adam's steps enlarge what the order of sums leaves: by few, two processes still agree closely.
    "selectors/mirror": ("component_params.target_epochs=2",),
}

#: Where both folders hold an example of one name, the one of train_lora is meant.
NAMED = {f"{path.parent.name}/{path.stem}": path for path in EXAMPLES}

#: Run with two processes as well: at least one of each kind, and what shares work.
TWO_PROCESSES = tuple(NAMED[name] for name in (
    "selectors/less", "selectors/loss", "selectors/nice", "selectors/random",
    "selectors/cluster_less", "selectors/near", "selectors/online", "selectors/mirror",
    "mixers/odm", "mixers/doremi_step2_dynamic", "reorders/dynamic_sorting", "reorders/saw",
    "pipelines/hierarchical", "pipelines/doremi_then_weight", "weighters/joint_update_aware",
    "weighters/loss"))  # fmt: skip
TWO_PROCESSES = (*TWO_PROCESSES, ROOT / "examples/train_full/selectors/less.yaml")


def batch_size(path: Path) -> int:
    """Rows of a step; two for each of two processes."""
    return 4 if path in TWO_PROCESSES else 2


def settings(path: Path, run: Path) -> tuple[str, ...]:
    more = MORE.get(f"{path.parent.name}/{path.stem}", ())
    size = f"per_device_train_batch_size={batch_size(path)}"
    return (*SHORT, size, *more, f"output_dir={run}")


def weights_of(run: Path) -> bytes:
    for name in ("adapter_model.safetensors", "model.safetensors"):
        if (run / name).is_file():
            return (run / name).read_bytes()
    raise AssertionError(f"{run} holds no weights")


def told(run: Path) -> list[dict[str, Any]]:
    """Events without what a clock or a cache decides."""
    volatile = {"tokens"}
    return [
        {k: v for k, v in event.items() if not k.endswith("seconds") and k not in volatile}
        for event in read_events(run / "dataflex")
    ]


def without_identity(state: Any) -> Any:
    """A component's state, or those of a pipeline's stages, without which store it is."""
    if isinstance(state, dict):
        named = {k: v for k, v in state.items() if "uuid" not in k and k != "commit"}
        return {k: without_identity(v) for k, v in named.items()}
    return [without_identity(v) for v in state] if isinstance(state, list) else state


def assert_same(one: Any, other: Any, where: str = "state", tolerance: float = 0.0) -> None:
    """Equal; numbers that are no whole ones within a tolerance, relative and absolute."""
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_same(one[key], other[key], f"{where}.{key}", tolerance)
    elif isinstance(one, np.ndarray):
        assert one.dtype == other.dtype, where
        if one.dtype.kind == "f":
            np.testing.assert_allclose(one, other, rtol=tolerance, atol=tolerance, err_msg=where)
        else:
            np.testing.assert_array_equal(one, other, err_msg=where)
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), where
        for i, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_same(a, b, f"{where}.{i}", tolerance)
    elif isinstance(one, float):
        assert one == pytest.approx(other, rel=tolerance, abs=tolerance, nan_ok=True), where
    else:
        assert one == other, where


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: f"{p.parts[-3]}-{p.parent.name}-{p.stem}")
def test_it_runs_and_neither_a_kill_nor_two_processes_change_anything(
    path: Path, cli: Any, model: Path, tmp_path: Path
) -> None:
    """What a kill at step 7 leaves is copied from the whole run; test_resume.py kills for real."""
    whole, killed = tmp_path / "whole", tmp_path / "run"
    smaller = [f"model_name_or_path={model}"] if TINY in path.read_text() else []
    # The same folder for both: some of its files name it.
    options = (*settings(path, killed), *smaller)
    faults = {"trace": str(tmp_path / "a"), "copy_step": [7, str(tmp_path / "copy")]}
    result = cli("train", path, *options, faults=faults, draws=True)
    assert result.code == 0, result.err[-3000:]
    killed.rename(whole)
    (tmp_path / "copy").rename(killed)
    assert_shown(whole, result.out)
    if path.parent.name == "selectors" and path.stem != "online":
        rows = 3 * batch_size(path)
        chosen = selections(whole)
        assert [len(indices) for indices, _ in chosen.values()] == [rows, rows], "of 3 steps"
        assert '"dataflex/kept_share"' in (whole / "trainer_log.jsonl").read_text()

    before = (tmp_path / "a").read_text().splitlines(keepends=True)
    (tmp_path / "b").write_text("".join(line for line in before if int(line.split()[0]) < 7))
    result = cli("train", path, *options, "resume_from_checkpoint=true",
                 faults={"trace": str(tmp_path / "b")})  # fmt: skip
    assert result.code == 0, result.err[-3000:]
    lines = [sorted(set((tmp_path / name).read_text().splitlines())) for name in "ab"]
    assert lines[0] == lines[1], "the same rows at every step"
    assert len(lines[0]) == 8
    assert_resumed(whole, killed)

    if path in TWO_PROCESSES:
        two = tmp_path / "two"
        size = f"per_device_train_batch_size={batch_size(path) // 2}"
        result = cli("train", path, *settings(path, two), *smaller, size, ranks=2)
        assert result.code == 0, result.err[-3000:]
        assert_two_decide_what_one_does(whole, two)


def assert_shown(run: Path, out: str) -> None:
    """A run's picture, report, log and table."""
    assert (run / "dataflex" / "picture.png").stat().st_size > 5_000
    report = (run / "dataflex" / "report.html").read_text()
    assert 10_000 < len(report) < 1_500_000
    assert all(str(event["component"]) in report for event in read_events(run / "dataflex"))
    table = out.rpartition("Updates of this run")[2].splitlines()
    assert len(table) > 4, "the table of updates has rows, on stdout"
    assert not table[-1].strip("└┴─┘"), "and is the last that is said"
    logged = (run / "trainer_log.jsonl").read_text()
    assert '"dataflex/' in logged, "the Trainer's log carries the strategy's numbers"


def assert_resumed(whole: Path, killed: Path) -> None:
    """To the bit what the run that was not killed ended with."""
    assert weights_of(whole) == weights_of(killed)
    assert told(whole) == told(killed)
    assert rows_to_read(whole) == rows_to_read(killed)
    assert "Session 2" in (killed / "dataflex" / "report.html").read_text()
    for step in (6, 8):
        one, other = (load_state(run / f"checkpoint-{step}") for run in (whole, killed))
        for part in ("settings", "more"):
            assert_same(getattr(one, part), getattr(other, part), part)
        assert_same(without_identity(one.component), without_identity(other.component))


def assert_two_decide_what_one_does(one: Path, two: Path) -> None:
    """Rows, counts and order are the same, numbers but for the order of sums.

    With half the rows on each of two ranks a micro-batch over the ranks holds what the single
    process has in one: it is over these that joint_update_aware lets samples compete. (That the
    ranks agree with each other about the rows, the trainer checks at every interval.)
    """
    assert told(one), "something was decided"
    assert_same(told(one), told(two), "events", tolerance=1e-4)
    assert_same(selections(one), selections(two), "selections", tolerance=1e-4)
    for step in (6, 8):
        states = [load_state(run / f"checkpoint-{step}") for run in (one, two)]
        for part in ("settings", "component", "more"):
            first, second = (without_identity(getattr(state, part)) for state in states)
            assert_same(first, second, f"checkpoint-{step}.{part}", tolerance=1e-4)
    # A rank that trained on other rows of the interval, or weighted its own otherwise, shows here.
    assert len(losses(one)) == 8
    assert_same(losses(one), losses(two), "loss", tolerance=1e-4)


def selections(run: Path) -> dict[str, Any]:
    files = sorted((run / "dataflex" / "selections").glob("*.json"))
    found = {path.name: json.loads(path.read_text()) for path in files}
    return {name: (content["indices"], content["metric"]) for name, content in found.items()}


def rows_to_read(run: Path) -> dict[str, str]:
    files = (run / "dataflex" / "selections").glob("*.jsonl")
    return {path.name: path.read_text() for path in files}


def losses(run: Path) -> list[float]:
    """Of every step, as the Trainer logs them: means over the rows of all ranks."""
    lines = map(json.loads, (run / "trainer_log.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]
