"""Embeddings: pooling, export into a space of the store, resumption, reading, neighbours."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from gradstore.errors import BadInput
from gradstore.export.embeddings import compute_embedding_unit
from gradstore.export.pooling import POOLINGS, Embed, HiddenStates, Pooling, pool
from gradstore.export.units import Batches
from gradstore.format.layout import RowStatus
from gradstore.format.names import GenerationName
from gradstore.format.plans import UnitRange
from gradstore.format.records import RowSet, embedding_record, row_hash
from gradstore.similarity.index import FeatureIndex
from gradstore.similarity.rows import UsableRows, read_unit_rows
from gradstore.storage.local import StoreFiles
from gradstore.store.filling import UnitSink, fill
from gradstore.store.reader import Store, open_store
from gradstore.store.verify import verify_store

N, DIM, SPACE = 44, 32, "tiny"
MASKED, BROKEN = 3, 20
Rows = list[dict[str, list[int]]]


@pytest.fixture(scope="module")
def model(llama: Any) -> Any:
    return llama.model(broken=True).train()


@pytest.fixture(scope="module")
def rows(llama: Any) -> Rows:
    """Row 20 holds a token whose embedding is infinite."""
    found: Rows = [dict(row) for row in llama.rows(N)]
    found[BROKEN]["input_ids"] = [llama.broken_token, *found[BROKEN]["input_ids"][1:]]
    return found


class Task:
    """What an export of embeddings needs; row 3 has no usable token."""

    def __init__(self, llama: Any, model: Any, rows: Rows) -> None:
        self.llama, self.model, self.rows = llama, model, rows
        self.embed = HiddenStates(model)
        self.hashes = RowSet.from_hashes([row_hash(r["input_ids"], r["labels"]) for r in rows])
        self.lengths = [len(row["input_ids"]) for row in rows]

    def batches(self, **changes: Any) -> Batches:
        return Batches(self.rows, self.collate, self.lengths, **{"token_budget": 60, **changes})

    def collate(self, rows: Rows) -> dict[str, torch.Tensor]:
        batch: dict[str, torch.Tensor] = self.llama.collate(rows)
        for i, row in enumerate(rows):
            if row is self.rows[MASKED]:
                batch["attention_mask"][i] = 0
        return batch

    def begin(self, space: Any, **changes: Any) -> Any:
        options = {"space": SPACE, "run_id": "run", "model_hash": "ff", **changes}
        name = GenerationName("train", 5)
        record = embedding_record(name, options={"pooling": "mean"}, **options)
        return space.begin(record, self.hashes, dim=DIM, unit_rows=8)

    def run(
        self,
        kit: Any,
        path: Path,
        embed: Embed | None = None,
        files: StoreFiles | None = None,
        max_bad_fraction: float = 0.05,
        **batches: Any,
    ) -> Any:
        """Both spaces at once, as a training run has them."""
        with kit.writer(path, files) as writer:
            generation = self.begin(writer.with_space(SPACE, {"model": "ff"}))
            compute = partial(
                compute_embedding_unit, embed or self.embed, self.batches(**batches), dim=DIM
            )
            summary = fill(generation, compute, max_bad_fraction=max_bad_fraction)
            generation.commit()
        return summary


@pytest.fixture(scope="module")
def task(llama: Any, model: Any, rows: Rows) -> Task:
    return Task(llama, model, rows)


@pytest.fixture
def store(kit: Any, task: Task, fast_path: Path) -> Store:
    task.run(kit, fast_path / "s")
    return open_store(fast_path / "s")


def expected_rows(task: Task) -> np.ndarray:
    """(n, d) float64 unit rows, one unpadded row at a time, written out."""
    found = []
    task.model.eval()
    for row in task.rows:
        with torch.no_grad():
            states = task.model(
                input_ids=torch.tensor([row["input_ids"]]), output_hidden_states=True
            ).hidden_states[-1][0]
        mean = states.double().mean(dim=0)
        found.append((mean / mean.norm()).numpy())
    task.model.train()
    return np.stack(found)


# ---- pooling ---------------------------------------------------------------------------------


def test_poolings_are_the_written_means(llama: Any) -> None:
    hidden = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]])
    ones = torch.ones(1, 3, dtype=torch.long)
    found = {how: pool(hidden, ones, how)[0].tolist() for how in POOLINGS}
    assert found["mean"] == pytest.approx([0.5**0.5] * 2)
    assert found["first_token"] == [1.0, 0.0]
    assert found["last_token"] == pytest.approx([0.5**0.5] * 2)
    assert found["position"] == pytest.approx([0.624695, 0.780869], abs=1e-6)


@settings(max_examples=30, deadline=None)
@given(
    left=st.integers(0, 4),
    right=st.integers(0, 4),
    t=st.integers(1, 5),
    how=st.sampled_from(POOLINGS),
)
def test_padding_on_either_side_changes_no_embedding(
    left: int, right: int, t: int, how: Pooling
) -> None:
    generator = torch.Generator().manual_seed(t)
    states = torch.randn(1, t, 6, generator=generator)
    bare = pool(states, torch.ones(1, t), how)
    padded = torch.full((1, left + t + right, 6), torch.inf)
    padded[:, left : left + t] = states
    mask = torch.zeros(1, left + t + right, dtype=torch.bool)
    mask[:, left : left + t] = True
    torch.testing.assert_close(pool(padded, mask, how), bare, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(bare.norm(dim=1), torch.ones(1))
    long, short = (
        pool(states, torch.ones(1, t), how, unit=False),
        pool(padded, mask, how, unit=False),
    )
    torch.testing.assert_close(short, long, rtol=1e-6, atol=1e-6)


def test_a_row_without_tokens_and_a_row_with_nan_leave_the_others_alone() -> None:
    hidden = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(1))
    hidden[1, 2] = torch.nan
    mask = torch.ones(3, 4)
    mask[0] = 0
    found = pool(hidden.half(), mask)
    assert found.dtype == torch.float32
    assert (found[0] == 0).all()
    assert found[1].isnan().all()
    assert found[2].norm().item() == pytest.approx(1)


def test_what_pooling_cannot_do_is_refused(model: Any, llama: Any, rows: Rows) -> None:
    with pytest.raises(BadInput, match="pooling is 'max'; choose mean, first_token, last"):
        HiddenStates(model, pooling="max")  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="do not fit"):
        pool(torch.zeros(2, 3, 4), torch.zeros(2, 4))
    with pytest.raises(BadInput, match="layer is 7; the model has hidden states -3 to 2"):
        HiddenStates(model, layer=7)(llama.collate(rows[:2]))


class Plain(torch.nn.Module):
    """No transformers model: two layers with dropout, as `HiddenStates` wants it."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(61, 5)
        self.dropout = torch.nn.Dropout(0.5)

    def forward(self, *, input_ids: torch.Tensor, output_hidden_states: bool, **_: Any) -> Any:
        assert output_hidden_states
        first = self.table(input_ids)
        return SimpleNamespace(hidden_states=(first, self.dropout(first)))


def test_any_module_is_embedded_without_dropout_and_comes_back_as_it_was(
    llama: Any, rows: Rows
) -> None:
    model, batch = Plain().train(), llama.collate(rows[:4])
    state = torch.get_rng_state()
    found = HiddenStates(model)(batch)
    torch.testing.assert_close(found, HiddenStates(model, layer=0)(batch))
    assert not found.requires_grad
    assert model.training
    assert model.dropout.training
    assert model.table.weight.requires_grad
    assert torch.equal(torch.get_rng_state(), state)


# ---- into a store ----------------------------------------------------------------------------


def test_a_generation_holds_each_rows_unit_embedding_and_status(task: Task, store: Store) -> None:
    generation = store.generation("tiny/train/5")
    status = np.full(N, RowStatus.OK)
    status[[MASKED, BROKEN]] = RowStatus.MASKED, RowStatus.NON_FINITE
    np.testing.assert_array_equal(generation.status, status)
    ok = status == RowStatus.OK
    found = generation.read(0, N)
    assert np.isnan(found[~ok]).all()
    error = np.linalg.norm(found[ok] - expected_rows(task)[ok], axis=1)
    assert error.max() <= 2**-10  # float16
    lengths = np.array(task.lengths)
    np.testing.assert_array_equal(generation.tokens[ok], lengths[ok])
    np.testing.assert_allclose(generation.norm[ok], 1, rtol=1e-6)
    assert generation.projection == {}
    assert generation.record.feature == "embedding"
    assert generation.provenance == {"model": "ff"}
    assert verify_store(store.path).ok


def test_any_zarr_reader_reads_the_embeddings(store: Store) -> None:
    generation = store.generation("tiny/train/5")
    group = zarr.open_group(store.path / "generations/tiny/train/5", mode="r")
    values: Any = group["features"][:]  # type: ignore[index]
    scale: Any = group["scale"][:]  # type: ignore[index]
    assert values.shape == (N, DIM)
    np.testing.assert_array_equal(values.astype(np.float32) * scale[:, None], generation.read(0, N))


@pytest.mark.parametrize("chunk_rows", [1, 7, 4096])
def test_unit_rows_are_read_in_chunks_with_their_status(
    task: Task, store: Store, chunk_rows: int
) -> None:
    generation = store.generation("tiny/train/5")
    chunks = list(read_unit_rows(generation, chunk_rows))
    assert [c.start for c in chunks] == list(range(0, N, chunk_rows))
    assert [c.stop for c in chunks] == [*(c.start for c in chunks[1:]), N]
    rows = np.concatenate([c.rows for c in chunks])
    status = np.concatenate([c.status for c in chunks])
    assert rows.dtype == np.float32
    np.testing.assert_array_equal(status, generation.status)
    np.testing.assert_allclose(np.linalg.norm(rows[generation.usable], axis=1), 1, rtol=1e-6)
    assert np.isnan(rows[~generation.usable]).all()
    with pytest.raises(BadInput, match="chunk_rows is 0"):
        next(read_unit_rows(generation, 0))


def test_usable_rows_are_read_by_slices_and_positions(store: Store) -> None:
    generation = store.generation(f"{SPACE}/train/5")
    (whole,) = read_unit_rows(generation, chunk_rows=N)
    usable = np.flatnonzero(whole.status == RowStatus.OK)
    rows = UsableRows(generation)
    assert rows.shape == (len(rows), rows[:].shape[1]) == (N - 2, DIM)
    assert rows.rows.tolist() == usable.tolist()
    np.testing.assert_array_equal(rows[:], whole.rows[usable])
    np.testing.assert_array_equal(rows[5:30], whole.rows[usable[5:30]])
    mixed = np.array([40, 0, 17, 17, 3])
    np.testing.assert_array_equal(rows[mixed], whole.rows[usable[mixed]])


def test_a_batch_holds_no_more_rows_than_said(task: Task, kit: Any, fast_path: Path) -> None:
    sizes: list[int] = []

    def embed(batch: Any) -> Any:
        sizes.append(len(batch["input_ids"]))
        return task.embed(batch)

    unit = UnitRange(0, 0, 20)
    few, all_at_once = (
        compute_embedding_unit(embed, task.batches(token_budget=10_000, max_rows=n), unit, dim=DIM)
        for n in (3, 1024)
    )
    assert sizes == [2] + [3] * 6 + [20]
    np.testing.assert_allclose(few.features, all_at_once.features, atol=1e-5)


@pytest.mark.parametrize("backend", ["faiss", "torch"])
def test_an_index_of_embeddings_finds_the_exact_neighbours(store: Store, backend: Any) -> None:
    generation = store.generation("tiny/train/5")
    (chunk,) = read_unit_rows(generation)
    usable = np.flatnonzero(generation.usable)
    cosines = chunk.rows[usable].astype(np.float64) @ chunk.rows[usable].T.astype(np.float64)
    index = FeatureIndex.build(generation, store.path / "index", backend=backend)
    scores, rows = index.search(chunk.rows[usable], 4)
    np.testing.assert_allclose(scores, -np.sort(-cosines, axis=1)[:, :4], atol=1e-6)
    np.testing.assert_array_equal(rows[:, 0], usable)


def test_vectors_of_any_length_and_type_are_stored_as_unit_rows(
    kit: Any, task: Task, fast_path: Path
) -> None:
    def embed(batch: Any) -> torch.Tensor:
        return HiddenStates(task.model)(batch).double() * 1e-30 * len(batch["input_ids"])

    task.run(kit, fast_path / "a")
    task.run(kit, fast_path / "b", embed)
    one, other = (open_store(fast_path / s).generation("tiny/train/5") for s in "ab")
    np.testing.assert_array_equal(one.usable, other.usable)
    np.testing.assert_allclose(one.read(0, N), other.read(0, N), atol=2**-10)


def test_embeddings_of_another_shape_are_refused(kit: Any, task: Task, fast_path: Path) -> None:
    with kit.writer(fast_path / "s") as writer:
        generation = task.begin(writer.with_space(SPACE, {}))
        with pytest.raises(BadInput, match=r"embed gives \(\d+, 31\) for \d+ rows"):
            fill(
                generation,
                partial(
                    compute_embedding_unit,
                    lambda batch: task.embed(batch)[:, 1:],
                    task.batches(),
                    dim=DIM,
                ),
            )


def test_too_many_rows_without_a_finite_embedding_stop_the_export(
    kit: Any, task: Task, fast_path: Path
) -> None:
    with pytest.raises(BadInput, match=r"1 of 44 rows have a non-finite embedding.*\[20\]"):
        task.run(kit, fast_path / "s", max_bad_fraction=0.02)
    assert open_store(fast_path / "s").generations() == []


def test_rows_longer_than_the_model_takes_are_too_long(
    kit: Any, task: Task, fast_path: Path
) -> None:
    lengths = np.array(task.lengths)
    summary = task.run(kit, fast_path / "s", longest=18)
    status = open_store(fast_path / "s").generation("tiny/train/5").status
    np.testing.assert_array_equal(status == RowStatus.TOO_LONG, lengths > 18)
    assert summary.tokens == lengths[lengths <= 18].sum()


def test_units_shared_by_ranks_are_the_bytes_of_a_single_process(
    kit: Any, task: Task, store: Store, fast_path: Path
) -> None:
    with kit.writer(fast_path / "many") as writer:
        generation = task.begin(writer.with_space(SPACE, {"model": "ff"}))
        sink = UnitSink(generation, max_bad_fraction=1.0)
        for unit in reversed(list(generation.pending)):
            sink.write(compute_embedding_unit(task.embed, task.batches(), unit, dim=DIM))
        generation.commit()
    assert chunks(fast_path / "many") == chunks(store.path)


class Killed(BaseException):
    """Not an Exception: nothing may catch a kill."""


class KillAt:
    """Dies at the k-th operation on disk, and does nothing more."""

    def __init__(self, k: int) -> None:
        self.left = k

    def __call__(self, operation: str, path: Path) -> None:
        self.left -= 1
        if self.left < 0:
            raise Killed(f"{operation} {path}")


def chunks(path: Path) -> dict[str, bytes]:
    base = path / "generations/tiny/train/5"
    return {str(f.relative_to(base)): f.read_bytes() for f in base.rglob("*") if f.is_file()}


def test_a_killed_export_goes_on_with_its_pending_units_to_the_same_bytes(
    kit: Any, task: Task, store: Store, fast_path: Path
) -> None:
    whole, path, k, resumed = chunks(store.path), fast_path / "cut", 60, set()
    while True:
        shutil.rmtree(path, ignore_errors=True)
        try:
            task.run(kit, path, files=StoreFiles(path, KillAt(k)))
        except Killed:
            finished = len(list(path.glob("generations/tiny/train/5/units/*.json")))
        else:
            break
        summary = task.run(kit, path)
        assert summary.rows == N - min(N, 8 * finished), k  # nothing finished was done again
        resumed.add(summary.rows)
        assert chunks(path) == whole, k
        k += 37
    assert len(resumed) >= 4  # the kills fell in different units
    assert verify_store(path).ok
