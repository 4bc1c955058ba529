"""One YAML, two configurations: every key is checked, every fault is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from dataflex.config.keys import load
from dataflex.config.presets import PACKAGED_PRESETS
from dataflex.config.values import names
from gradstore.errors import BadInput

ACCEPTED = {"output_dir", "model_name_or_path", "learning_rate", "cutoff_len"}


def write(folder: Path, text: str, name: str = "run.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_keys_are_split_and_overrides_win(tmp_path: Path) -> None:
    path = write(tmp_path, "output_dir: a\nwarmup_step: 3\nlearning_rate: 1e-3\n")
    config = load(path, ["warmup_step=5", "component_params.proj_dim=64"], ACCEPTED)
    assert config.dataflex.warmup_step == 5
    assert config.dataflex.component_params == {"proj_dim": 64}
    assert config.llamafactory == {"output_dir": "a", "learning_rate": 1e-3}


def test_placeholders_are_resolved(tmp_path: Path) -> None:
    path = write(tmp_path, "output_dir: runs/a\ngradstore: ${output_dir}/features\n")
    assert load(path, [], ACCEPTED).store_path == Path("runs/a/features")


def test_the_default_store_lies_in_output_dir_and_shares_its_fate(tmp_path: Path) -> None:
    config = load(write(tmp_path, "output_dir: a"), [], ACCEPTED)
    assert config.store_path == config.own_store == Path("a/gradstore")
    config = load(write(tmp_path, "output_dir: a\ngradstore: b"), [], ACCEPTED)
    assert (config.store_path, config.own_store) == (Path("b"), None)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("output_dir: a\nwarmup_steps_: 1", "did you mean 'warmup_step'"),
        ("output_dir: a\nlerning_rate: 1", "did you mean 'learning_rate'"),
        ("output_dir: a\nwarmup_step: many", "warmup_step is 'many'; expected a whole number"),
        ("output_dir: a\nwarmup_step: 1.5", "expected a whole number"),
        ("output_dir: a\ntrain_step: -1", "train_step is -1; expected 0 or more"),
        ("output_dir: a\nstatic_mix: 3", "static_mix is 3; expected true or false"),
        ("output_dir: a\ncomponent_params: [1]", "expected a mapping"),
        ("output_dir: a\ntrain_type: dynamic_selekt", "did you mean 'dynamic_select'"),
        ("warmup_step: 1", "output_dir is missing"),
        ("output_dir: ${nowhere}", "nowhere"),
        ("output_dir: [", "run.yaml"),
        ("- a", "expected a mapping"),
    ],
)
def test_a_fault_is_named(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(BadInput, match=says):
        load(write(tmp_path, text), [], ACCEPTED)


def test_all_faults_are_reported_together(tmp_path: Path) -> None:
    path = write(tmp_path, "warmup_step: x\nupdate_step: y\n")
    with pytest.raises(BadInput) as caught:
        load(path, [], ACCEPTED)
    assert all(part in str(caught.value) for part in ("warmup_step", "update_step", "output_dir"))


def test_a_missing_file_and_a_bare_override_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="does not exist"):
        load(tmp_path / "no.yaml", [], ACCEPTED)
    with pytest.raises(BadInput, match="not key=value"):
        load(write(tmp_path, "output_dir: a"), ["cutoff_len"], ACCEPTED)
    for nothing in ("", "=3"):
        with pytest.raises(BadInput, match="not key=value"):
            load(tmp_path / "no.yaml", [nothing], ACCEPTED)
    with pytest.raises(BadInput, match=r"run\.yaml': while .* in line 1, column 4 did not"):
        load(write(tmp_path, "a: [1, 2\n"), [], ACCEPTED)


def test_the_presets_file_of_dataflex_1_1_0_is_the_packaged_one(tmp_path: Path) -> None:
    text = "output_dir: a\ncomponents_cfg_file: src/dataflex/configs/components.yaml"
    assert load(write(tmp_path, text), [], ACCEPTED).dataflex.presets_file == PACKAGED_PRESETS


def test_names_come_as_lists_or_comma_strings() -> None:
    assert names("a, b,") == names(["a", "b"]) == ("a", "b")
    assert names(None) == ()
