"""kill -9 at any step, then the same command again: nothing differs from an uninterrupted run."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from dataflex.checkpoints.folders import check_sound, resume_point
from dataflex.checkpoints.seal import seal
from dataflex.config.keys import DataFlexConfig, RunConfig
from gradstore.errors import DamagedData


def selections(run: Path) -> dict[str, Any]:
    found = {}
    for path in sorted((run / "dataflex" / "selections").glob("*.json")):
        content = json.loads(path.read_text())
        found[path.name] = (content["indices"], content["metric"]["score"])
    return found


def trace_of(path: Path) -> dict[str, str]:
    """Step -> hash of its micro-batches; a step served twice must be served equal."""
    found: dict[str, str] = {}
    for line in path.read_text().splitlines():
        step, digest = line.split()
        assert found.setdefault(step, digest) == digest, f"step {step} was served differently"
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Filled by the first test that needs it: the uninterrupted run."""
    return {"folder": tmp_path_factory.mktemp("whole")}


def uninterrupted(whole: dict[str, Any], cli: Any, config: Any) -> dict[str, Any]:
    if "adapter" not in whole:
        run = whole["folder"] / "run"
        trace = whole["folder"] / "trace"
        result = cli("train", config(output_dir=str(run)), faults={"trace": str(trace)})
        assert result.code == 0, result.err[-3000:]
        whole["adapter"] = (run / "adapter_model.safetensors").read_bytes()
        whole["selections"] = selections(run)
        whole["trace"] = trace_of(trace)
    return whole


@pytest.mark.parametrize(
    "faults",
    [[{"kill_step": 1}, {"kill_step": 3}, {"kill_step": 5}, {"kill_step": 7}],
     [{"kill_step": 2}, {"kill_rows": 60}, {"kill_saving": 4}, {"kill_step": 4}]],
    ids=["steps", "select and save"],
)  # fmt: skip
def test_a_run_killed_again_and_again_resumes_to_the_same_bits(
    faults: list[dict[str, int]], whole: dict[str, Any], cli: Any, config: Any, tmp_path: Path
) -> None:
    """Before and after a selection, within one, in mid-interval and within a checkpoint."""
    expected = uninterrupted(whole, cli, config)
    path, run, trace = config(), tmp_path / "run", tmp_path / "trace"
    for fault in faults:
        assert cli("train", path, faults={**fault, "trace": str(trace)}).code == -9, fault
    result = cli("train", path, faults={"trace": str(trace)})
    assert result.code == 0, result.err[-3000:]
    assert trace_of(trace) == expected["trace"]
    assert selections(run) == expected["selections"]
    assert (run / "adapter_model.safetensors").read_bytes() == expected["adapter"]


def test_two_processes_killed_in_mid_interval_resume_to_the_same_bits(
    cli: Any, config: Any, tmp_path: Path
) -> None:
    """Step 7 lies in the interval of steps 5 to 7, of which checkpoint 6 has the rows."""
    changes = {"component_name": "loss", "component_params": {}, "train_step": 8}
    whole = config("whole.yaml", output_dir=str(tmp_path / "whole"), **changes)
    result = cli("train", whole, faults={"trace": str(tmp_path / "a")}, ranks=2)
    assert result.code == 0, result.err[-3000:]
    path, trace = config(**changes), str(tmp_path / "b")
    assert cli("train", path, faults={"kill_step": 7, "trace": trace}, ranks=2).code == -9
    result = cli("train", path, faults={"trace": trace}, ranks=2)
    assert result.code == 0, result.err[-3000:]

    traces = {name: trace_of(tmp_path / name) for name in ("a.0", "a.1", "b.0", "b.1")}
    assert traces["a.0"] == traces["b.0"]
    assert traces["a.1"] == traces["b.1"]
    assert len(traces["a.0"]) == len(traces["a.1"]) == 8
    assert not set(traces["a.0"].values()) & set(traces["a.1"].values()), "each has its own rows"
    assert (tmp_path / "b.1").read_text().splitlines()[7].startswith("6 "), "resumed at step 6"
    assert selections(tmp_path / "run") == selections(tmp_path / "whole")
    adapters = [(tmp_path / n / "adapter_model.safetensors").read_bytes() for n in ("run", "whole")]
    assert adapters[0] == adapters[1]
    sealed = json.loads((tmp_path / "run/checkpoint-8/dataflex/manifest.json").read_text())["files"]
    assert {"rng_state_0.pth", "rng_state_1.pth", "trainer_state.json"} <= set(sealed)


def test_a_finished_run_started_again_trains_no_step(
    whole: dict[str, Any], cli: Any, config: Any
) -> None:
    expected = uninterrupted(whole, cli, config)
    run = whole["folder"] / "run"
    trace = whole["folder"] / "again"
    trace.touch()
    result = cli("train", config(output_dir=str(run)), faults={"trace": str(trace)})
    assert result.code == 0, result.err[-3000:]
    assert len(trace_of(trace)) <= 1
    assert (run / "adapter_model.safetensors").read_bytes() == expected["adapter"]


def test_an_incomplete_checkpoint_is_skipped_or_refused_when_named(
    cli: Any, config: Any, tmp_path: Path
) -> None:
    path, run = config(), tmp_path / "run"
    assert cli("train", path, faults={"kill_saving": 4}).code == -9
    assert (run / "checkpoint-4").is_dir()
    named = cli("train", path, f"resume_from_checkpoint={run / 'checkpoint-4'}")
    assert named.code == 2
    assert "is incomplete" in named.message
    result = cli("train", path)
    assert result.code == 0, result.err[-2000:]
    assert "checkpoint-4 is incomplete and is not resumed from" in result.err


def test_a_resume_on_other_rows_or_another_schedule_is_refused(
    cli: Any, config: Any, tmp_path: Path
) -> None:
    assert cli("train", config(), faults={"kill_step": 5}).code == -9
    before = contents(tmp_path / "run")
    for changes, code, says in (
        ({"max_samples": 90}, 3, "other training rows"),
        ({"update_step": 4}, 2, "(2, 3, 2)"),
        (
            {
                "lora_rank": 8,
                "lora_target": "q_proj",
                "loraplus_lr_ratio": 4.0,
                "component_params": {"proj_dim": 64},
            },
            2,
            "'proj_dim': 64, 'seed': 123}; lora_alpha 8, "
            "now 16; lora_rank 4, now 8; lora_target ['down_proj', 'q_proj'], now ['q_proj']; "
            "loraplus_lr_ratio None, now 4.0.",
        ),
    ):
        resumed, dry = cli("train", config(**changes)), cli("train", config(**changes), "--dry-run")
        assert resumed.code == dry.code == code, resumed.err[-3000:] + dry.err[-3000:]
        assert says in resumed.message
        assert dry.message == resumed.message
        assert "trainable params" not in resumed.out, "the model was loaded"
    assert contents(tmp_path / "run") == before
    changed = cli("train", config(learning_rate=1.0e-3), "--dry-run")
    assert changed.code == 0, changed.err[-3000:]
    assert "learning_rate 0.002, now 0.001: without effect" in changed.err
    assert "trainable params" in changed.out


@pytest.fixture(scope="module")
def killed(cli: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run killed at step 5: checkpoints 2 and 4."""
    return tmp_path_factory.mktemp("killed")


def made(killed: Path, cli: Any, config: Any) -> Path:
    """The run of `killed`, ended at step 5 by the first test that asks for it."""
    run = killed / "run"
    if not (run / "checkpoint-4").is_dir():
        assert cli("train", config(output_dir=str(run)), faults={"kill_step": 5}).code == -9
    return run


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"component_name": "random", "component_params": {}},
            ["component_name 'less', now 'random'"],
        ),
        (
            {
                "seed": 3,
                "target_dataset": "tiny_target_heldout",
                "disable_shuffling": True,
                "component_params": {"proj_dim": 128, "gradient_type": "sgd"},
            },
            [
                "seed 42, now 3",
                "targets {'tiny_target': ",
                "in_given_order False, now True",
                "gradient_type",
            ],
        ),
        (
            {
                "gradient_accumulation_steps": 1,
                "lora_rank": 2,
                "component_params": {"proj_dim": 128, "target": "resume_other:Other"},
            },
            [
                "rows_per_step 6, now 2",
                "lora_rank 4, now 2",
                "class 'dataflex.selectors.less:LessSelector', now 'resume_other:Other'",
            ],
        ),
    ],
)
def test_a_resume_with_other_settings_is_refused(
    changes: dict[str, Any], says: list[str], killed: Path, cli: Any, config: Any
) -> None:
    run = str(made(killed, cli, config))
    (killed / "resume_other.py").write_text(
        "from dataflex.selectors.less import LessSelector\n\nclass Other(LessSelector):\n    pass\n"
    )
    result = cli("train", config(output_dir=run, **changes), cwd=killed)
    assert result.code == 2
    assert [words for words in says if words not in result.message] == []


def test_a_damaged_checkpoint_is_passed_over_in_one_line_and_refused_when_named(
    cli: Any, config: Any, tmp_path: Path
) -> None:
    path, run = config(component_name="random", component_params={}), tmp_path / "run"
    assert cli("train", path, faults={"kill_step": 5}).code == -9
    log = run / "trainer_log.jsonl"
    before = log.read_bytes()
    adapter = run / "checkpoint-4" / "adapter_model.safetensors"
    whole = adapter.read_bytes()
    adapter.write_bytes(bytes([*whole[:-100], whole[-100] ^ 1, *whole[-99:]]))
    named = cli("train", path, f"resume_from_checkpoint={run / 'checkpoint-4'}",
                "overwrite_output_dir=true")  # fmt: skip
    assert named.code == 4
    assert "adapter_model.safetensors does not hold the bytes that were saved" in named.message
    other = cli("train", path, "lora_rank=2", "overwrite_output_dir=true",
                f"resume_from_checkpoint={run / 'checkpoint-2'}")  # fmt: skip
    assert other.code == 2
    assert "lora_rank 4, now 2" in other.message
    assert log.read_bytes() == before, "a refused resume leaves the earlier run's log"
    result = cli("train", path, "resume_from_checkpoint=true", "learning_rate=0.02",
                 "lr_scheduler_type=constant", "save_total_limit=1")  # fmt: skip
    assert result.code == 0, result.err[-3000:]
    (line,) = [line for line in result.err.splitlines() if "resuming from" in line]
    assert line.startswith(f"[dataflex] resuming from {run / 'checkpoint-2'}: ")
    assert "checkpoint-4 is passed over" in line
    assert "adapter_model.safetensors" in line
    assert "learning_rate 0.002, now 0.02: without effect" in result.err
    assert "lr_scheduler_type 'linear', now 'constant'; " not in result.err
    assert "lr_scheduler_type 'linear', now 'constant': acts after the first step" in result.err
    rates = [json.loads(line)["lr"] for line in log.read_text().splitlines() if "lr" in line]
    assert rates[-1] == 0.002, "the checkpoint's rate on the new curve"
    assert log.read_bytes().startswith(before)
    (newest,) = run.glob("checkpoint-*")
    check_sound(newest)


def test_a_full_disk_while_saving_ends_in_one_message_and_loses_no_earlier_checkpoint(
    cli: Any, config: Any, tmp_path: Path
) -> None:
    path = config(component_name="random", component_params={}, save_total_limit=1)
    run = tmp_path / "run"
    for method in ("save_model", "_save_optimizer_and_scheduler"):  # safetensors, then torch
        result = cli("train", path, faults={"full_disk": [4, method]})
        assert result.code == 5, result.err[-3000:]
        assert "checkpoint-4 cannot be saved" in result.message
        assert "Traceback" not in result.err
        check_sound(run / "checkpoint-2")
    result = cli("train", path)
    assert result.code == 0, result.err[-3000:]
    assert f"resuming from {run / 'checkpoint-2'}" in result.err


def test_a_resume_behind_its_end_says_that_nothing_is_left(
    cli: Any, config: Any, tmp_path: Path
) -> None:
    path = config(component_name="random", component_params={})
    assert cli("train", path, faults={"kill_step": 5}).code == -9
    assert (tmp_path / "run" / "checkpoint-4").is_dir()
    result = cli("train", path, "train_step=3")
    assert result.code == 0, result.err[-3000:]
    assert "nothing to train: the checkpoint is at step 4, the run ends at step 3" in result.err


@pytest.mark.parametrize(
    ("name", "content", "code", "says"),
    [
        ("scheduler.pt", None, 4, "scheduler.pt is missing"),
        ("dataflex/manifest.json", None, 2, "is incomplete"),
    ],
)
def test_a_named_checkpoint_must_be_whole(
    name: str, content: bytes | None, code: int, says: str, cli: Any, config: Any, killed: Path
) -> None:
    path = config(output_dir=str(made(killed, cli, config)))
    broken = path.parent / "checkpoint-4"
    shutil.copytree(killed / "run" / "checkpoint-4", broken)
    (broken / name).unlink()
    if content is not None:
        (broken / name).write_bytes(content)
    result = cli("train", path, f"resume_from_checkpoint={broken}")
    assert result.code == code, result.err[-3000:]
    assert says in result.message


def test_a_new_run_that_is_refused_leaves_the_earlier_runs_log_records_and_store(
    cli: Any, config: Any, killed: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(made(killed, cli, config), tmp_path / "run")
    (tmp_path / "refusing.py").write_text(
        "from dataflex.selectors.less import LessSelector\n"
        "from gradstore.errors import BadInput\n\n"
        "class Refusing(LessSelector):\n"
        "    def start(self, run):\n"
        "        super().start(run)\n"
        "        raise BadInput('not today')\n"
    )
    before = contents(run)
    assert any("gradstore/" in str(path) for path in before)
    params = {"proj_dim": 128, "target": "refusing:Refusing"}
    path = config(overwrite_output_dir=True, component_params=params)
    result = cli("train", path, cwd=tmp_path)
    assert result.code == 2
    assert "not today" in result.message
    assert contents(run) == before


def test_a_state_that_the_strategy_cannot_take_is_told_by_the_dry_run_as_by_the_run(
    cli: Any, config: Any, killed: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(made(killed, cli, config), tmp_path / "run")
    newest = run / "checkpoint-4"
    sound = cli("train", config(), "--dry-run")
    assert sound.code == 0, sound.err[-3000:]
    state = json.loads((newest / "dataflex" / "state.json").read_text())
    state["component"]["generations"] = "many"
    (newest / "dataflex" / "state.json").write_text(json.dumps(state))
    seal(newest)  # its bytes are those that were saved
    before = contents(run)
    dry = cli("train", config(), "--dry-run")
    assert dry.code == 4, dry.err[-3000:]
    assert f"{newest}/dataflex/state.json does not hold what component 'less' keeps" in dry.message
    assert contents(run) == before
    resumed = cli("train", config())
    assert (resumed.code, resumed.message) == (dry.code, dry.message)


def contents(run: Path) -> dict[Path, bytes]:
    found = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    return {path: content for path, content in found.items() if path.name != "writer.lock"}


def test_each_of_200_flipped_bits_is_refused_by_name_and_the_checkpoint_before_taken(
    cli: Any, config: Any, killed: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made(killed, cli, config)
    run = tmp_path / "run"
    for name in ("checkpoint-2", "checkpoint-4", "dataflex/run.json"):
        held = killed / "run" / name
        (shutil.copytree if held.is_dir() else copied)(held, run / name)
    newest, draw, changed = run / "checkpoint-4", random.Random(5), set()
    paths = sorted(path for path in newest.rglob("*") if path.is_file())

    def resumed(**keys: str) -> Path | None:
        return resume_point(RunConfig(DataFlexConfig(), {"output_dir": str(run), **keys}, run))

    for number in range(200):
        path = draw.choice(paths)
        whole = path.read_bytes()
        at, bit = draw.randrange(len(whole)), draw.randrange(8)
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << bit]) + whole[at + 1 :])
        with pytest.raises(DamagedData) as refused:
            resumed(resume_from_checkpoint=str(newest))
        assert str(path) in str(refused.value)
        if number % 10 == 0:
            caplog.clear()
            assert resumed() == run / "checkpoint-2"
            (line,) = caplog.messages
            assert str(path) in line
        path.write_bytes(whole)
        changed.add(path)
    assert changed == set(paths)
    assert resumed() == newest


def copied(held: Path, place: Path) -> None:
    place.parent.mkdir(exist_ok=True)
    shutil.copy(held, place)


def test_ctrl_c_says_how_to_go_on_and_leaves_a_report(
    cli: Any, config: Any, tmp_path: Path
) -> None:
    result = cli("train", config(component_name="random", component_params={}),
                 faults={"interrupt_step": 3})  # fmt: skip
    assert result.code == 130
    assert "resume_from_checkpoint=true" in result.message
    assert "Traceback" not in result.err
    report = (tmp_path / "run/dataflex/report.html").read_text()
    assert "Rows selected by random" in report
    assert "interrupted" in report


def test_clean_up_keeps_what_a_resume_needs(cli: Any, config: Any, tmp_path: Path) -> None:
    """Two checkpoints are combined and two kept: a resume from before both still finds them."""
    params = {"proj_dim": 128, "checkpoints": 2, "keep_generations": 2}
    changes = {"component_params": params, "update_times": 3, "save_steps": 4, "max_samples": 60}
    whole = config("whole.yaml", output_dir=str(tmp_path / "whole"), **changes)
    assert cli("train", whole).code == 0
    path = config(**changes)
    assert cli("train", path, faults={"kill_step": 9}).code == -9
    result = cli("train", path)
    assert result.code == 0, result.err[-2000:]
    assert selections(tmp_path / "run") == selections(tmp_path / "whole")
    adapters = [(tmp_path / n / "adapter_model.safetensors").read_bytes() for n in ("run", "whole")]
    assert adapters[0] == adapters[1]
