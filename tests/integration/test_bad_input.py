"""Bad input: its exit code, one message that names value, limit and next step, nothing begun."""

from __future__ import annotations

import fcntl
import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "examples" / "tiny"

#: What LlamaFactory logs once the model is there.
MODEL_LOADED = "trainable params: "


def check_refusal(result: Any, code: int, *fragments: str, loaded: bool = False) -> None:
    """One message with these fragments, no traceback, no model unless `loaded`."""
    assert result.code == code, result.err[-3000:]
    assert "Traceback" not in result.err
    assert result.err.count("error: ") == 1, result.err[-3000:]
    for fragment in fragments:
        assert fragment in result.message
    assert (MODEL_LOADED in result.out + result.err) == loaded


def nothing_made(folder: Path) -> bool:
    """Whether a run left no checkpoint, adapter, store or selection."""
    made = {"checkpoint-2", "adapter_model.safetensors", "gradstore"}
    there = {path.name for path in folder.glob("*")} if folder.is_dir() else set()
    return not made & there and not (folder / "dataflex" / "selections").exists()


def data_folder(folder: Path, **sets: list[dict[str, Any]] | str) -> Path:
    """A dataset_dir with the tiny training set and `sets`: rows, or a file's raw text."""
    folder.mkdir()
    shutil.copy(TINY / "data" / "train.json", folder / "train.json")
    info = {"tiny_train": {"file_name": "train.json"}}
    for name, rows in sets.items():
        content = rows if isinstance(rows, str) else json.dumps(rows)
        (folder / f"{name}.json").write_text(content)
        info[name] = {"file_name": f"{name}.json"}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    return folder


def row(instruction: str, output: str | None) -> dict[str, Any]:
    return {"instruction": instruction, "input": "", "output": output}


CONFIGURATION = {
    "no target": ({"target_dataset": None}, ["needs target rows", "target_dataset"]),
    "U = 0": ({"update_step": 0}, ["update_step is 0", "at least 1"]),
    "U negative": ({"update_step": -1}, ["update_step is -1"]),
    "U infinite": ({"update_step": float("inf")}, ["update_step is inf", "whole number"]),
    "U a word": ({"update_step": "ten"}, ["update_step is 'ten'", "whole number"]),
    "W too large": ({"warmup_step": 40}, ["warmup_step is 40", "240 rows", "at most 16"]),
    "U too large": ({"update_step": 40}, ["update_step is 40", "240 rows", "at most 16"]),
    "misspelt key": (
        {"lerning_rate": 1},
        ["did you mean 'learning_rate'", "train --help` lists every key"],
    ),
    "misspelt own key": ({"gradstor": "x"}, ["did you mean 'gradstore'", "gradstore_run"]),
    "misspelt parameter": (
        {"component_params": {"proj_dmi": 128}},
        ["'proj_dmi' (did you mean 'proj_dim'?)", "gradient_type"],
    ),
    "misspelt component": (
        {"component_name": "les"},
        ["did you mean 'less'", "custom, delta_loss, icons, landmarks, less, loss"],
    ),
    "no component": ({"component_name": None}, ["needs component_name", "less"]),
    "misspelt train_type": (
        {"train_type": "dynamic_selekt"},
        ["did you mean 'dynamic_select'", "static"],
    ),
    "misspelt data set": ({"dataset": "tiny_trian"}, ["did you mean 'tiny_train'", "tiny_target"]),
    "misspelt target": ({"target_dataset": "tiny_targt"}, ["did you mean 'tiny_target'"]),
    "misspelt template": ({"template": "defualt"}, ["defualt"]),
    "a word as a number": ({"learning_rate": "fast"}, ["learning_rate is 'fast'", "a number"]),
    "a quoted number": ({"cutoff_len": "64"}, ["cutoff_len is '64'", "without quotes"]),
    "no dataset_info": ({"dataset_dir": str(ROOT / "docs")}, ["dataset_info.json", "not exist"]),
    "no model folder": (
        {"model_name_or_path": "./models/mine"},
        ["'./models/mine'", "not a folder"],
    ),
    "no model on the hub": ({"model_name_or_path": "no/such"}, ["'no/such'", "cannot be loaded"]),
    "no model": ({"model_name_or_path": None}, ["model_name_or_path is missing"]),
    "no data": ({"dataset": None}, ["dataset is missing"]),
    "oft": ({"finetuning_type": "oft"}, ["'oft'", "finetuning_type: lora, full, freeze"]),
    "whole gradients of a whole model": (
        {"finetuning_type": "freeze", "component_params": {"scoring": "direct"}},
        ["'freeze'", "scoring: direct", "finetuning_type: lora"],
    ),
    "stage dpo": ({"stage": "dpo"}, ["stage is 'dpo'", "sft and pt", "train_type: static"]),
    "stage rm": ({"stage": "rm"}, ["stage is 'rm'", "sft and pt"]),
    "packing": ({"packing": True}, ["packing is on", "single rows", "packing: false"]),
    "neat_packing": ({"neat_packing": True}, ["neat_packing is on", "neat_packing: false"]),
    "streaming": ({"streaming": True, "max_steps": 4}, ["streaming is on", "streaming: false"]),
    "a batch size that is found": (
        {"auto_find_batch_size": True},
        ["auto_find_batch_size: false", "dynamic_select"],
    ),
    "stage pt packs": ({"stage": "pt"}, ["packing is on", "stage pt packs"]),
    "two adapters": ({"adapter_name_or_path": "a,b"}, ["names 2 adapters"]),
    "sub-tasks that do not add up": (
        {"target_subtasks": [20, 10]},
        ["adds up to 30", "has 32 rows"],
    ),
    "sub-tasks of two sets": (
        {"target_subtasks": [16, 16], "target_dataset": "tiny_target,tiny_target_sort"},
        ["2 are named", "Remove target_subtasks"],
    ),
    "a target named twice": (
        {"target_dataset": "tiny_target,tiny_target"},
        ["names a set twice"],
    ),
    "sgd": ({"optim": "sgd"}, ["optim is 'sgd'", "gradient_type", "sgd or sign"]),
    "adafactor": ({"optim": "adafactor"}, ["optim is 'adafactor'", "sgd or sign"]),
    "muon": ({"use_muon": True}, ["use_muon is on", "sgd or sign"]),
    "NaN fraction": (
        {"component_params": {"max_bad_fraction": float("nan")}},
        ["max_bad_fraction is nan", "0 to 1"],
    ),
    "d = 0": ({"component_params": {"proj_dim": 0}}, ["proj_dim is 0", "from 1 to"]),
    "unknown feature": ({"component_params": {"gradient_type": "adamm"}}, ["adam_marginal"]),
    "no step": ({"num_train_epochs": 0}, ["0 optimizer steps", "train_step"]),
    "half a row": (
        {"per_device_train_batch_size": 2.5},
        ["per_device_train_batch_size is 2.5", "a whole number"],
    ),
    "early stopping of nothing": (
        {"early_stopping_steps": 3},
        ["early_stopping_steps is set", "load_best_model_at_end"],
    ),
    "do_train off": ({"do_train": False}, ["do_train is false"]),
}


@pytest.mark.parametrize("case", CONFIGURATION)
def test_a_bad_configuration_is_one_message_before_the_model(
    case: str, cli: Any, config: Any, tmp_path: Path
) -> None:
    changes, fragments = CONFIGURATION[case]
    result = cli("train", config(**changes))
    check_refusal(result, 2, *fragments)
    assert nothing_made(tmp_path / "run")


def test_tokens_without_an_embedding_name_resize_vocab(cli: Any, config: Any) -> None:
    result = cli("train", config(template="qwen"))
    check_refusal(result, 2, "resize_vocab: true", "'<|im_end|>'", "tiny_train", loaded=True)


def test_streaming_is_refused_for_a_selector_without_gradients_too(cli: Any, config: Any) -> None:
    path = config(component_name="random", component_params=None, streaming=True, max_steps=4)
    check_refusal(cli("train", path), 2, "streaming is on", "streaming: false")


def test_all_faults_of_a_configuration_come_together(cli: Any, config: Any) -> None:
    path = config(finetuning_type="oft", packing=True, target_dataset=None)
    check_refusal(cli("train", path), 2, "'oft'", "packing is on", "needs target rows")


def test_a_module_name_that_the_model_lacks_names_the_key(cli: Any, config: Any) -> None:
    result = cli("train", config(lora_target="q_porj"))
    check_refusal(
        result, 2, "lora_target: q_porj cannot be set up on the model", "lora_target: all"
    )
    assert "model_name_or_path" not in result.message


def test_a_missing_or_unreadable_configuration(cli: Any, tmp_path: Path) -> None:
    check_refusal(cli("train", tmp_path / "no.yaml"), 2, "no.yaml", "does not exist")
    (tmp_path / "bad.yaml").write_text("a: [1, 2\n")
    check_refusal(cli("train", tmp_path / "bad.yaml"), 2, "bad.yaml")
    (tmp_path / "list.yaml").write_text("- a\n- b\n")
    check_refusal(cli("train", tmp_path / "list.yaml"), 2, "mapping")
    check_refusal(cli("train", tmp_path / "bad.yaml", "update_step"), 2, "not key=value")


def test_a_missing_data_file_is_named(cli: Any, config: Any, tmp_path: Path) -> None:
    folder = data_folder(tmp_path / "data", goal="[]")
    (folder / "goal.json").unlink()
    path = config(dataset_dir=str(folder), target_dataset="goal")
    check_refusal(cli("train", path), 2, "'goal'", "goal.json", "does not exist")


@pytest.mark.parametrize("content", ["[]", ""], ids=["no rows", "no bytes"])
@pytest.mark.parametrize("role", ["dataset", "target_dataset"])
def test_fault_05_an_empty_file_is_refused(
    role: str, content: str, cli: Any, config: Any, tmp_path: Path
) -> None:
    folder = data_folder(tmp_path / "data", empty=content, goal=[row("Say yes.", "yes")] * 4)
    sets = {"target_dataset": "goal", role: "empty"}
    result = cli("train", config(dataset_dir=str(folder), **sets))
    check_refusal(result, 2, "'empty'", "no row")
    assert nothing_made(tmp_path / "run")


def test_an_entry_without_a_source_and_rows_without_a_column_are_told(
    cli: Any, config: Any, tmp_path: Path
) -> None:
    folder = data_folder(tmp_path / "data", few=[{"instruction": "Say yes."}] * 4,
                         numbers="[1, 2, 3]", goal=[row("Say yes.", "yes")] * 4)  # fmt: skip
    info = json.loads((folder / "dataset_info.json").read_text())
    (folder / "dataset_info.json").write_text(json.dumps({**info, "nowhere": {}, "word": "x"}))
    told = {"few": "a row has no 'input'", "numbers": "'instruction'", "nowhere": "file_name",
            "word": "must be a mapping"}  # fmt: skip
    for name, says in told.items():
        result = cli("train", config(dataset_dir=str(folder), dataset=name, target_dataset="goal"))
        check_refusal(result, 2, name, says)


def test_an_override_into_a_list_is_told(cli: Any, config: Any) -> None:
    path = config(target_dataset=["tiny_target"])
    check_refusal(cli("train", path, "target_dataset.0.x=1"), 2, "run.yaml")


def test_rows_without_a_response_leave_an_empty_target(
    cli: Any, config: Any, tmp_path: Path
) -> None:
    folder = data_folder(tmp_path / "data", goal=[row("Say yes.", None)] * 4)
    result = cli("train", config(dataset_dir=str(folder), target_dataset="goal"))
    check_refusal(
        result,
        2,
        "target set 'goal'",
        "no row is left",
        "4 with no response",
        "give each row a response",
    )


def test_fault_05_a_fully_masked_target_is_refused(cli: Any, config: Any, tmp_path: Path) -> None:
    """LlamaFactory shares a small cutoff_len by length: nothing is left for such responses."""
    folder = data_folder(tmp_path / "data", goal=[row("Reverse the word. " * 40, "y")] * 4)
    path = config(dataset_dir=str(folder), target_dataset="goal", cutoff_len=4)
    check_refusal(cli("train", path), 2, "'goal'", "all 4 rows are masked", "cutoff_len")


def test_fault_06_more_rows_than_usable_ones_are_counted(
    cli: Any, config: Any, tmp_path: Path
) -> None:
    good, masked = row("Say yes.", "yes " * 60), row("Reverse the word. " * 40, "y")
    folder = data_folder(tmp_path / "data", few=[good] * 12 + [masked] * 8, goal=[good] * 4)
    changes = {"dataset_dir": str(folder), "dataset": "few", "target_dataset": "goal",
               "cutoff_len": 4}  # fmt: skip
    path = config(**changes)
    check_refusal(cli("train", path), 2, "asked 18, 12 usable, 8 skipped")
    drawn = config(**{**changes, "component_name": "random", "component_params": None})
    check_refusal(cli("train", drawn), 2, "18 rows requested of 12 usable ones")
    again = ["update_step=2", "train_step=3", "overwrite_output_dir=true"]
    assert cli("train", drawn, *again).code == 0
    chosen = tmp_path / "run" / "dataflex" / "selections" / "step_2.json"
    assert set(json.loads(chosen.read_text())["indices"]) == set(range(12))


def test_a_model_with_code_of_its_own_is_not_run(cli: Any, config: Any, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(TINY / "model", model)
    content = json.loads((model / "config.json").read_text())
    content["auto_map"] = {"AutoModelForCausalLM": "evil.Model"}
    (model / "config.json").write_text(json.dumps(content))
    (model / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    result = cli("train", config(model_name_or_path=str(model)))
    check_refusal(result, 2, "auto_map", "trust_remote_code: true")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("key", ["output_dir", "gradstore"])
def test_a_place_that_cannot_be_written_ends_in_5(
    key: str, cli: Any, config: Any, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    path = config(**{key: str(tmp_path / "file" / "run")})
    check_refusal(cli("train", path), 5, key, "is a file")


def test_a_second_writer_ends_in_6_and_leaves_the_store(
    cli: Any, config: Any, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    path = config(gradstore=str(store), train_step=3)
    assert cli("train", path).code == 0
    commits = sorted(os.listdir(store / "commits"))
    with (store / "writer.lock").open("r+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        again = config(gradstore=str(store), output_dir=str(tmp_path / "other"), gradstore_run="b")
        result = cli("train", again)
        check_refusal(result, 6, str(store), "being written by", loaded=True)
    assert sorted(os.listdir(store / "commits")) == commits
    assert nothing_made(tmp_path / "other")


def test_debug_adds_the_traceback_and_keeps_the_code(cli: Any, config: Any) -> None:
    result = cli("train", config(update_step=0), "--debug")
    assert result.code == 2
    assert "Traceback" in result.err
    assert "error: update_step is 0" in result.err


# -- gradstore build ----------------------------------------------------------------------------


def test_adam_features_need_a_checkpoint(cli: Any, config: Any, tmp_path: Path) -> None:
    result = cli("gradstore", "build", config())
    check_refusal(result, 2, "needs Adam moments", "sgd or sign")
    assert nothing_made(tmp_path / "run")


class Runs:
    """Unpickled, it would make a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_fault_14_an_optimizer_file_that_would_run_code_is_not_opened(
    cli: Any, config: Any, tmp_path: Path
) -> None:
    checkpoint = tmp_path / "run" / "checkpoint-2"
    checkpoint.mkdir(parents=True)
    (checkpoint / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    save_file({"a": torch.ones(2)}, checkpoint / "adapter_model.safetensors")
    (checkpoint / "trainer_state.json").write_text('{"global_step": 2}')
    result = cli("gradstore", "build", config())
    check_refusal(result, 2, "checkpoint-2", "neither", "optimizer.pt")
    (checkpoint / "optimizer.pt").write_bytes(pickle.dumps(Runs(tmp_path / "ran")))
    check_refusal(cli("gradstore", "build", config()), 2, "optimizer.pt", "without running code")
    torch.save({"state": Runs(tmp_path / "ran")}, checkpoint / "optimizer.pt")
    check_refusal(cli("gradstore", "build", config()), 2, "optimizer.pt", "without running code")
    torch.save([1, 2], checkpoint / "optimizer.pt")
    check_refusal(cli("gradstore", "build", config()), 2, "no optimizer state")
    assert not (tmp_path / "ran").exists()


def test_build_refuses_what_training_refuses(cli: Any, config: Any) -> None:
    path = config(finetuning_type="oft", streaming=True, target_dataset=None)
    result = cli("gradstore", "build", path)
    check_refusal(result, 2, "'oft'", "streaming is on", "needs target rows")


# -- asking a store -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 training rows, of which 2 have no finite gradient, and 4 target rows; d = 8."""
    import numpy as np

    from gradstore.format.records import GenerationRecord, RowSet, row_hash
    from gradstore.store.writer import StoreWriter

    path = tmp_path_factory.mktemp("asked") / "store"
    random = np.random.default_rng(0)
    with StoreWriter(path, provenance={"dim": 8}) as writer:
        for role, name, n in (("train", "train/1", 40), ("target", "target/goal/1", 4)):
            record = GenerationRecord(
                name=name, role=role, step=1, set="goal" if role == "target" else "",  # type: ignore[arg-type]
                run_id="run", adapter_hash="aa", effective_seed=7, feature="sgd",
                projection={"method": "sjlt", "d": 8, "seed": 7},
            )  # fmt: skip
            rows = RowSet.from_hashes([row_hash([i], [i]) for i in range(n)])
            generation = writer.begin(record, rows, dim=8)
            values = random.standard_normal((n, 8)).astype(np.float32)
            values[20:22] = np.nan
            ones = np.ones(n, np.float32)
            generation.write_unit(0, values, ones, np.zeros(n, np.uint8), np.arange(n))
            generation.commit()
    return path


QUESTIONS = {
    "k = 0": (["select", "-k", "0"], ["asked 0 rows", "1 to 38"]),
    "k negative": (["select", "-k", "-3"], ["asked -3 rows", "1 to 38"]),
    "k too large": (["select", "-k", "5000"], ["asked 5000, 38 usable, 2 skipped", "at most 38"]),
    "fraction NaN": (["select", "--fraction", "nan"], ["fraction is nan", "at most 1"]),
    "fraction 0": (["select", "--fraction", "0"], ["fraction is 0.0", "above 0"]),
    "fraction negative": (["select", "--fraction", "-0.5"], ["fraction is -0.5", "above 0"]),
    "fraction above 1": (["select", "--fraction", "1.5"], ["fraction is 1.5", "at most 1"]),
    "both": (["select", "-k", "3", "--fraction", "0.5"], ["-k 3 and --fraction 0.5 are given"]),
    "neither": (["select"], ["no budget of top is given; give one: -k N"]),
    "checkpoints 0": (["score", "--checkpoints", "0"], ["checkpoints is '0'", "last, all"]),
    "checkpoints 9": (["score", "--checkpoints", "9"], ["9 checkpoints requested", "has 1"]),
    "no such set": (["score", "--target", "gaol"], ["gaol", "goal"]),
    "no such run": (["score", "--run", "b"], ["run 'b'"]),
    "aggregation": (["score", "--aggregation", "median"], ["median", "max"]),
    "sub-tasks": (["score", "--subtasks", "2,3"], ["5", "4"]),
    "sub-tasks of words": (["score", "--subtasks", "two"], ["subtasks is 'two'"]),
    "no such row": (["query", "--target-row", "4"], ["row 4", "0-3"]),
    "audit's neighbours": (["audit", "--neighbours", "38"], ["neighbours is 38", "at most 37"]),
    "audit's neighbours 0": (["audit", "--neighbours", "0"], ["neighbours is 0", "at least 1"]),
    "audit's file": (["audit", "-o", "audit.xlsx"], ["audit.xlsx", ".parquet, .csv, .jsonl"]),
    "audit's checkpoints": (["audit", "--checkpoints", "newest"], ["'newest'", "last, all"]),
    "audit's set": (["audit", "--target", "gaol"], ["gaol", "goal"]),
    "audit's top": (["audit", "--top", "0"], ["top is 0"]),
    "top 0": (["query", "--target-row", "0", "--top", "0"], ["top is 0"]),
}


@pytest.mark.parametrize("case", QUESTIONS)
def test_a_question_that_cannot_be_answered(
    case: str, cli: Any, store: Path, tmp_path: Path
) -> None:
    (command, *options), fragments = QUESTIONS[case]
    output = ["-o", tmp_path / "selected.jsonl"] if command == "select" else []
    result = cli("gradstore", command, store, *options, *output)
    check_refusal(result, 2, *fragments)
    assert not (tmp_path / "selected.jsonl").exists()


@pytest.mark.parametrize("command", ["info", "verify", "score", "audit"])
def test_a_folder_that_is_no_store_is_refused(command: str, cli: Any, tmp_path: Path) -> None:
    check_refusal(cli("gradstore", command, tmp_path), 2, str(tmp_path))
    check_refusal(cli("gradstore", command, tmp_path / "nothing"), 2, "nothing")


def test_an_answer_that_cannot_be_written_ends_in_5(cli: Any, store: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    output = tmp_path / "file" / "selected.jsonl"
    check_refusal(cli("gradstore", "select", store, "-k", 3, "-o", output), 5, "cannot write")


def test_one_flipped_bit_ends_in_4_before_a_score(cli: Any, store: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(store, broken)
    chunk = broken / "generations" / "train" / "1" / "features" / "c" / "0" / "0"
    content = bytearray(chunk.read_bytes())
    content[5] ^= 1
    chunk.write_bytes(content)
    check_refusal(cli("gradstore", "verify", broken), 4, "damaged", "features/c/0/0")
    check_refusal(cli("gradstore", "score", broken), 4, "features/c/0/0")
    told = cli("gradstore", "verify", broken, "--json")
    assert told.code == 4
    assert json.loads(told.out)["ok"] is False
    assert cli("gradstore", "verify", store).code == 0
