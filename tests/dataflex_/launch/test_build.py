"""The features that `gradstore build` gives to each component."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from dataflex.bridge import arguments
from dataflex.config.keys import load
from dataflex.config.presets import resolve
from dataflex.features.settings import FeatureSettings
from dataflex.features.store_owner import built_by
from dataflex.launch.build import feature_settings
from dataflex.run.output_owner import remember_identity
from dataflex.selectors.less import LessSelector

EXAMPLES = Path(__file__).resolve().parents[3] / "examples"
#: Those of the packaged preset.
LESS = LessSelector(**resolve("dynamic_select", "less", {}).params).settings


@pytest.fixture(autouse=True)
def _at_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(EXAMPLES.parent)


def settings(example: str, *overrides: str) -> FeatureSettings:
    path = EXAMPLES / f"{example}.yaml"
    return feature_settings(load(path, list(overrides), arguments.accepted_keys()))


@pytest.mark.parametrize(
    "name", ["near", "tsds", "coincide", "loss", "delta_loss", "mirror", "random"]
)
def test_a_selector_without_gradients_gets_those_of_less_and_one_line_says_so(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        found = settings(f"train_lora/selectors/{name}")
    assert found == LESS
    (record,) = caplog.records
    assert f"component {name!r} stores no gradients" in record.getMessage()


@pytest.mark.parametrize(
    "example",
    ["selectors/custom", "mixers/odm", "weighters/adapt", "reorders/sorting"],
)
def test_so_does_every_other_kind(example: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert settings(f"train_lora/{example}") == LESS
    assert len(caplog.records) == 1


@pytest.mark.parametrize("name", ["less", "icons"])
def test_a_selector_by_gradients_gets_its_own(name: str, caplog: pytest.LogCaptureFixture) -> None:
    own = "component_params={proj_dim: 64, gradient_type: sign}"
    with caplog.at_level(logging.WARNING):
        found = settings(f"train_lora/selectors/{name}", own)
    assert (found.proj_dim, found.gradient_type) == (64, "sign")
    assert not caplog.records


def test_a_stage_by_gradients_gives_a_pipeline_its_features() -> None:
    assert settings("train_lora/pipelines/less_then_zigzag") != LESS


@pytest.mark.parametrize(
    ("name", "said"), [("nice", "target features of its own"), ("cluster_less", "those of every")]
)
def test_what_training_alone_makes_is_said(
    name: str, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        settings(f"train_lora/selectors/{name}")
    (record,) = caplog.records
    assert said in record.getMessage()


def test_static_has_the_features_of_less_without_a_word(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert settings("train_lora/selectors/less", "train_type=static") == LESS
    assert not caplog.records


def test_a_build_is_of_the_run_that_owns_the_folder_else_of_the_folder(tmp_path: Path) -> None:
    path = EXAMPLES / "train_lora/selectors/less.yaml"

    def config(folder: str):  # noqa: ANN202
        return load(path, [f"output_dir={tmp_path / folder}"], arguments.accepted_keys())

    assert built_by(config("a")) == built_by(config("a")) != built_by(config("b"))
    assert not list(tmp_path.iterdir())
    remember_identity(tmp_path / "a", "run 1")
    assert built_by(config("a")) == "run 1"
