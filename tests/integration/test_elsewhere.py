"""A store in a bucket, or behind a service: training and workers that share no disk with it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from gradstore import open_store
from gradstore.store.verify import verify_store

SHORT = {"max_samples": 48, "gradient_accumulation_steps": 1, "warmup_step": 1, "update_step": 1,
         "train_step": 3, "save_steps": 1, "component_params": {"proj_dim": 64}}  # fmt: skip
BUILD = {"max_samples": 280, "component_params": {"proj_dim": 64, "gradient_type": "sgd"}}


class Elsewhere(NamedTuple):
    """A place for a store, what a process needs to write there, and what nobody is shown."""

    address: str
    env: dict[str, str]
    key: str


@pytest.fixture(params=["bucket", "service"])
def elsewhere(request: pytest.FixtureRequest) -> Elsewhere:
    """An empty place."""
    if request.param == "service":
        service = request.getfixturevalue("service")
        needed = {"GRADSTORE_WRITE_TOKEN": service.write_key}
        return Elsewhere(service.address, needed, service.write_key)
    address = request.getfixturevalue("bucket")
    needed = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    return Elsewhere(address, needed, needed["AWS_SECRET_ACCESS_KEY"])


def ok(result: Any) -> Any:
    assert result.code == 0, result.err[-3000:]
    return result


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of what the first test that needs it makes on this machine's disk."""
    return tmp_path_factory.mktemp("here")


@pytest.fixture
def trained(here: Path, cli: Any, config: Any) -> Path:
    """The run whose store is in a folder."""
    if not (here / "run").exists():
        ok(cli("train", config("here.yaml", **SHORT, output_dir=str(here / "run"))))
    return here / "run"


@pytest.fixture
def built(here: Path, cli: Any, config: Any) -> Path:
    """The store that one process builds in a folder."""
    if not (here / "store").exists():
        ok(cli("gradstore", "build", config("one.yaml", **BUILD), f"gradstore={here / 'store'}"))
    return here / "store"


def features(store: str | Path) -> dict[str, tuple[bytes, ...]]:
    """The stored bytes of every generation."""
    return {
        each.name: tuple(each.raw(unit).tobytes() for unit in range(len(each.units)))
        for each in open_store(store).generations()
    }


def selections(run: Path) -> dict[str, Any]:
    return {
        path.name: json.loads(path.read_text())["indices"]
        for path in (run / "dataflex" / "selections").glob("*.json")
    }


def test_training_resumes_and_selects_as_with_a_folder_and_shows_no_key(
    cli: Any, config: Any, elsewhere: Elsewhere, trained: Path, tmp_path: Path
) -> None:
    path, run = config(**SHORT, gradstore=elsewhere.address), tmp_path / "run"
    assert elsewhere.key not in path.read_text()
    killed = cli("train", path, env=elsewhere.env, faults={"kill_step": 2})
    assert killed.code == -9
    resumed = ok(cli("train", path, env=elsewhere.env))
    assert not (run / "gradstore").exists()
    assert selections(run) == selections(trained) != {}
    assert features(elsewhere.address) == features(trained / "gradstore")
    adapters = [(folder / "adapter_model.safetensors").read_bytes() for folder in (run, trained)]
    assert adapters[0] == adapters[1]
    assert verify_store(elsewhere.address).ok
    written = [file.read_bytes() for file in run.rglob("*") if file.is_file()]
    assert written, "the key is in no file, and in nothing that was said"
    said = (resumed.out, resumed.err, killed.out, killed.err)
    for data in (*written, *(each.encode() for each in said)):
        assert elsewhere.key.encode() not in data


def test_two_workers_build_what_one_process_builds_in_a_folder(
    cli: Any, config: Any, until: Any, elsewhere: Elsewhere, built: Path, tmp_path: Path
) -> None:
    path, said = config(**BUILD), tmp_path / "first.txt"
    build = ("gradstore", "build", path, f"gradstore={elsewhere.address}", "--worker")
    cli(*build, "1/2", env=elsewhere.env, background=said)
    ok(cli(*build, "2/2", env=elsewhere.env))
    until(said, f"store: {elsewhere.address}")
    assert features(elsewhere.address) == features(built)
    assert verify_store(elsewhere.address).ok
    chosen = []
    for name, store in (("there", elsewhere.address), ("here", built)):
        output = tmp_path / f"{name}.jsonl"
        ok(cli("gradstore", "select", store, "-k", 7, "-o", output, env=elsewhere.env))
        chosen.append(output.read_bytes())
    assert chosen[0] == chosen[1] != b""


def test_what_cannot_be_in_a_bucket_or_reached_is_told_before_a_model_is_loaded(
    cli: Any, config: Any, bucket: str
) -> None:
    environment = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    for changes, code, says in (
        ({"output_dir": "s3://features/run"}, 2, "output_dir is 's3://features/run'"),
        ({"gradstore": "s3://Features"}, 2, "'Features' is no name of a bucket"),
        ({"gradstore": "gs://features/a"}, 2, "gs:// is not known"),
        ({"gradstore": "s3://no-such-bucket/a"}, 5, 'there is no bucket "no-such-bucket"'),
    ):
        result = cli("train", config(**changes), env=environment)
        assert (result.code, says in result.message) == (code, True), result.err[-3000:]
        assert "loading" not in result.err.lower()


def test_a_service_that_cannot_be_written_is_told_before_a_model_is_loaded(
    cli: Any, config: Callable[..., Path], service: Any
) -> None:
    no_key: dict[str, str | None] = {"GRADSTORE_WRITE_TOKEN": None, "GRADSTORE_TOKEN": None}
    for changes, env, code, says in (
        ({"output_dir": service.address}, {}, 2, "expected a folder of this machine"),
        ({"gradstore": "http://store.example.org"}, {}, 2, "could be read on the way"),
        ({"gradstore": service.address}, {}, 2, "needs a key"),
        ({"gradstore": service.address}, {"GRADSTORE_TOKEN": service.read_key}, 5,
         "this key may only read"),
        ({"gradstore": service.address}, {"GRADSTORE_WRITE_TOKEN": "x" * 20}, 5,
         "does not know this key"),
    ):  # fmt: skip
        result = cli("train", config(**changes), env={**no_key, **env})
        assert (result.code, says in result.message) == (code, True), result.err[-3000:]
        assert "loading" not in result.err.lower()
