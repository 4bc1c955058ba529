"""A store behind a service: training and workers of a build that share no disk with it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gradstore import open_store
from gradstore.store.verify import verify_store

SHORT = {"max_samples": 48, "gradient_accumulation_steps": 1, "warmup_step": 1, "update_step": 1,
         "train_step": 3, "save_steps": 1, "component_params": {"proj_dim": 64}}  # fmt: skip


@pytest.fixture
def environment(service: Any) -> dict[str, str]:
    """What a process needs to write."""
    return {"GRADSTORE_WRITE_TOKEN": service.write_key}


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


def test_training_through_a_service_resumes_and_selects_as_with_a_folder(
    cli: Any, config: Any, service: Any, environment: dict[str, str], tmp_path: Path
) -> None:
    local = cli("train", config(**SHORT, output_dir=str(tmp_path / "local")))
    assert local.code == 0, local.err[-3000:]
    path = config(**SHORT, gradstore=service.address)
    assert service.write_key not in path.read_text()
    killed = cli("train", path, env=environment, faults={"kill_step": 2})
    assert killed.code == -9
    resumed = cli("train", path, env=environment)
    assert resumed.code == 0, resumed.err[-3000:]
    assert not (tmp_path / "run" / "gradstore").exists()
    assert selections(tmp_path / "run") == selections(tmp_path / "local") != {}
    assert features(service.address) == features(tmp_path / "local" / "gradstore")
    assert (tmp_path / "run" / "adapter_model.safetensors").read_bytes() == (
        tmp_path / "local" / "adapter_model.safetensors"
    ).read_bytes()
    assert verify_store(service.folder).ok
    written = [file for file in (tmp_path / "run").rglob("*") if file.is_file()]
    assert written, "the key is in no file, and in nothing that was said"
    for data in (*(file.read_bytes() for file in written), resumed.err.encode(),
                 resumed.out.encode(), killed.err.encode()):  # fmt: skip
        assert service.write_key.encode() not in data


def until_it_ends(process: int, said: Path) -> None:
    """Wait for a build in the background, whose last line names its store."""
    ends = time.monotonic() + 60
    while "store: http://" not in (text := said.read_text()) and time.monotonic() < ends:
        time.sleep(0.05)
    assert "store: http://" in text, f"process {process}: {text[-3000:]}"


def test_two_workers_build_through_a_service_what_one_process_builds_in_a_folder(
    cli: Any, config: Any, service: Any, environment: dict[str, str], tmp_path: Path
) -> None:
    path = config(max_samples=280, component_params={"proj_dim": 64, "gradient_type": "sgd"})
    alone = cli("gradstore", "build", path, f"gradstore={tmp_path / 'one'}")
    assert alone.code == 0, alone.err[-3000:]
    build = ("gradstore", "build", path, f"gradstore={service.address}", "--worker")
    first = cli(*build, "1/2", env=environment, background=tmp_path / "first.txt")
    second = cli(*build, "2/2", env=environment)
    assert second.code == 0, second.err[-3000:]
    until_it_ends(first.code, tmp_path / "first.txt")
    assert features(service.address) == features(tmp_path / "one")
    assert verify_store(service.folder).ok
    chosen = []
    for name, store in (("there", service.address), ("here", tmp_path / "one")):
        output = tmp_path / f"{name}.jsonl"
        told = cli("gradstore", "select", store, "-k", 7, "-o", output, env=environment)
        assert told.code == 0, told.err[-3000:]
        chosen.append(output.read_bytes())
    assert chosen[0] == chosen[1] != b""


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
