"""A store in a bucket: training, builds by many workers and every command that loads a model."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from gradstore import open_store
from gradstore.store.verify import verify_store

SHORT = {"max_samples": 48, "gradient_accumulation_steps": 1, "warmup_step": 1, "update_step": 1,
         "train_step": 3, "save_steps": 1, "component_params": {"proj_dim": 64}}  # fmt: skip


@pytest.fixture
def environment(bucket: str) -> dict[str, str]:
    """What a process needs to reach the bucket."""
    return {name: value for name, value in os.environ.items() if name.startswith("AWS_")}


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


def test_training_with_its_store_in_a_bucket_resumes_and_selects_as_with_a_folder(
    cli: Any, config: Any, bucket: str, environment: dict[str, str], tmp_path: Path
) -> None:
    local = cli("train", config(**SHORT, output_dir=str(tmp_path / "local")))
    assert local.code == 0, local.err[-3000:]
    path = config(**SHORT, gradstore=bucket)
    killed = cli("train", path, env=environment, faults={"kill_step": 2})
    assert killed.code == -9
    resumed = cli("train", path, env=environment)
    assert resumed.code == 0, resumed.err[-3000:]
    assert not (tmp_path / "run" / "gradstore").exists()
    assert selections(tmp_path / "run") == selections(tmp_path / "local") != {}
    assert features(bucket) == features(tmp_path / "local" / "gradstore")
    assert (tmp_path / "run" / "adapter_model.safetensors").read_bytes() == (
        tmp_path / "local" / "adapter_model.safetensors"
    ).read_bytes()
    assert verify_store(bucket).ok


def until_it_ends(process: int, said: Path) -> None:
    """Wait for a build in the background, whose last line names its store."""
    ends = time.monotonic() + 60
    while "store: s3://" not in (text := said.read_text()) and time.monotonic() < ends:
        time.sleep(0.05)
    assert "store: s3://" in text, f"process {process}: {text[-3000:]}"


def test_two_workers_build_in_a_bucket_what_one_process_builds_in_a_folder(
    cli: Any, config: Any, bucket: str, environment: dict[str, str], tmp_path: Path
) -> None:
    path = config(max_samples=280, component_params={"proj_dim": 64, "gradient_type": "sgd"})
    alone = cli("gradstore", "build", path, f"gradstore={tmp_path / 'one'}")
    assert alone.code == 0, alone.err[-3000:]
    build = ("gradstore", "build", path, f"gradstore={bucket}", "--worker")
    first = cli(*build, "1/2", env=environment, background=tmp_path / "first.txt")
    second = cli(*build, "2/2", env=environment)
    assert second.code == 0, second.err[-3000:]
    until_it_ends(first.code, tmp_path / "first.txt")
    assert features(bucket) == features(tmp_path / "one")
    assert verify_store(bucket).ok


def test_what_cannot_be_in_a_bucket_or_reached_is_told_before_a_model_is_loaded(
    cli: Any, config: Any, bucket: str, environment: dict[str, str]
) -> None:
    for changes, code, says in (
        ({"output_dir": "s3://features/run"}, 2, "output_dir is 's3://features/run'"),
        ({"gradstore": "s3://Features"}, 2, "'Features' is no name of a bucket"),
        ({"gradstore": "gs://features/a"}, 2, "gs:// is not known"),
        ({"gradstore": "s3://no-such-bucket/a"}, 5, 'there is no bucket "no-such-bucket"'),
    ):
        result = cli("train", config(**changes), env=environment)
        assert (result.code, says in result.message) == (code, True), result.err[-3000:]
        assert "loading" not in result.err.lower()
