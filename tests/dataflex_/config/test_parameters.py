"""Values of the wrong type are refused before anything is built."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_type_hints

import pytest

from dataflex.bridge import arguments
from dataflex.config.keys import load
from dataflex.config.parameters import declared, faults
from dataflex.config.presets import presets_of, resolve
from dataflex.config.registry import KINDS, PACKAGES, constructors_of, strategies
from dataflex.config.values import names_a_folder
from dataflex.models.paths import missing_folder_faults
from gradstore.errors import BadInput


class Plain:
    def __init__(self, rows: int, rate: float = 0.1, names: list[str] | None = None) -> None:
        """Two numbers, and something that is not checked."""


@pytest.mark.parametrize(
    ("train_type", "name", "params", "said"),
    [
        ("dynamic_select", "nice", {"prompt_template": 3}, "prompt_template is 3; expected text"),
        ("dynamic_select", "near", {"max_K": "many"}, "max_K is 'many'; expected a whole number"),
        ("dynamic_mix", "random", {"seed": "x"}, "seed is 'x'; expected a whole number"),
        ("dynamic_mix", "dynamic_moe", {"collect_steps": float("inf")}, "collect_steps is inf"),
        ("dynamic_weight", "adapt", {"self_normalize": "no"}, "expected true or false"),
        ("dynamic_weight", "joint_update_aware", {"embed_layer": []}, "embed_layer is \\[\\]"),
        ("dynamic_reorder", "saw", {"pattern_params": -1}, "expected a mapping"),
        ("dynamic_reorder", "saw", {"seed": None}, "seed is null"),
        ("dynamic_mix", "random", {"seed": -1}, "seed is -1; expected 0 or more"),
        ("dynamic_select", "loss", {"quantiles": ["a", "b"]}, "expected a list, each a number"),
        ("dynamic_lego", "pipeline", {"stages": "less"}, "stages is 'less'; expected a list"),
    ],
)
def test_a_parameter_of_the_wrong_type_is_refused(
    train_type: str, name: str, params: dict[str, Any], said: str
) -> None:
    with pytest.raises(BadInput, match=f"component '{name}': .*{said}"):
        resolve(train_type, name, params)


def test_every_strategy_has_annotations_that_can_be_read() -> None:
    assert set(PACKAGES) == {kind for _, kind in KINDS.values()}
    for kind in PACKAGES:
        for cls in strategies(kind).values():
            for constructor in constructors_of(cls):
                get_type_hints(constructor)


def test_a_whole_number_is_a_number_and_a_boolean_is_none() -> None:
    plain = declared(Plain.__init__)
    assert faults(plain, {"rows": 3, "rate": 1, "names": 7, "more": "x"}) == []
    assert len(faults(plain, {"rows": 2.5, "rate": True})) == 2


@pytest.mark.parametrize("key", ["dataset", "eval_dataset"])
@pytest.mark.parametrize("value", [-1, True, {"a": 1}, [[]]])
def test_names_of_data_sets_are_words(key: str, value: object, tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_text(json.dumps({"output_dir": "x", key: value}))
    with pytest.raises(BadInput, match=f"{key} is .*expected a name"):
        load(path, [], {"output_dir", "dataset", "eval_dataset"})


@pytest.mark.parametrize(
    ("key", "value"),
    [("max_steps", [1]), ("val_size", {}), ("learning_rate", float("nan")), ("max_samples", True),
     ("max_steps", float("inf")), ("learning_rate", "fast"), ("do_train", [])],
)  # fmt: skip
def test_what_is_no_number_is_refused_for_llamafactory_too(key: str, value: object) -> None:
    faults = arguments.mistyped({key: value})
    assert list(faults) == [key]
    assert faults[key].startswith(f"{key} is {value!r}; expected ")


def test_numbers_that_llamafactory_takes_are_left_alone() -> None:
    taken = {"max_steps": 5, "learning_rate": 1e-3, "num_train_epochs": 1, "do_train": True,
             "max_grad_norm": float("inf"), "max_samples": None}  # fmt: skip
    assert arguments.mistyped(taken) == {}


@pytest.mark.parametrize("content", ["- less\n", "3\n", "selectors: {a: 1}\n", "selectors: [\n"])
def test_a_file_of_presets_that_is_none_is_refused(content: str, tmp_path: Path) -> None:
    path = tmp_path / "components.yaml"
    path.write_text(content)
    with pytest.raises(BadInput, match=r"components_cfg_file .*components\.yaml"):
        presets_of("selectors", path)


def test_a_preset_reads_numbers_as_the_run_does(tmp_path: Path) -> None:
    path = tmp_path / "components.yaml"
    path.write_text("selectors: {mine: {name: nice, params: {temperature: 1e-2}}}\n")
    assert presets_of("selectors", path)["mine"]["params"]["temperature"] == 0.01


def test_placeholders_of_a_preset_are_the_runs_keys(tmp_path: Path) -> None:
    """In stages of a pipeline, too."""
    path = tmp_path / "components.yaml"
    path.write_text(
        "selectors: {mine: {name: near, params: {indices_path: '${output_dir}/n.npy'}}}\n"
        "pipelines: {one: {stages: [{family: selector, component: mine, keep_ratio: 0.5}]}}\n"
    )
    run = {"output_dir": str(tmp_path / "run"), "learning_rate": 1e-4}
    near = resolve("dynamic_select", "mine", {}, path, run)
    assert near.params["indices_path"] == str(tmp_path / "run" / "n.npy")
    (stage,) = resolve("dynamic_lego", "one", {}, path, run).build().rows
    assert stage.strategy.file == tmp_path / "run" / "n.npy"


@pytest.mark.parametrize(
    ("preset", "says"),
    [
        ("{name: loss, parms: {focus: low}}", "did you mean 'params'"),
        ("{name: loss, params: [1]}", r"params in preset 'a' of selectors is \[1\]"),
    ],
)
def test_a_preset_has_no_other_keys(preset: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "components.yaml"
    path.write_text(f"selectors: {{a: {preset}}}\n")
    with pytest.raises(BadInput, match=says):
        resolve("dynamic_select", "a", {}, path)


@pytest.mark.parametrize("content", ["def broken(:\n", "raise KeyError('at import')\n"])
def test_a_target_that_cannot_be_imported_is_told(
    content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_broken.py").write_text(content)
    monkeypatch.syspath_prepend(tmp_path)
    for target in ("own_broken:Own", ".own_broken:Own"):
        with pytest.raises(BadInput, match=f"target '{target}' cannot be imported"):
            resolve("dynamic_select", "custom", {"target": target})


@pytest.mark.parametrize("wrong", ["${nowhere}", "${output_dir"])
def test_a_placeholder_that_is_none_is_refused(wrong: str, tmp_path: Path) -> None:
    path = tmp_path / "components.yaml"
    path.write_text(f"selectors: {{a: {{name: near, params: {{indices_path: '{wrong}'}}}}}}\n")
    with pytest.raises(BadInput, match="components_cfg_file"):
        resolve("dynamic_select", "a", {}, path, {"output_dir": "x"})


@pytest.mark.parametrize(
    ("name", "folder"),
    [("gpt2", False), ("org/name", False), ("./name", True), ("../a/b", True), ("/a", True),
     ("~/a", True), ("a/b/c", True), (".", True)],
)  # fmt: skip
def test_one_rule_tells_a_folder_from_a_hub_id(name: str, folder: bool) -> None:
    assert names_a_folder(name) is folder
    assert bool(missing_folder_faults("key", name)) is folder
