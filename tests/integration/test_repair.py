"""`gradstore repair`: the run's own model puts damaged rows back, byte for byte."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from gradstore.store.verify import verify_store


def hashes(store: Path) -> dict[str, str]:
    return {
        path.relative_to(store).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(store.rglob("*"))
        if path.is_file() and path.name != "writer.lock" and "staging" not in path.parts
    }


def test_repair_with_the_runs_configuration_restores_the_committed_bytes(
    cli: Any, config: Any, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    short = {"output_dir": str(run), "update_step": 1, "update_times": 1,
             "gradient_accumulation_steps": 1}  # fmt: skip
    path = config(**short)
    result = cli("train", path)
    assert result.code == 0, result.err[-3000:]
    store = run / "gradstore"
    before = hashes(store)
    (train,) = store.glob("generations/train/2")
    for name in ("features/c/0/0", "loss/c/0", "units/0.json"):
        (train / name).unlink()
    (target,) = store.glob("generations/target/*/2")
    chunk = target / "features/c/0/0"
    chunk.write_bytes(b"\1" + chunk.read_bytes()[1:])
    (store / "spaces/gradient/provenance.json").unlink()
    shutil.rmtree(store / "texts")

    report = cli("gradstore", "repair", store, "--json")
    assert report.code == 4, report.err[-3000:]
    told = json.loads(report.out)
    damaged = {each["generation"]: each for each in told["left"] if each["what"] == "unit"}
    assert damaged["train/2"]["rows"] == [0, 96]
    assert damaged["train/2"]["sources"][95] == ["tiny_train", 95]
    assert "repair STORE CONFIG" in report.message

    other = config("other.yaml", **short, component_params={"seed": 5, "proj_dim": 128})
    refused = cli("gradstore", "repair", store, other)
    assert refused.code == 3, refused.err[-3000:]
    assert "projection.seed" in refused.message

    done = cli("gradstore", "repair", store, path, "--json")
    assert done.code == 0, done.err[-3000:]
    after = hashes(store)
    commits = {name for name in after if name.startswith("commits/")} - before.keys()
    assert len(commits) == 2 * len(list(store.glob("texts/*")))  # a text is retired and kept again
    assert {k: v for k, v in after.items() if k in before and not k.startswith("texts/")} == {
        k: v for k, v in before.items() if not k.startswith("texts/")
    }
    assert verify_store(store).ok


def test_damage_of_another_run_in_the_store_stops_no_repair_of_this_ones(
    cli: Any, config: Any, tmp_path: Path
) -> None:
    short = {"update_step": 1, "update_times": 1, "gradient_accumulation_steps": 1}
    path = config(**short)
    store = tmp_path / "run" / "gradstore"
    other = config("other.yaml", **short, seed=7, output_dir=str(tmp_path / "other"),
                   gradstore=str(store), gradstore_run="a")  # fmt: skip
    for each in (path, other):
        assert (result := cli("train", each)).code == 0, result.err[-3000:]
    before = hashes(store)
    for name in ("a/train/2", "train/2"):
        (store / "generations" / name / "features/c/0/0").unlink()
    first = cli("gradstore", "repair", store, path, "--new-attempt", "--json")
    assert first.code == 4, first.err[-3000:]
    told = json.loads(first.out)
    assert [each["generation"] for each in told["left"]] == ["a/train/2"]
    assert "a/train/2" in "".join(told["notes"])
    assert "adapter" in "".join(told["notes"])
    second = cli("gradstore", "repair", store, other)
    assert second.code == 0, second.err[-3000:]
    assert hashes(store) == before
