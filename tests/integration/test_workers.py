"""Two processes that know only the store build what one builds: `--worker`, ranks of torchrun."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from gradstore import open_store
from gradstore.store.verify import verify_store

SMALL = {
    "max_samples": 280,
    "target_dataset": "tiny_target_sort,tiny_target_date",
    "component_params": {"proj_dim": 64, "gradient_type": "sgd"},
}


def generations(store: Path) -> dict[str, bytes]:
    """Every file of the generations, of their plans and of the texts."""
    files = (p for part in ("generations", "plans", "texts") for p in (store / part).rglob("*"))
    return {str(p.relative_to(store)): p.read_bytes() for p in files if p.is_file()}


def selected(cli: Any, store: Path, output: Path) -> tuple[str, list[float]]:
    result = cli("gradstore", "select", store, "-k", 100, "-o", output)
    assert result.code == 0, result.err[-2000:]
    told = json.loads(cli("gradstore", "score", store, "--json").out)
    return output.read_text(), told["scores"]


def test_two_workers_build_the_store_of_one_process(
    cli: Any, config: Any, until: Any, tmp_path: Path
) -> None:
    path = config(**SMALL)
    stores = {name: tmp_path / name for name in ("one", "many")}
    alone = cli("gradstore", "build", path, f"gradstore={stores['one']}")
    assert alone.code == 0, alone.err[-3000:]
    many = f"gradstore={stores['many']}"
    cli("gradstore", "build", path, many, "--worker", "1/2", background=tmp_path / "first.txt")
    second = cli("gradstore", "build", path, many, "--worker", "2/2")
    assert second.code == 0, second.err[-3000:]
    until(tmp_path / "first.txt", f"store: {stores['many']}")
    assert generations(stores["many"]) == generations(stores["one"])
    assert verify_store(stores["many"]).ok
    one, other = (
        [(c.kind, c.generations, c.plan_sha256, c.units) for c in open_store(store).commits]
        for store in stores.values()
    )
    assert one == other
    (rows, scores), (rows_of_many, scores_of_many) = (
        selected(cli, store, tmp_path / f"{name}.jsonl") for name, store in stores.items()
    )
    assert rows == rows_of_many
    np.testing.assert_array_equal(scores, scores_of_many)


def test_ranks_of_torchrun_write_for_themselves_the_store_of_one_process(
    cli: Any, config: Any, tmp_path: Path
) -> None:
    """No process group: each rank is a worker, and the first alone tells of it."""
    path = config(**SMALL)
    stores = {name: tmp_path / name for name in ("one", "many")}
    assert cli("gradstore", "build", path, f"gradstore={stores['one']}").code == 0
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    many = ["-m", "dataflex", "gradstore", "build", path, f"gradstore={stores['many']}"]
    result = cli(*torchrun, *many, program="python")
    assert result.code == 0, result.err[-3000:]
    assert generations(stores["many"]) == generations(stores["one"])
    told = [line for line in result.err.splitlines() if line.startswith("[dataflex]")]
    assert told.count(f"[dataflex] store: {stores['many']}") == 1
