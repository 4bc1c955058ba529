"""The features that `gradstore build` gives to each component."""

from __future__ import annotations

import logging
import re
import socket
from pathlib import Path
from typing import Any

import pytest

from dataflex.bridge import arguments
from dataflex.config.keys import RunConfig, load
from dataflex.config.presets import resolve
from dataflex.features.settings import FeatureSettings
from dataflex.features.store_owner import built_by
from dataflex.launch import build
from dataflex.launch.build import feature_settings
from dataflex.launch.preflight import check_gradients
from dataflex.run.output_owner import remember_identity
from dataflex.selectors.less import LessSelector
from gradstore.errors import BadInput, StoreIOError
from gradstore.storage.leases import Worker
from gradstore.store.writer import StoreWriter

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
@pytest.mark.parametrize("static", [False, True])
def test_so_does_every_other_kind_and_the_plain_baseline_of_its_runs(
    example: str, static: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert settings(f"train_lora/{example}", *(["train_type=static"] * static)) == LESS
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


#: LlamaFactory's own YAML, with no key of DataFlex.
PLAIN = "offline/plain"


def test_plain_llamafactory_has_the_features_of_less_without_a_word(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING):
        assert settings(PLAIN) == LESS
    assert not caplog.records


def test_parameters_given_to_plain_llamafactory_are_those_of_the_features(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING):
        found = settings(PLAIN, "component_params={gradient_type: sgd, proj_dim: 64}")
    assert (found.gradient_type, found.proj_dim) == ("sgd", 64)
    assert not found.train_features.needs_moments
    assert not caplog.records


def test_the_component_of_a_plain_configuration_is_a_selector() -> None:
    own = settings("train_lora/selectors/cluster_less")
    assert own != LESS
    assert settings(PLAIN, "component_name=cluster_less") == own
    with pytest.raises(BadInput, match="component_name for dynamic_select: 'lesss'"):
        settings(PLAIN, "component_name=lesss")
    with pytest.raises(BadInput, match="gradient_typ"):
        settings(PLAIN, "component_params.gradient_typ=sgd")


def test_the_configuration_on_the_page_of_builds_is_plain_llamafactorys_and_has_its_features(
    tmp_path: Path,
) -> None:
    page = (EXAMPLES.parent / "docs" / "guide" / "offline.md").read_text()
    block = re.search(r"```yaml\n(.*?)```", page, flags=re.S)
    assert block is not None
    path = tmp_path / "config.yaml"
    path.write_text(block[1])
    config = load(path, [], arguments.accepted_keys())
    assert config.dataflex.train_type == "static"
    check_gradients(config)
    assert feature_settings(config).gradient_type == "sgd"


def test_a_build_is_of_the_run_that_owns_the_folder_else_of_the_folder(tmp_path: Path) -> None:
    path = EXAMPLES / "train_lora/selectors/less.yaml"

    def config(folder: str):  # noqa: ANN202
        return load(path, [f"output_dir={tmp_path / folder}"], arguments.accepted_keys())

    assert built_by(config("a")) == built_by(config("a")) != built_by(config("b"))
    assert not list(tmp_path.iterdir())
    remember_identity(tmp_path / "a", "run 1")
    assert built_by(config("a")) == "run 1"


@pytest.mark.parametrize(
    ("place", "lacks"),
    [
        ("http://127.0.0.1:9", "GRADSTORE_TOKEN"),
        ("s3://bucket/a", "AWS_ACCESS_KEY_ID has no secret"),
    ],
)
def test_a_node_without_the_stores_credentials_is_named_before_it_loads_a_model(
    place: str, lacks: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if place.startswith("s3:"):
        pytest.importorskip("obstore")
    for name in ("GRADSTORE_TOKEN", "GRADSTORE_WRITE_TOKEN", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    given = [f"output_dir={tmp_path}", f"gradstore={place}"]
    path = EXAMPLES / "train_lora/selectors/less.yaml"
    config = load(path, given, arguments.accepted_keys())

    def load_model(*_: Any) -> Any:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(build, "_loaded", load_model)
    watch: Any = None
    told = (
        f"{socket.gethostname()} can't open the store: .*{lacks}.* environment of its `ray start`"
    )
    with pytest.raises(StoreIOError, match=told):
        build._export_as_actor(config, LESS, [], None, Worker(), watch)


def less_into(folder: Path, *given: str) -> RunConfig:
    path = EXAMPLES / "train_lora/selectors/less.yaml"
    return load(path, [f"output_dir={folder}", *given], arguments.accepted_keys())


def test_a_node_that_does_not_see_the_folder_of_the_store_is_named_and_makes_none(
    tmp_path: Path,
) -> None:
    """There the same path is a folder of its own, in which a whole store could be built."""
    config, watch = less_into(tmp_path / "out"), None
    with build.seen_from_here(config.store_path) as seen:
        assert seen is not None
        assert seen.parent == tmp_path / "out"
    told = rf"{socket.gethostname()} does not see the folder of the store, .*out/gradstore"
    with pytest.raises(StoreIOError, match=told):
        build._export_as_actor(config, LESS, [], seen, Worker(), watch)  # type: ignore[arg-type]
    assert list((tmp_path / "out").iterdir()) == []


def test_a_store_that_is_there_is_looked_for_and_nothing_is_left_beside_it(tmp_path: Path) -> None:
    store = tmp_path / "store"
    with StoreWriter(store, provenance={"a": 1}):
        pass
    with build.seen_from_here(store) as seen:
        assert seen == store / "zarr.json"
        assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_the_runs_own_store_is_refused_before_a_model_is_loaded_where_it_takes_no_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = less_into(tmp_path / "out", "component_params.gradient_type=sgd")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "gradstore").write_text("")

    def load_model(*_: Any) -> Any:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(build, "_loaded", load_model)
    with pytest.raises(StoreIOError, match=r"out/gradstore' cannot be written: .* is a file"):
        build.build(config)
