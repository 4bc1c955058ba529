"""Promises of the index: same answers as the exact way, never a damaged or foreign file."""

from __future__ import annotations

import json
import logging
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gradstore.errors import BadInput
from gradstore.similarity import index as index_module
from gradstore.similarity.index import FeatureIndex
from gradstore.storage.hashing import sha256_file

faiss = pytest.importorskip("faiss")
SHA = "ab" * 32


class Committed:
    """A committed generation in memory."""

    name = "train/16"

    def __init__(self, features: np.ndarray, usable: np.ndarray | None = None) -> None:
        self.features = features.astype(np.float32)
        self.rows, self.dim = features.shape
        self.usable = np.ones(self.rows, dtype=bool) if usable is None else usable
        self.commit_sha: str | None = SHA

    def read(self, start: int, stop: int) -> np.ndarray:
        return self.features[start:stop]


def generation(n: int = 600, d: int = 24, seed: int = 0) -> Committed:
    rng = np.random.default_rng(seed)
    features = rng.standard_normal((n, d)) * rng.uniform(0.1, 9, (n, 1))
    usable = rng.random(n) > 0.1
    features[~usable] = np.nan
    return Committed(features, usable)


def exact(g: Committed, query: np.ndarray, k: int) -> list[int]:
    rows = np.flatnonzero(g.usable)
    unit = g.features[rows].astype(np.float64)
    cosines = (unit @ query) / np.linalg.norm(unit, axis=1) / np.linalg.norm(query)
    return rows[np.argsort(-cosines, kind="stable")[:k]].tolist()


@pytest.mark.parametrize("backend", ["faiss", "torch"])
def test_search_finds_dataset_rows_by_cosine(backend: Any) -> None:
    g = generation()
    index = FeatureIndex.build(g, backend=backend)
    assert index.backend == backend
    queries = np.random.default_rng(1).standard_normal((40, 24)) * 100
    scores, rows = index.search(queries, 25)
    assert scores.dtype == np.float32
    assert rows.dtype == np.int64
    for query, found in zip(queries, rows, strict=True):
        assert found.tolist() == exact(g, query, 25)
    assert (np.diff(scores, axis=1) <= 0).all()
    assert (np.abs(scores) <= 1 + 1e-6).all()
    assert index.search(queries[0], 1)[1].shape == (1, 1)


def test_both_backends_give_the_same_scores() -> None:
    g = generation()
    queries = np.random.default_rng(2).standard_normal((3, 24))
    one, two = (FeatureIndex.build(g, backend=b).search(queries, 50) for b in ("faiss", "torch"))
    np.testing.assert_allclose(one[0], two[0], atol=1e-6)
    np.testing.assert_array_equal(one[1], two[1])


@pytest.mark.parametrize("backend", ["faiss", "torch"])
@pytest.mark.parametrize("k", [1, 7, 30, 59, 60])
def test_ties_go_to_the_lower_row(backend: Any, k: int) -> None:
    rng = np.random.default_rng(3)
    features = np.tile(rng.standard_normal((3, 16)), (20, 1))
    index = FeatureIndex.build(Committed(features), backend=backend)
    rows = index.search(features[1], k)[1][0].tolist()
    assert rows[:20] == list(range(1, 60, 3))[:k]
    assert len(set(rows)) == k


def test_a_k_too_large_for_faiss_is_answered_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    g = generation()
    index = FeatureIndex.build(g, backend="faiss")
    monkeypatch.setattr(index_module, "FAISS_MAX_K", 10)
    query = np.random.default_rng(4).standard_normal(24)
    count = int(g.usable.sum())
    assert index.search(query, count)[1][0].tolist() == exact(g, query, count)


def test_a_large_generation_is_kept_in_float16(monkeypatch: pytest.MonkeyPatch) -> None:
    g = generation()
    queries = np.random.default_rng(5).standard_normal((5, 24))
    expected = FeatureIndex.build(g).search(queries, 1)
    monkeypatch.setattr(index_module, "FLAT_LIMIT_BYTES", 1000)
    scores, rows = FeatureIndex.build(g).search(queries, 1)
    np.testing.assert_allclose(scores, expected[0], atol=1e-3)
    assert g.usable[rows].all()


@pytest.mark.parametrize("k", [0, -1, 2.5, float("nan"), True])
def test_k_that_is_no_count_is_refused(k: Any) -> None:
    with pytest.raises(BadInput, match="asked"):
        FeatureIndex.build(generation()).search(np.ones(24), k)


def test_more_than_usable_is_refused() -> None:
    g = generation()
    with pytest.raises(BadInput, match=rf"asked 600, {g.usable.sum()} usable"):
        FeatureIndex.build(g).search(np.ones(24), 600)


@pytest.mark.parametrize("query", [np.zeros(24), np.full(24, np.nan), np.ones(23), np.inf])
def test_queries_without_a_direction_are_refused(query: Any) -> None:
    with pytest.raises(BadInput, match=r"query|queries"):
        FeatureIndex.build(generation()).search(query, 1)


def test_what_cannot_be_indexed_is_refused() -> None:
    with pytest.raises(BadInput, match="no usable row"):
        FeatureIndex.build(Committed(np.ones((3, 2)), np.zeros(3, dtype=bool)))
    uncommitted = generation()
    uncommitted.commit_sha = None
    with pytest.raises(BadInput, match="not committed"):
        FeatureIndex.build(uncommitted)
    with pytest.raises(BadInput, match="row 1 is marked usable"):
        FeatureIndex.build(Committed(np.array([[1.0], [0.0]])))


def test_a_commit_sha_cannot_lead_out_of_the_cache(tmp_path: Path) -> None:
    hostile = generation()
    hostile.commit_sha = "../../elsewhere"
    with pytest.raises(BadInput, match="hex"):
        FeatureIndex.build(hostile, tmp_path)


def count_builds(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    built: list[int] = []
    fill = index_module._fill

    def counted(*arguments: Any) -> Any:
        built.append(1)
        return fill(*arguments)

    monkeypatch.setattr(index_module, "_fill", counted)
    return built


def test_a_sound_index_is_reused_and_never_touched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = count_builds(monkeypatch)
    g = generation()
    expected = FeatureIndex.build(g, tmp_path).search(np.ones(24), 5)
    before = {p.name: (p.read_bytes(), p.stat().st_ino) for p in (tmp_path / SHA).iterdir()}
    again = FeatureIndex.build(g, tmp_path)
    assert built == [1]
    np.testing.assert_array_equal(again.search(np.ones(24), 5), expected)
    after = {p.name: (p.read_bytes(), p.stat().st_ino) for p in (tmp_path / SHA).iterdir()}
    assert before == after
    assert sorted(before) == ["faiss.bin", "index.json"]
    assert [p.name for p in tmp_path.iterdir()] == [SHA]
    manifest = json.loads(before["index.json"][0])
    assert manifest["commit_sha"] == SHA
    assert manifest["generation"] == "train/16"
    assert (manifest["rows"], manifest["dim"]) == (600, 24)
    assert manifest["sha256"] == sha256_file(tmp_path / SHA / "faiss.bin", fresh=True)


def flip(place: Path) -> None:
    content = bytearray((place / "faiss.bin").read_bytes())
    content[len(content) // 2] ^= 1
    (place / "faiss.bin").write_bytes(content)


def truncate(place: Path) -> None:
    content = (place / "faiss.bin").read_bytes()
    (place / "faiss.bin").write_bytes(content[:-1])


def edit(key: str, value: Any) -> Callable[[Path], None]:
    def change(place: Path) -> None:
        manifest = json.loads((place / "index.json").read_text())
        (place / "index.json").write_text(json.dumps(manifest | {key: value}))

    return change


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (flip, "sha256"),
        (truncate, "sha256"),
        (lambda place: (place / "faiss.bin").unlink(), "No such file"),
        (lambda place: (place / "index.json").unlink(), "No such file"),
        (lambda place: (place / "index.json").write_text("{"), "Expecting"),
        (lambda place: (place / "index.json").write_bytes(b"\x80\x81"), "decode"),
        (lambda place: (place / "index.json").write_text("[]"), "no JSON object"),
        (edit("commit_sha", "cd" * 32), "another commit_sha"),
        (edit("format", 0), "another format"),
        (edit("faiss_version", "1.0"), "another faiss_version"),
        (edit("rows", 599), "another rows"),
    ],
)
def test_fault_23_an_unsound_index_is_rebuilt_with_a_warning_and_never_read(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    damage: Callable[[Path], None],
    reason: str,
) -> None:
    g = generation()
    expected = FeatureIndex.build(g, tmp_path).search(np.ones(24), 5)
    damage(tmp_path / SHA)
    built = count_builds(monkeypatch)
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(faiss, "read_index", lambda path: pytest.fail("read an unchecked index"))
        found = FeatureIndex.build(g, tmp_path).search(np.ones(24), 5)
    np.testing.assert_array_equal(found, expected)
    assert reason in caplog.text
    assert "building it again" in caplog.text
    FeatureIndex.build(g, tmp_path)
    assert built == [1]
    assert [p.name for p in tmp_path.iterdir()] == [SHA]


def resealed(place: Path, content: bytes) -> None:
    """Put another index there, with an index.json that fits it."""
    (place / "faiss.bin").write_bytes(content)
    edit("sha256", sha256_file(place / "faiss.bin", fresh=True))(place)


def other_index(kind: str, g: Committed) -> bytes:
    """An index that FAISS reads without complaint, and that is not the generation's."""
    rows = np.flatnonzero(g.usable).astype(np.int64)
    unit = g.features[rows] / np.linalg.norm(g.features[rows], axis=1, keepdims=True)
    flat = faiss.IndexFlatL2(24) if kind == "metric" else faiss.IndexFlatIP(24)
    if kind == "d":
        flat, unit = faiss.IndexFlatIP(12), unit[:, :12]
    if kind == "lengths":
        unit = unit * 3
    if kind == "row numbers":
        rows = rows[::-1].copy()
    index = faiss.IndexIDMap(flat)
    kept = len(rows) - (kind == "rows")
    index.add_with_ids(np.ascontiguousarray(unit[:kept]), rows[:kept])
    content = bytes(faiss.serialize_index(index))
    return content + b"\0" * 9 if kind == "longer" else content


@pytest.mark.parametrize(
    ("kind", "reason"),
    [("d", "bytes, not"), ("rows", "bytes, not"), ("longer", "bytes, not"),
     ("metric", "another header"), ("row numbers", "other row numbers"),
     ("lengths", "not of length 1")],
)  # fmt: skip
def test_another_index_sealed_anew_is_not_searched(
    kind: str,
    reason: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    g = generation()
    expected = FeatureIndex.build(g, tmp_path).search(np.ones(24), 5)
    resealed(tmp_path / SHA, other_index(kind, g))
    built = count_builds(monkeypatch)
    found = FeatureIndex.build(g, tmp_path).search(np.ones(24), 5)
    np.testing.assert_array_equal(found, expected)
    assert built == [1]
    assert reason in caplog.text


@pytest.mark.parametrize("large", [False, True])
def test_mutations_of_an_index_sealed_anew_never_name_a_row_outside_the_set(
    large: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Single bytes of header, codes and row numbers, 120 of them.

    FAISS would allocate what a mutated header asks for: it must not see one.
    """
    if large:
        monkeypatch.setattr(index_module, "FLAT_LIMIT_BYTES", 1000)
    g = generation(n=40)
    FeatureIndex.build(g, tmp_path)
    whole = (tmp_path / SHA / "faiss.bin").read_bytes()
    draw = np.random.default_rng(0)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    places = [*range(0, 90, 2), *draw.integers(0, len(whole), 75).tolist()]
    for at in places:
        mutated = bytearray(whole)
        mutated[at] ^= int(draw.integers(1, 256))
        resealed(tmp_path / SHA, bytes(mutated))
        scores, rows = FeatureIndex.build(g, tmp_path).search(draw.standard_normal((3, 24)), 9)
        assert g.usable[rows].all(), at
        assert (np.abs(scores) < 1.05).all(), at
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 200 << 10, "in KiB"


def test_where_nothing_can_be_written_the_index_lives_in_memory(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "index").write_text("a file where the folder should be")
    rows = FeatureIndex.build(generation(), tmp_path / "index").search(np.ones(24), 5)[1]
    assert rows.shape == (1, 5)
    assert "memory only" in caplog.text


def test_a_full_disk_leaves_no_half_index(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(index: Any, path: str) -> None:
        Path(path).write_bytes(b"half")
        raise RuntimeError("write error: No space left on device")

    monkeypatch.setattr(faiss, "write_index", full)
    assert FeatureIndex.build(generation(), tmp_path).backend == "faiss"
    assert "No space left" in caplog.text
    assert list(tmp_path.iterdir()) == []


def test_without_faiss_searches_are_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr(index_module.importlib, "import_module", missing)
    g = generation()
    index = FeatureIndex.build(g)
    assert index.backend == "torch"
    assert index.search(np.ones(24), 9)[1][0].tolist() == exact(g, np.ones(24), 9)
    with pytest.raises(BadInput, match="not installed"):
        FeatureIndex.build(g, backend="faiss")


def test_faiss_may_be_imported_before_torch() -> None:
    """The other order is the one of this test process."""
    script = (
        "import faiss, torch\nimport numpy as np\n"
        "i = faiss.IndexFlatIP(8); i.add(np.eye(8, dtype=np.float32))\n"
        "row = int(i.search(torch.eye(8)[3:4].numpy(), 1)[1][0, 0])\n"
        "assert row == 3 and float((torch.ones(64, 64) @ torch.ones(64, 64))[0, 0]) == 64\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)
