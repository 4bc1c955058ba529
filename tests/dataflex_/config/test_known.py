"""LlamaFactory's keys are read once, typed, with LlamaFactory's own defaults."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

from dataflex.bridge import arguments
from dataflex.config.keys import DataFlexConfig, RunConfig, load
from dataflex.config.known import KnownKeys

ROOT = Path(__file__).resolve().parents[3]


def test_every_known_key_is_llamafactorys_and_has_its_default() -> None:
    theirs: dict[str, Any] = {}
    for cls in arguments.argument_classes():
        theirs |= {f.name: f.default for f in dataclasses.fields(cls) if f.init}
    ours = {f.name: f.default for f in dataclasses.fields(KnownKeys)}
    assert set(ours) <= set(theirs)
    told = {key: value for key, value in ours.items() if value not in (None, ())}
    assert {key: theirs[key] for key in told} == told
    unsaid = {key for key in ours if theirs[key] not in (None, "")} - set(told)
    assert unsaid == {"num_train_epochs"}, "None means that the user left the default"


def test_values_become_what_their_types_say() -> None:
    known = KnownKeys.of(
        {"dataset": "a, b", "eval_dataset": ["c"], "val_size": 0.1, "max_steps": 5.0,
         "trust_remote_code": True, "stage": None, "num_train_epochs": 3, "fsdp": "full_shard"}
    )  # fmt: skip
    assert (known.dataset, known.eval_dataset, known.stage) == (("a", "b"), ("c",), "sft")
    assert (known.val_size, known.max_steps, known.num_train_epochs) == (0.1, 5, 3.0)
    assert (known.trust_remote_code, known.streaming, known.fsdp) == (True, False, "full_shard")


@pytest.mark.parametrize(
    ("keys", "packs"),
    [({}, False), ({"stage": "pt"}, True), ({"stage": "pt", "packing": False}, False),
     ({"packing": True}, True)],
)  # fmt: skip
def test_stage_pt_packs_unless_told_otherwise(keys: dict[str, Any], packs: bool) -> None:
    assert KnownKeys.of(keys).packs is packs


@pytest.mark.parametrize("wrong", [[], {}, "word", [[1]], 3.5, float("nan"), -1, True])
def test_reading_raises_nothing_whatever_is_written(wrong: object) -> None:
    """What is wrong has been told by then, together with everything else that is."""
    keys = [f.name for f in dataclasses.fields(KnownKeys)]
    known = KnownKeys.of(dict.fromkeys(keys, wrong))
    assert isinstance(known.max_steps, int)
    assert isinstance(known.adapter_name_or_path, tuple)
    assert isinstance(known.stage, str)


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("adapter_name_or_path", 5, "adapter_name_or_path is 5; expected a name, or a list of"),
        ("adapter_name_or_path", {"a": 1}, "expected a name, or a list of them."),
        ("model_name_or_path", ["a"], "model_name_or_path is ['a']; expected text, or null."),
        ("optim", {}, "optim is {}; expected text."),
        ("max_steps", "many", "max_steps is 'many'; expected a whole number."),
    ],
)
def test_a_value_of_a_wrong_type_is_told(key: str, value: object, says: str) -> None:
    faults = KnownKeys.faults({key: value, "stage": "pt", "streaming": 3, "fsdp": []})
    assert list(faults) == [key]
    assert says in faults[key]


def test_what_llamafactory_takes_for_text_is_left_alone() -> None:
    taken = {"resume_from_checkpoint": True, "model_name_or_path": 7, "dataset": "a",
             "adapter_name_or_path": ["a", 3], "eval_dataset": None}  # fmt: skip
    assert KnownKeys.faults(taken) == {}
    known = KnownKeys.of(taken)
    assert (known.model_name_or_path, known.adapter_name_or_path) == ("7", ("a", "3"))


def test_the_prefix_of_a_run_is_empty_without_a_name() -> None:
    def run(**ours: Any) -> RunConfig:
        return RunConfig(DataFlexConfig(**ours), {"output_dir": "x"}, Path("x.yaml"))

    assert (run().store_run, run(gradstore_run="b").store_run) == ("", "b")


def test_nobody_reads_a_key_of_llamafactory_by_its_name() -> None:
    """A default written beside a reading is a second opinion of what LlamaFactory does."""
    asks = re.compile(r"\b(?:run_)?config\.(?:get\(|llamafactory(?:\.get\(|\[))")
    asking = [
        str(path.relative_to(ROOT))
        for path in sorted((ROOT / "dataflex").rglob("*.py"))
        if path.parent.name != "config" and asks.search(path.read_text())
    ]
    assert not asking


@pytest.mark.parametrize(
    ("written", "read"),
    [("3", 3), ("3.0", 3), ("'3'", 3), ("1e1", 10)],
)
def test_a_whole_number_may_be_written_as_before(written: str, read: int, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(f"output_dir: a\nwarmup_step: {written}\ntarget_subtasks: [{written}, 2]\n")
    ours = load(path, [], {"output_dir"}).dataflex
    assert (ours.warmup_step, ours.target_subtasks) == (read, (read, 2))


@pytest.mark.parametrize(
    ("written", "read"),
    [("0.25", (0.25,)), ("[1, '3']", (1.0, 3.0)), ("'0.5, 0.5'", (0.5, 0.5))],
)
def test_proportions_may_be_written_as_before(
    written: str, read: tuple[float, ...], tmp_path: Path
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(f"output_dir: a\ninit_mixture_proportions: {written}\ntarget_dataset: a, b\n")
    ours = load(path, [], {"output_dir"}).dataflex
    assert (ours.init_mixture_proportions, ours.target_dataset) == (read, ("a", "b"))
