"""What benchmarks/ counts, fits and writes down is what its scripts say; no time is looked at."""

from __future__ import annotations

import ast
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
KERNELS = ROOT / "kernels" / "gradkernels" / "gpu"


def test_the_load_is_that_before_the_benchmark(
    script: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "getloadavg", lambda: (0.25, 0.0, 0.0))
    report = script("report")
    monkeypatch.setattr(os, "getloadavg", lambda: (9.0, 0.0, 0.0))
    assert report.machine(threads=1)["load"] == 0.2


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


# ---- ten million rows ------------------------------------------------------------------------


def test_a_small_run_of_scale_gives_every_line_of_its_table(
    script: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    csv = tmp_path / "scale.csv"
    options = ["--rows", "1500", "--rerank-rows", "600", "--pairs", "1", "--csv", str(csv)]
    monkeypatch.setattr(sys, "argv", ["", *options, "--folder", str(tmp_path)])
    script("scale").main()
    lines = {line["what"]: line for line in script("report").read(csv)}
    assert {line["unit_rows"] for line in lines.values()} == {"256"}
    # Records and plan beside 545 bytes of arrays, and six units of which one is not full.
    assert 590 < float(lines["bytes a row"]["row_bytes"]) < 625
    assert int(lines["rerank"]["candidates"]) == 45  # 1.5 times 5% of 600
    assert float(lines["rerank"]["row_bytes"]) > 4096
    shown = script("tables").scale(csv)
    assert "units of 256" in shown
    assert "re-rank of the best 7.5%" in shown
    assert "From disk in all 1 runs" in shown


def test_the_run_of_scale_with_most_pairs_is_shown(script: Any) -> None:
    tables = script("tables")

    def run(units: int, pairs: int, ratio: float, name: str = "") -> Any:
        line = {"unit_rows": str(units), "pairs": str(pairs), "ratio": str(ratio), "cpu": "EPYC",
                "threads": "2", "ratio_min": "", "ratio_max": "", "name": name}  # fmt: skip
        return {"build": line, "cold": line}

    runs = [run(4096, 9, 0.5), run(256, 2, 0.7), run(256, 5, 0.75, "best"), run(256, 3, 0.9)]
    assert tables.shown_run(runs)["cold"]["name"] == "best"
    assert "all 4 runs, 3 of them below 0.8" in tables.from_disk(runs)


# ---- writing ---------------------------------------------------------------------------------


def test_writing_is_measured_as_exports_do_it_too(script: Any, tmp_path: Path) -> None:
    lines = script("throughput").writing(tmp_path, rows=600, dim=32, pairs=1)
    assert [line["behind"] for line in lines] == [4, 1]
    assert all(line["pairs"] == 1 and line["map_s"] == lines[0]["map_s"] for line in lines)


# ---- launches --------------------------------------------------------------------------------


def test_an_export_of_two_layers_launches_no_more_than_its_limit(
    script: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    launches = script("launches")
    monkeypatch.setattr(launches, "VOCABULARY", 256)
    lines = launches.measure(layers=2)
    assert [line["projection"] for line in lines] == ["sjlt", "rademacher"]
    for line in lines:
        assert line["limit"] == 2 * 2 * 7 * 2  # two of each of two matrices of seven layers, twice
        assert 0 < line["model"]
        assert line["launches"] <= line["limit"]
        # Waits find the target positions and rows without any; a group has five results.
        assert line["waits"] - line["model_waits"] <= 2
        assert 0 < line["copies"] <= 5


def test_waits_are_counted(script: Any) -> None:
    pytest.importorskip("triton")
    import torch

    launches = script("launches")
    counting, x = launches.Counting(), torch.arange(4.0)
    with launches.as_on_a_gpu(counting), counting:
        assert x.is_cuda
        x[x > 1]  # how many that are, the device knows
        x[:2].sum().item()
        x.nonzero()
        x.cpu()
        x[torch.tensor([0, 1])]
    assert (counting.waits.total(), counting.copies) == (3, 1)


# ---- growth ----------------------------------------------------------------------------------


def test_growth_is_fitted_beside_a_start_and_without_the_pass(script: Any) -> None:
    fitted = script("growth").fitted
    x = np.array([1000, 4000, 16_000, 32_000])
    line = fitted("linear", x, 1.3 + x / 4000)
    assert (line.slope, line.start) == (pytest.approx(1, abs=0.01), pytest.approx(1.3, abs=0.02))
    assert fitted("linear", x, 1.3 + (x / 4000) ** 1.5).slope == pytest.approx(1.5, abs=0.01)
    # A pass that outweighs the rest hides how that grows.
    passes, seconds = np.full(4, 5.0), 5.0 + 0.2 * np.sqrt(x / 1000)
    assert fitted("flat", x, seconds).slope < 0.1
    assert fitted("flat", x, seconds, passes).slope == pytest.approx(0.5, abs=0.01)
    rest = fitted("linear", x, passes + x / 4000, passes)
    assert (rest.slope, rest.start) == (pytest.approx(1, abs=0.01), pytest.approx(0, abs=0.01))


def test_growth_fails_only_where_every_round_is_above_the_limit(script: Any) -> None:
    failed = script("growth").failed
    noisy = {"slope": 1.32, "slope_min": 1.05, "slope_max": 2.2, "limit": 1.1}
    assert not failed([noisy])
    assert failed([noisy, noisy | {"slope_min": 1.14}])


def test_growth_shows_the_last_run_alone(script: Any, tmp_path: Path) -> None:
    head = "cpu,cores,threads,torch,date,load,chip,factor,projection,claim,size,seconds,start_s"
    more = "slope,slope_min,slope_max"
    runs = [(1, 2, 3), (1, 5)]
    lines = [f"C,2,2,2,D,1,,p,sjlt,linear,{size},{number + size},0,1,1,1"
             for number, sizes in enumerate(runs) for size in sizes]  # fmt: skip
    csv = tmp_path / "growth.csv"
    csv.write_text("\n".join([f"{head},{more}", *lines]) + "\n", encoding="utf-8")
    assert "| 1, 5 | 2.00, 6.00 |" in script("tables").growth(csv)


# ---- a GPU's parts ---------------------------------------------------------------------------


def launched_from_python() -> set[str]:
    """Names of kernels that some `kernel[grid](...)` of gradkernels.gpu launches."""
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in KERNELS.glob("*.py")]
    defined = {
        node.name
        for tree in trees
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef)
        and any("jit" in ast.unparse(each) for each in node.decorator_list)
    }
    called = {
        ast.unparse(node.func.value).rpartition(".")[2]
        for tree in trees
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript)
    }
    return defined & called


def test_parts_of_the_gpu_benchmark_reach_every_kernel(
    script: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    gpu, launches = script("gpu"), script("launches")
    case = gpu.Case(p=4096, d=64, rows=3)
    for name, value in (("CASES", [case]), ("FEATURE_CASES", [case]), ("ROTATED_DIMS", (64,)),
                        ("SLICE", 512), ("ROTATED_ROWS", 2)):  # fmt: skip
        monkeypatch.setattr(gpu, name, value)
    monkeypatch.setattr(gpu, "synchronize", lambda: None)
    monkeypatch.setattr(gpu, "check", lambda *_: None)  # no kernel has run
    asked = []

    def large_lines(bench: Any, dim: int, pairs: int, layers: int) -> list[dict[str, Any]]:
        asked.append((bench.model, len(bench.rows), layers))
        return [{"projection": "sjlt"}]

    monkeypatch.setattr(gpu.export_ratio, "trained_model", lambda *_, layers: f"{layers} layers")
    monkeypatch.setattr(gpu.export_ratio, "large_lines", large_lines)
    session = gpu.Session("cpu", repeats=1, pairs=1, layers=32, peak=(1.0, 1.0))
    reached: dict[str, set[str]] = {}
    for part, work in gpu.PARTS.items():
        counting = launches.Counting()
        with launches.as_on_a_gpu(counting), np.errstate(all="ignore"):
            assert work(session)
        names = [name for name in counting.launched if name.startswith("triton ")]
        reached[part] = {name.removeprefix("triton ") for name in names}
    assert set().union(*reached.values()) == launched_from_python() != set()
    assert asked == [("32 layers", 32, 32)]
    assert set(reached) == {"kernels", "features", "rotation", "export"}


def test_a_table_of_the_gpu_tells_every_part(script: Any, tmp_path: Path) -> None:
    tables, report = script("tables"), script("report")
    where = report.machine(threads=1, chip="H200")
    base = where | {"dtype": "float32", "p": 100, "d": 64, "rows": 3, "of_peak": "", "of_copy": 0.1}
    projected = [base | {"part": part, "method": "sjlt", "backend": backend, "ms_per_row": ms}
                 for part in ("kernels", "features")
                 for backend, ms in (("triton", 1.0), ("torch", 4.0))]  # fmt: skip
    turned = where | {"part": "rotation", "backend": "cpu", "d": 64, "ms_per_row": 0.002}
    ratio = {"ratio": 0.9, "ratio_min": 0.8, "ratio_max": 1.0, "limit": 1.02}
    shape = "llama-8b, 32 layers"
    exported = where | {"part": "export", "method": "sjlt", "shape": shape} | ratio
    csv = tmp_path / "gpu.csv"
    for lines in (projected, [turned], [exported]):
        report.append(csv, lines)
    shown = tables.gpu(csv)
    assert "| sjlt, features | float32 | 100 | 64 | 3 | 1 | 4 | 4 |" in shown
    assert "d = 64, cpu: 2 us" in shown
    assert "llama-8b, 32 layers, sjlt: 0.90 (0.80 to 1.00), aimed at 1.02 at most" in shown


# ---- tables ----------------------------------------------------------------------------------


def test_the_readme_lists_methods_by_their_loss(script: Any) -> None:
    rows = [line.split(" | ") for line in script("tables").quality().splitlines()[2:]]
    losses = [float(cells[2].split()[0]) for cells in rows if len(cells) == 5]
    assert losses == sorted(losses)
    assert len(losses) == 10


def test_bytes_that_older_lines_lack_are_told_as_such(
    script: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tables = script("tables")
    near = {"dtype": "1bit", "model": "", "feature_bytes": "512", "row_bytes": "545",
            "file_bytes": "595.2", "disk_bytes": "700.1", "ratio": "1", "ratio_min": "",
            "ratio_max": "", "read_rows_s": "1", "overlap": "1", "reranked": "1", "spearman": "1",
            "skill": "1", "cpu": "C", "cores": "2", "threads": "1", "torch": "2",
            "date": "D"}  # fmt: skip
    older = {key: value for key, value in near.items() if key not in ("file_bytes", "disk_bytes")}
    monkeypatch.setattr(tables, "read", lambda _: [near, older | {"dtype": "int8"}])
    shown = tables.dtypes()
    assert "| `1bit` | 512 | 545 | 595 / 700 |" in shown
    assert "| `int8` | 512 | 545 | not recorded |" in shown


# ---- projections on a processor ----------------------------------------------------------------


@pytest.mark.parametrize("why", [None, "this processor has no VNNI"])
def test_products_of_bytes_are_timed_and_shown_where_the_processor_has_vnni(
    script: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, why: str | None
) -> None:
    projection, report = script("projection"), script("report")
    monkeypatch.setattr(projection, "vnni_missing", lambda: why)
    case, csv = projection.Case(p=1000, d=64, rows=8), tmp_path / "projection_cpu.csv"
    ways = projection.ways_of(case)
    per_row = {way.method: [0.5] for way in ways}
    lines = [projection.line_of(case, way, 1000, per_row, [1e9]) for way in ways]
    report.append(csv, [report.machine() | line for line in lines])
    assert ("rademacher, int8, ms a row" in script("tables").projecting(csv)) == (why is None)
