"""Promises of lists of near rows: measured recall, exact cosines, never a damaged or other file."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from gradstore.errors import BadInput
from gradstore.scoring.comparable import CheckpointFeatures
from gradstore.scoring.query import query_influence
from gradstore.similarity import inverted as inverted_module
from gradstore.similarity import list_training
from gradstore.similarity.approximate import query_lists
from gradstore.similarity.index import FeatureIndex
from gradstore.similarity.inverted import InvertedLists, lists_for
from gradstore.similarity.recalls import WIDER, Curve, Measured, width
from gradstore.storage.hashing import sha256_file

if TYPE_CHECKING:
    from conftest import StoreKit

faiss = pytest.importorskip("faiss")
SHA, D = "ab" * 32, 24


class Committed:
    """A committed generation in memory: rows around 30 centres, a tenth of them not usable."""

    name = "train/16"

    def __init__(self, n: int = 2000, seed: int = 0, sha: str = SHA) -> None:
        draw = np.random.default_rng(seed)
        near = draw.standard_normal((30, D))[draw.integers(0, 30, n)]
        self.features = (near + 0.5 * draw.standard_normal((n, D))).astype(np.float32)
        self.usable = draw.random(n) > 0.1
        self.features[~self.usable] = np.nan
        self.rows, self.dim, self.commit_sha = n, D, sha

    def read(self, start: int, stop: int) -> np.ndarray:
        return self.features[start:stop]


@pytest.fixture(scope="module")
def rows() -> Committed:
    return Committed()


@pytest.fixture(scope="module")
def lists(rows: Committed) -> InvertedLists:
    made = InvertedLists.build(rows)
    assert made is not None
    return made


def exact(rows: Committed, query: np.ndarray, without: int = -1) -> np.ndarray:
    """Usable rows by falling cosine, without one."""
    usable = np.flatnonzero(rows.usable)
    usable = usable[usable != without]
    unit = rows.features[usable].astype(np.float64)
    cosines = unit @ query / np.linalg.norm(unit, axis=1)
    return np.asarray(usable[np.argsort(-cosines, kind="stable")])


def pair(rows: Committed) -> list[CheckpointFeatures]:
    """With 40 target rows around other centres than the training rows lie around."""
    return [CheckpointFeatures(rows, Committed(40, seed=1, sha="ef" * 32))]


def held_out_rows(rows: Committed) -> np.ndarray:
    usable = np.flatnonzero(rows.usable)
    return np.random.default_rng(list_training.SEED).permutation(usable)[: len(usable) // 10]


def with_curve(rows: Committed, lists: InvertedLists, *points: Measured) -> InvertedLists:
    """The same lists, as if this had been measured."""
    return InvertedLists(faiss, lists._index, rows,
                         {key: Curve(20, list(points)) for key in ("", "ef" * 32)})  # fmt: skip


def counted_recall(
    rows: Committed, lists: InvertedLists, queries: np.ndarray, own: list[int], nprobe: int, k: int
) -> float:
    """Row by row: the smaller share, of the nearest rows and of the farthest."""
    sides = []
    for sign in (1, -1):
        shares = []
        for query, row in zip(sign * queries, own, strict=True):
            (found,) = lists.search(query[None], WIDER * k + 1, nprobe)
            kept = [each for each in found.tolist() if each != row][: WIDER * k]
            shares.append(len(set(exact(rows, query, row)[:k].tolist()) & set(kept)) / k)
        sides.append(float(np.mean(shares)))
    return min(sides)


def test_the_stated_recall_is_the_smaller_one_of_training_and_of_target_rows(
    rows: Committed, lists: InvertedLists
) -> None:
    targets = pair(rows)[0].targets[0]
    curve, held_out = lists.curve(targets), held_out_rows(rows)
    usable = np.flatnonzero(targets.usable)
    assert curve.rows == len(held_out) + len(usable)
    for measured in (curve.points[0], curve.points[3], curve.points[-1]):
        for k, recall in zip((10, 100), measured.recall, strict=True):
            counted = [
                counted_recall(rows, lists, queries, own, measured.nprobe, k)
                for queries, own in (
                    (rows.features[held_out], held_out.tolist()),
                    (targets.read(0, 40)[usable], [-1] * len(usable)),
                )
            ]
            assert recall == pytest.approx(min(counted), abs=2e-3)
            assert max(counted) > min(counted) or recall > 0.99


def test_more_lists_find_more_and_all_of_them_everything(
    rows: Committed, lists: InvertedLists
) -> None:
    assert lists.lists == lists_for(int(rows.usable.sum()))
    points = lists.curve(pair(rows)[0].targets[0]).points
    probes = [each.nprobe for each in points]
    assert probes == sorted(set(probes))
    assert probes[0] == 1
    assert min(points[0].recall) < 0.7  # or the measure says nothing
    assert min(points[-1].recall) >= 0.999
    assert probes[-1] <= lists.lists


def test_nprobe_is_the_smallest_that_reaches_the_recall() -> None:
    curve = Curve(200, [
        Measured(1, (0.5, 0.4)), Measured(2, (0.94, 0.96)), Measured(3, (0.96, 0.9)),
        Measured(4, (0.99, 0.95)),
    ])  # fmt: skip
    chosen = {(k, recall): width(curve, k, recall) for k, recall in
              ((1, 0.5), (10, 0.95), (11, 0.95), (100, 0.961), (10, 0.995))}  # fmt: skip
    nprobes = {asked: found and (found[0].nprobe, found[1]) for asked, found in chosen.items()}
    assert nprobes == {(1, 0.5): (1, 10), (10, 0.95): (3, 10), (11, 0.95): (2, 100),
                       (100, 0.961): None, (10, 0.995): None}  # fmt: skip
    with pytest.raises(BadInput, match="ask for at most 100"):
        width(curve, 101, 0.5)


def test_an_answer_reaches_the_recall_and_has_the_exact_cosines(
    rows: Committed, lists: InvertedLists
) -> None:
    pairs, shares = pair(rows), []
    targets = np.flatnonzero(pairs[0].targets[0].usable)
    for row in targets.tolist():
        near = query_lists(pairs, row, recall=0.9, lists=lists)
        true = query_influence(pairs, row)
        for mine, theirs in ((near.answer.helped, true.helped), (near.answer.hurt, true.hurt)):
            assert len(mine) == 10
            shares.append(len(np.intersect1d(mine, theirs)) / 10)
        looked = ~np.isnan(near.answer.values)
        assert near.answer.values[looked].tobytes() == true.values[looked].tobytes()
        assert (np.diff(near.answer.values[near.answer.helped]) <= 0).all()
        assert near.answer.skipped == true.skipped
        assert near.answer.usable.tolist() == true.usable.tolist()
    assert np.mean(shares) >= 0.9
    assert 0.9 <= near.recall < 1
    measured_on = len(held_out_rows(rows)) + len(targets)
    assert near.says == (
        f"recall {near.recall:.2f} of the best 10 at nprobe {near.nprobe} of {lists.lists} lists, "
        f"measured on {measured_on} rows"
    )


def test_equal_rows_are_named_from_the_lowest_on() -> None:
    rows = Committed()
    target = Committed(40, sha="ef" * 32)
    target.features[3] = np.eye(D)[0]
    target.usable[3] = True
    rows.features[np.flatnonzero(rows.usable)[50:65]] = 3 * np.eye(D, dtype=np.float32)[0]
    near = query_lists([CheckpointFeatures(rows, target)], 3)
    assert near.nprobe
    assert near.answer.helped.tolist() == np.flatnonzero(rows.usable)[50:60].tolist()


def test_lists_that_hold_too_few_rows_are_looked_through_further(lists: InvertedLists) -> None:
    found = lists.search(np.ones((1, D)), 500, 1)
    assert (found >= 0).all()
    assert len(set(found[0].tolist())) == 500


def test_too_few_rows_are_answered_exactly_and_so_it_says() -> None:
    few = Committed(700)
    assert InvertedLists.build(few) is None
    near, true = query_lists(pair(few), 3, top=5), query_influence(pair(few), 3, top=5)
    assert near.answer.helped.tolist() == true.helped.tolist()
    assert near.answer.hurt.tolist() == true.hurt.tolist()
    assert (near.recall, near.nprobe) == (1.0, 0)
    assert near.says == (
        f"exact: {few.usable.sum()} usable rows are too few for lists, which need 711"
    )


def test_a_recall_that_lists_do_not_reach_is_answered_exactly_and_so_it_says(
    rows: Committed, lists: InvertedLists
) -> None:
    short = with_curve(rows, lists, Measured(1, (0.5, 0.25)))
    near = query_lists(pair(rows), 3, lists=short)
    assert near.answer.helped.tolist() == query_influence(pair(rows), 3).helped.tolist()
    assert near.says == "exact: the lists find 0.250 of the best rows at most, asked 0.95"


@pytest.mark.parametrize("recall", [0, 1, 1.5, -0.1, float("nan"), True, "0.9"])
def test_a_recall_out_of_range_is_refused(rows: Committed, recall: Any) -> None:
    with pytest.raises(BadInput, match="above 0 and below 1"):
        query_lists(pair(rows), 0, recall=recall)


def test_what_lists_cannot_answer_is_refused(
    rows: Committed, kit: StoreKit, fast_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(BadInput, match="rows of one checkpoint, 2 are asked"):
        query_lists(pair(rows) * 2, 0)
    with pytest.raises(BadInput, match="not of arrays"):
        query_lists([CheckpointFeatures(np.eye(3), np.eye(3))], 0)
    with pytest.raises(BadInput, match="target row 40 requested"):
        query_lists(pair(rows), 40)
    with pytest.raises(BadInput, match="top is 0"):
        query_lists(pair(rows), 0, top=0)
    with pytest.raises(BadInput, match="not committed"):
        InvertedLists.build(Committed(sha=None))  # type: ignore[arg-type]
    kit.dtype = "1bit"
    bits = kit.build(fast_path / "s").generation("train/1")
    with pytest.raises(BadInput, match=r"32 times.*exact answer.*int8"):
        InvertedLists.build(bits)
    monkeypatch.setitem(__import__("sys").modules, "faiss", None)
    with pytest.raises(BadInput, match=r"cannot be imported .*dataflex-gradstore again .*keep one"):
        InvertedLists.build(rows)


def test_rows_beyond_the_limit_are_kept_in_float16(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = Committed(1500)
    pairs = pair(rows)
    monkeypatch.setattr(inverted_module, "FLAT_LIMIT_BYTES", 1000)
    lists = InvertedLists.build(rows)
    assert lists is not None
    assert type(lists._index).__name__ == "IndexIVFScalarQuantizer"
    near, true = query_lists(pairs, 3, lists=lists, recall=0.99), query_influence(pairs, 3)
    assert near.answer.values[near.answer.helped[0]] == true.values[true.helped[0]]


def count_builds(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    built: list[int] = []
    trained = inverted_module.trained

    def counted(*arguments: Any) -> Any:
        built.append(1)
        return trained(*arguments)

    monkeypatch.setattr(inverted_module, "trained", counted)
    return built


def test_sound_lists_are_reused_with_the_recall_recorded_beside_them(
    rows: Committed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = count_builds(monkeypatch)
    first = InvertedLists.build(rows, tmp_path)
    FeatureIndex.build(rows, tmp_path)  # lies beside it
    again = InvertedLists.build(rows, tmp_path)
    assert built == [1]
    assert first is not None
    assert again is not None
    assert again.curves == first.curves
    query = np.ones((1, D))
    assert again.search(query, 50, 3).tolist() == first.search(query, 50, 3).tolist()
    assert sorted(p.name for p in tmp_path.iterdir()) == [SHA, f"{SHA}.ivf"]
    manifest = json.loads((tmp_path / f"{SHA}.ivf/index.json").read_text())
    assert manifest["measured"][""]["points"][0]["nprobe"] == 1
    assert (manifest["generation"], manifest["kind"]) == ("train/16", "ivf-flat")


def test_a_target_set_is_measured_once_and_kept_beside_the_lists(
    rows: Committed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes, neighbours = [], inverted_module.neighbours
    monkeypatch.setattr(
        inverted_module, "neighbours", lambda *a: passes.append(1) or neighbours(*a)
    )
    first = query_lists(pair(rows), 3, cache_dir=tmp_path)
    assert passes == [1, 1]  # to fill the lists, and of the target set
    index = (tmp_path / f"{SHA}.ivf/faiss.bin").stat()
    again = query_lists(pair(rows), 4, cache_dir=tmp_path)
    assert again.says == first.says
    assert passes == [1, 1]
    other = [CheckpointFeatures(rows, Committed(50, seed=2, sha="12" * 32))]
    query_lists(other, 3, cache_dir=tmp_path)
    assert passes == [1, 1, 1]
    query_lists(pair(rows), 3, cache_dir=tmp_path)
    query_lists(other, 5, cache_dir=tmp_path)
    assert passes == [1, 1, 1]
    assert (tmp_path / f"{SHA}.ivf/faiss.bin").stat() == index


def test_lists_are_a_function_of_the_rows(rows: Committed, lists: InvertedLists) -> None:
    again = InvertedLists.build(rows)
    assert again is not None
    assert again.curves[""] == lists.curves[""]


def test_lists_of_another_commit_are_not_used(tmp_path: Path, rows: Committed) -> None:
    """A new commit of other rows, and an index put where its own would lie."""
    InvertedLists.build(rows, tmp_path)
    other = Committed(seed=5, sha="cd" * 32)
    fresh = InvertedLists.build(other)
    (tmp_path / f"{SHA}.ivf").rename(tmp_path / f"{other.commit_sha}.ivf")
    found = InvertedLists.build(other, tmp_path)
    assert found is not None
    assert fresh is not None
    assert found.curves == fresh.curves


def flip(place: Path) -> None:
    content = bytearray((place / "faiss.bin").read_bytes())
    content[len(content) // 2] ^= 1
    (place / "faiss.bin").write_bytes(content)


def edit(key: str, value: Any) -> Callable[[Path], None]:
    def change(place: Path) -> None:
        manifest = json.loads((place / "index.json").read_text())
        (place / "index.json").write_text(json.dumps(manifest | {key: value}))

    return change


def other_rows(place: Path) -> None:
    """Lists of other rows, whose index.json was made to fit them."""
    index = faiss.read_index(str(place / "faiss.bin"))
    index.remove_ids(np.arange(5))
    faiss.write_index(index, str(place / "faiss.bin"))
    edit("sha256", sha256_file(place / "faiss.bin", fresh=True))(place)


def without_recall(place: Path) -> None:
    manifest = json.loads((place / "index.json").read_text())
    del manifest["measured"]
    (place / "index.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (flip, "sha256 of faiss.bin"),
        (lambda place: (place / "faiss.bin").write_bytes(b""), "sha256 of faiss.bin"),
        (lambda place: (place / "index.json").unlink(), "No such file"),
        (edit("commit_sha", "cd" * 32), "another commit_sha"),
        (edit("faiss_version", "1.0"), "another faiss_version"),
        (edit("lists", 7), "another lists"),
        (edit("measured", {"": {"rows": 200, "points": [{"nprobe": 1, "recall": [1.0, 1.0]}]}}),
         "is not what was recorded"),
        (without_recall, "says no recall"),
        (other_rows, "other row numbers"),
    ],
)  # fmt: skip
def test_fault_23_unsound_lists_are_rebuilt_with_a_warning_and_never_searched(
    rows: Committed,
    lists: InvertedLists,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    damage: Callable[[Path], None],
    reason: str,
) -> None:
    InvertedLists.build(rows, tmp_path)
    damage(tmp_path / f"{SHA}.ivf")
    built = count_builds(monkeypatch)
    with caplog.at_level(logging.WARNING):
        found = InvertedLists.build(rows, tmp_path)
    assert found is not None
    assert found.curves == {"": lists.curves[""]}
    assert reason in caplog.text
    assert "building it again" in caplog.text
    InvertedLists.build(rows, tmp_path)
    assert built == [1]


class Gpu:
    """What FAISS for GPUs adds to FAISS, as far as lists use it."""

    def __init__(self, count: int, full: bool = False) -> None:
        self.count, self.full, self.moved, self.searched = count, full, 0, 0

    def get_num_gpus(self) -> int:
        return self.count

    def index_cpu_to_gpu(self, resources: object, device: int, index: Any) -> Any:
        assert (resources, device) == ("resources", 0)
        if self.full:
            raise RuntimeError("out of device memory")
        self.moved += 1
        gpu = self

        class GpuIndexIVFFlat:
            nlist = index.nlist

            def search(self, queries: np.ndarray, k: int, params: Any) -> Any:
                gpu.searched += 1
                return index.search(queries, k, params=params)

        return GpuIndexIVFFlat()

    def install(self, monkeypatch: pytest.MonkeyPatch) -> Gpu:
        monkeypatch.setattr(faiss, "get_num_gpus", self.get_num_gpus, raising=False)
        monkeypatch.setattr(faiss, "index_cpu_to_gpu", self.index_cpu_to_gpu, raising=False)
        monkeypatch.setattr(faiss, "StandardGpuResources", lambda: "resources", raising=False)
        return self


def test_a_gpu_searches_where_faiss_has_one(
    rows: Committed, lists: InvertedLists, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Made and opened; what is kept on disk is the CPU's, which any machine can read."""
    gpu = Gpu(1).install(monkeypatch)
    for _ in range(2):
        found = InvertedLists.build(rows, tmp_path)
        assert found is not None
        assert found.on_gpu
        assert found.curves == {"": lists.curves[""]}
    assert gpu.moved == 2
    before = gpu.searched
    near = query_lists(pair(rows), 3, lists=found)
    assert gpu.searched > before
    assert near.answer.helped.tolist() == (
        query_lists(pair(rows), 3, lists=lists).answer.helped.tolist()
    )
    monkeypatch.undo()
    on_cpu = InvertedLists.build(rows, tmp_path)
    assert on_cpu is not None
    assert not on_cpu.on_gpu


def test_lists_that_a_gpu_cannot_take_stay_on_the_cpu(
    rows: Committed, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    Gpu(1, full=True).install(monkeypatch)
    found = InvertedLists.build(rows)
    assert found is not None
    assert not found.on_gpu
    assert "out of device memory" in caplog.text
