"""What benchmarks/ counts, fits and writes down is what its scripts say; no time is looked at."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
KERNELS = ROOT / "kernels" / "gradkernels" / "gpu"


# ---- bytes -----------------------------------------------------------------------------------


def test_bytes_of_a_1bit_row_are_those_of_all_files(script: Any, tmp_path: Path) -> None:
    from gradstore.format.layout import generation_path, plan_path
    from gradstore.store.reader import open_store

    rows, store = 1024, tmp_path / "store"
    script("serve").write(store, rows, 4096, dtype="1bit", losses=True)
    parts = (store / generation_path("train/0"), store / plan_path("train/0"))
    whole, blocks = script("report").on_disk(*parts)
    assert open_store(store).generation("train/0").bytes / rows == pytest.approx(545.1, abs=0.1)
    files = [path for path in (*parts[0].rglob("*"), parts[1]) if path.is_file()]
    assert whole == sum(len(path.read_bytes()) for path in files)
    assert 590 < whole / rows < 610
    assert blocks >= whole
