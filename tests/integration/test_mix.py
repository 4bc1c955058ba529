"""Mixing domains in a real run: what was asked is what is trained on; resumed, shared, refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dataflex.checkpoints.seal import seal
from dataflex.checkpoints.state import load_state
from dataflex.data.mixture import largest_remainder
from dataflex.run.log import read_events

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "examples" / "tiny" / "data"
DOMAINS = ("tiny_domain_date", "tiny_domain_sort", "tiny_domain_spell")
#: Rows of each domain, steps of a row in the small run.
ROWS, BATCH = 20, 6

Write = Callable[..., Path]


@pytest.fixture
def mixed(config: Write) -> Write:
    """A run of 8 steps and 6 rows a step: opening 0-1, updates at 2 and 5; three domains of 20."""

    def write(name: str = "run.yaml", **changes: object) -> Path:
        usual: dict[str, object] = {
            "dataset": ",".join(DOMAINS), "max_samples": ROWS, "train_type": "dynamic_mix",
            "component_name": "odm", "component_params": None, "target_dataset": None,
            "init_mixture_proportions": [0.5, 0.3, 0.2], "num_train_epochs": None, "save_steps": 3,
        }  # fmt: skip
        return config(name, **{**usual, **changes})

    return write


def mixes(run: Path) -> list[dict[str, Any]]:
    return [e for e in read_events(run / "dataflex") if e["event"] == "mix"]


def served(checkpoint: Path) -> list[int]:
    """Rows of each domain in the interval that a checkpoint lies in."""
    rows = load_state(checkpoint).more["rows"]
    return np.bincount(rows // ROWS, minlength=len(DOMAINS)).tolist()


def test_odm_killed_in_mid_interval_resumes_to_the_same_bits_and_counts_are_exact(
    cli: Any, mixed: Write, tmp_path: Path
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    result = cli("train", mixed(output_dir=str(whole)), faults={"trace": str(tmp_path / "a")})
    assert result.code == 0, result.err[-3000:]

    events = mixes(whole)
    assert [e["step"] for e in events] == [0, 2, 5]
    read = np.zeros(3, dtype=np.int64)
    for event, steps in zip(events, (2, 3, 3), strict=True):
        assert tuple(event["proportions"]) == DOMAINS
        proportions = np.array(list(event["proportions"].values()))
        counts = list(event["counts"].values())
        assert counts == largest_remainder(proportions, steps * BATCH).tolist()
        read += counts
        assert list(event["epochs"].values()) == pytest.approx((read / ROWS).tolist())
    assert served(whole / "checkpoint-3") == list(events[1]["counts"].values())
    assert served(whole / "checkpoint-6") == list(events[2]["counts"].values())
    assert "step 2: odm mixes tiny_domain_date 0." in result.err
    logged = [json.loads(line) for line in (whole / "trainer_log.jsonl").read_text().splitlines()]
    told = [line["dataflex/mix/tiny_domain_date"] for line in logged
            if "dataflex/mix/tiny_domain_date" in line]  # fmt: skip
    assert told == [e["proportions"]["tiny_domain_date"] for e in events]

    path, faults = mixed(output_dir=str(killed)), {"trace": str(tmp_path / "b")}
    assert cli("train", path, faults={"kill_step": 4, **faults}).code == -9
    result = cli("train", path, faults=faults)
    assert result.code == 0, result.err[-3000:]
    a, b = (sorted(set((tmp_path / name).read_text().splitlines())) for name in "ab")
    assert a == b
    for one, other in zip(mixes(killed), events, strict=True):
        assert {**one, "pause_seconds": 0} == {**other, "pause_seconds": 0}
    adapters = [(run / "adapter_model.safetensors").read_bytes() for run in (whole, killed)]
    assert adapters[0] == adapters[1]

    changed = cli("train", mixed(output_dir=str(killed), init_mixture_proportions=[1, 1, 1]))
    assert changed.code == 2
    assert "init_mixture_proportions [0.5, 0.3, 0.2], now [1.0, 1.0, 1.0]" in changed.message


def test_two_processes_mix_what_one_process_mixes(cli: Any, mixed: Write, tmp_path: Path) -> None:
    """Rewards are losses over all ranks; the rows of a step are the same, cut up otherwise."""
    runs = {ranks: tmp_path / str(ranks) for ranks in (1, 2)}
    for ranks, run in runs.items():
        path = mixed(output_dir=str(run), lora_dropout=0, per_device_train_batch_size=2 // ranks)
        result = cli("train", path, ranks=ranks)
        assert result.code == 0, result.err[-3000:]
    for one, two in zip(mixes(runs[1]), mixes(runs[2]), strict=True):
        assert one["counts"] == two["counts"]
        assert list(one["proportions"].values()) == pytest.approx(
            list(two["proportions"].values()), abs=1e-5
        )
    states = [load_state(run / "checkpoint-6") for run in runs.values()]
    np.testing.assert_allclose(*(s.component["rewards"] for s in states), rtol=1e-4)
    np.testing.assert_array_equal(*(s.more["rows"] for s in states))


def test_static_mix_opens_once_for_epochs_and_a_domain_of_share_0_is_never_read(
    cli: Any, mixed: Write, tmp_path: Path
) -> None:
    """Packing and full rows of pt: each source packed by itself, so that domains stay apart."""
    path = mixed(component_name=None, static_mix=True, warmup_step=None, update_step=None,
                 update_times=None, num_train_epochs=1.5, init_mixture_proportions=[1, 0, 2],
                 stage="pt", cutoff_len=16, max_samples=60, save_steps=100)  # fmt: skip
    result = cli("train", path)
    assert result.code == 0, result.err[-3000:]
    (event,) = mixes(tmp_path / "run")
    assert "step 0: static opens with" in result.err
    (checkpoint,) = (tmp_path / "run").glob("checkpoint-*")
    state = load_state(checkpoint)
    sizes = list(state.settings["rows of the domains"].values())
    assert state.step == int(1.5 * (sum(sizes) // BATCH))
    assert (
        list(event["counts"].values())
        == largest_remainder(np.array([1.0, 0.0, 2.0]), state.step * BATCH).tolist()
    )
    edges = np.cumsum([0, *sizes])
    assert np.histogram(state.more["rows"], edges)[0].tolist() == list(event["counts"].values())
    assert event["counts"]["tiny_domain_sort"] == 0


def test_a_tokenised_folder_is_reused_and_a_run_with_val_size_is_evaluated(
    cli: Any, mixed: Write, tmp_path: Path
) -> None:
    changes = {"component_name": "static", "tokenized_path": str(tmp_path / "rows"),
               "val_size": 4, "do_eval": True, "train_step": 2, "warmup_step": 0,
               "eval_on_each_dataset": True}  # fmt: skip
    first = cli("train", mixed(output_dir=str(tmp_path / "first"), **changes))
    assert first.code == 0, first.err[-3000:]
    assert "eval_tiny_domain_sort_loss" in first.out
    again = cli("train", mixed(output_dir=str(tmp_path / "again"), **changes))
    assert again.code == 0, again.err[-3000:]
    states = [load_state(tmp_path / name / "checkpoint-2") for name in ("first", "again")]
    assert states[0].rows_sha256 == states[1].rows_sha256
    sizes = states[0].settings["rows of the domains"]
    assert sizes == dict.fromkeys(DOMAINS, ROWS - 4), "held-out rows are not trained on"
    other = cli("train", mixed(output_dir=str(tmp_path / "other"), **changes, cutoff_len=32))
    assert other.code == 3
    assert "cutoff_len 64, now 32" in other.message


REFUSED = {
    "a fixed rule": ({"mixture_sample_rule": "stratified"}, ["'stratified', which fixes", "'odm'"]),
    "an unknown rule": ({"mixture_sample_rule": "mixed"}, ["'mixed'", "stratified, uniform"]),
    "too few": ({"init_mixture_proportions": [0.5, 0.5]}, ["expected 3 numbers", *DOMAINS]),
    "negative": ({"init_mixture_proportions": [1, 1, -1]}, ["-1.", "numbers >= 0"]),
    "all zero": ({"init_mixture_proportions": [0, 0, 0]}, ["positive sum"]),
    "words": ({"init_mixture_proportions": ["a", "b", "c"]}, ["init_mixture_proportions"]),
    "static's own": (
        {"component_name": "static", "component_params": {"proportions": [1, 1]}},
        ["proportions", "expected 3 numbers"],
    ),
    "held out of nothing": (
        {"mixer_eval_dataset": "tiny_domain_add_eval"},
        ["'tiny_domain_add_eval' belongs to no data set"],
    ),
    "held out and missing": ({"mixer_eval_dataset": "tiny_domain_dat_eval"}, ["unknown data set"]),
    "twice": ({"dataset": "tiny_domain_date,tiny_domain_date"}, ["names a data set twice"]),
    "interleaved": ({"mix_strategy": "interleave_under"}, ["mix_strategy is 'interleave_under'"]),
    "streaming": ({"streaming": True, "max_steps": 4}, ["streaming: false"]),
    "U = 0": ({"update_step": 0}, ["update_step is 0", "at least 1"]),
    "no budget": ({"warmup_step": 0, "update_times": 0}, ["0 optimizer steps"]),
    "floor": ({"component_params": {"min_exploration_rate": 0.4}}, ["below 1/3"]),
    "alpha": ({"component_params": {"alpha": 1.5}}, ["alpha is 1.5"]),
    "misspelt": ({"component_params": {"reward_scal": 1}}, ["did you mean 'reward_scale'"]),
    "misspelt beside static_mix": (
        {"static_mix": True, "component_params": {"reward_scal": 1}},
        ["did you mean 'reward_scale'"],
    ),
    "val_size of all": ({"val_size": ROWS}, ["tiny_domain_date"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_one_message_before_the_model(case: str, cli: Any, mixed: Write) -> None:
    changes, fragments = REFUSED[case]
    refused(cli("train", mixed(**changes)), *fragments)


def refused(result: Any, *fragments: str) -> None:
    assert result.code == 2, result.err[-3000:]
    assert "Traceback" not in result.err
    assert result.err.count("error: ") == 1
    for fragment in fragments:
        assert fragment in result.message, result.message
    assert "trainable params: " not in result.out + result.err


def test_a_domain_without_rows_is_named(cli: Any, mixed: Write, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    shutil.copy(DATA / "domains" / "date.json", folder / "good.json")
    masked = {"instruction": "Reverse the word. " * 40, "input": "", "output": "y"}
    dropped = {"instruction": "Say yes.", "input": "", "output": None}
    (folder / "masked.json").write_text(json.dumps([masked] * 3))
    (folder / "dropped.json").write_text(json.dumps([dropped] * 3))
    (folder / "empty.json").write_text("[]")
    bad = {
        "masked": "no row with a target token in 'masked'",
        "dropped": "data set 'dropped'",
        "empty": "data set 'empty'",
    }
    info = {name: {"file_name": f"{name}.json"} for name in ("good", *bad)}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    changes = {"dataset_dir": str(folder), "init_mixture_proportions": None, "cutoff_len": 4}
    for name, says in bad.items():
        refused(cli("train", mixed(dataset=f"good,{name}", **changes)), says)


def test_a_mixer_of_ones_own_must_answer_proportions(
    cli: Any, mixed: Write, tmp_path: Path
) -> None:
    """Asked at the first step (warmup_step 0): refused before a step is trained."""
    (tmp_path / "mine.py").write_text(
        "import numpy as np\n"
        "from dataflex.mixers.base import Mixer\n"
        "class Mine(Mixer):\n"
        "    def __init__(self, answer):\n"
        "        self.answer = answer\n"
        "    def mix(self, context):\n"
        "        return np.array(self.answer)\n"
    )
    for answer, says in (
        ([0.5, 0.5], "component 'custom' answered"),
        ([0.9, 0.4, 0.1], "sum to 1.4"),
        ([1.2, -0.1, -0.1], "numbers >= 0"),
    ):
        params = {"target": "mine:Mine", "answer": answer}
        path = mixed(component_name="custom", component_params=params, warmup_step=0)
        result = cli("train", path, cwd=tmp_path)
        assert result.code == 2, result.err[-3000:]
        assert says in result.message
        assert not (tmp_path / "run" / "checkpoint-3").exists()


def test_an_odm_checkpoint_of_0_1_0_resumes_with_averaging_moving_and_not_without(
    cli: Any, mixed: Write, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    moving = mixed("moving.yaml", component_params={"averaging": "moving"}, train_step=3)
    assert cli("train", moving).code == 0
    path = run / "checkpoint-3" / "dataflex" / "state.json"
    state = json.loads(path.read_text())
    del state["component"]["averaging"]  # 0.1.0 knew no other way
    path.write_text(json.dumps(state))
    seal(run / "checkpoint-3")

    refused = cli("train", mixed())
    assert refused.code == 2
    assert "Set component_params.averaging: moving" in refused.message
    dry = cli("train", mixed(), "--dry-run")
    assert (dry.code, dry.message) == (refused.code, refused.message)
    result = cli("train", mixed("moving.yaml", component_params={"averaging": "moving"}))
    assert result.code == 0, result.err[-3000:]
    assert [e["step"] for e in mixes(run)] == [0, 2, 5]
