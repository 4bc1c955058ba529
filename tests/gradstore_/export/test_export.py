"""Model and rows to projected features, end to end: values, statuses, resumption, planning."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from functools import partial
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gradkernels import ProjectionSpec, project_reference
from gradkernels.reference import matrix_rows, scale
from hypothesis import given
from hypothesis import strategies as st

from gradstore.capture.per_sample import GradientCapture, batch_losses
from gradstore.capture.slots import ParameterSlot
from gradstore.errors import BadInput
from gradstore.export import joined, projected
from gradstore.export.features import FeatureMap, FeatureSpec, Recipe
from gradstore.export.moments import AdamMoments
from gradstore.export.projected import compute_unit, export_features
from gradstore.export.units import BATCH_SHARE, Batches, plan_batches
from gradstore.format.layout import RowStatus, generation_path
from gradstore.format.plans import UnitRange
from gradstore.format.records import RowSet, row_hash
from gradstore.store.filling import fill
from gradstore.store.reader import open_store
from gradstore.store.verify import verify_store

N, DIM = 21, 96
SPEC = FeatureSpec("adam_marginal")
Rows = list[dict[str, list[int]]]


@pytest.fixture(scope="module")
def model(llama: Any) -> Any:
    return llama.model()


@pytest.fixture(scope="module")
def rows(llama: Any) -> Rows:
    found: Rows = llama.rows(N)
    return found


def projection(model: Any, method: str = "sjlt", d: int = DIM) -> ProjectionSpec:
    p = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return ProjectionSpec(method, p=p, d=d, seed=11)  # type: ignore[arg-type]


def exported(llama: Any, model: Any, rows: Rows, size: int, **options: Any) -> np.ndarray:
    """(n, d) features in the order of the rows."""
    options = {"features": SPEC, "projection": projection(model), **options}
    moments = llama.moments(model)
    parts = list(export_features(model, llama.batches(rows, size), moments=moments, **options))
    positions = np.concatenate([part.rows for part in parts])
    assert sorted(positions.tolist()) == list(range(len(rows)))
    out = np.empty((len(rows), options["projection"].d), dtype=np.float32)
    out[positions] = np.concatenate([part.features for part in parts])
    return out


def whole_features(llama: Any, model: Any, rows: Rows, size: int) -> torch.Tensor:
    """(n, p) float32 features of the same batches, before any projection."""
    with GradientCapture(model) as capture:
        feature_map = FeatureMap(SPEC, capture.slots, llama.moments(model))
        out = torch.empty(len(rows), capture.p)
        for positions, batch in llama.batches(rows, size):

            def sink(slot: ParameterSlot, block: torch.Tensor, at: Any = positions) -> None:
                columns = slice(slot.start, slot.start + slot.numel)
                out[torch.from_numpy(at), columns] = feature_map.apply_(slot, block)

            capture.capture(batch, sink)
    return out


def row_errors(found: Any, expected: Any) -> np.ndarray:
    """(n,) relative errors."""
    difference = np.linalg.norm(np.float64(found) - np.float64(expected), axis=1)
    return np.asarray(difference / np.linalg.norm(np.float64(expected), axis=1))


# ---- values ----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["sjlt", "rademacher"])
def test_exported_features_are_the_oracles_projection_of_the_exact_ones(
    llama: Any, model: Any, rows: Rows, method: str
) -> None:
    spec = projection(model, method)
    features = whole_features(llama, model, rows, 5)
    oracle = project_reference(features, spec)
    matrix = matrix_rows(spec, np.arange(spec.p)) * scale(spec)
    naive = np.linalg.norm((features @ torch.from_numpy(matrix).float()).numpy() - oracle)
    found = exported(llama, model, rows, 5, projection=spec)
    assert np.linalg.norm(found - oracle) <= 2 * naive


@pytest.mark.parametrize("method", ["sjlt", "rademacher", "gaussian"])
def test_the_batch_size_does_not_change_a_rows_feature(
    llama: Any, model: Any, rows: Rows, method: str
) -> None:
    spec = projection(model, method)
    alone = exported(llama, model, rows, 1, projection=spec)
    for size in (3, 8):
        found = exported(llama, model, rows, size, projection=spec)
        assert row_errors(found, alone).max() <= 1e-5


def test_a_dense_projection_gives_the_same_whatever_memory_it_may_take(
    llama: Any, model: Any, rows: Rows
) -> None:
    spec = projection(model, "rademacher")
    plenty = exported(llama, model, rows, 4, projection=spec)
    for whole_rows in (1, 4, 9):  # below, at and above a batch
        little = whole_rows * 4 * spec.p
        found = exported(llama, model, rows, 4, projection=spec, buffer_bytes=little)
        np.testing.assert_allclose(found, plenty, rtol=1e-5, atol=1e-6 * np.abs(plenty).max())


def test_norm_and_target_tokens_are_of_the_row_before_projection(
    llama: Any, model: Any, rows: Rows
) -> None:
    features = whole_features(llama, model, rows, 5)
    for method in ("sjlt", "rademacher"):
        parts = export_features(
            model,
            llama.batches(rows, 5),
            features=SPEC,
            projection=projection(model, method),
            moments=llama.moments(model),
        )
        for part in parts:
            expected = features[torch.from_numpy(part.rows)].double().norm(dim=1)
            np.testing.assert_allclose(part.norm, expected, rtol=1e-5)
            tokens = [sum(x != -100 for x in rows[i]["labels"][1:]) for i in part.rows]
            assert part.tokens.tolist() == tokens
            assert (part.status == RowStatus.OK).all()


def test_a_projection_for_another_number_of_parameters_is_refused(
    llama: Any, model: Any, rows: Rows
) -> None:
    wrong = ProjectionSpec("sjlt", p=100, d=8)
    with pytest.raises(BadInput, match="p=100 parameters"):
        exported(llama, model, rows, 4, projection=wrong)


def test_the_model_comes_back_as_it_was(llama: Any, rows: Rows) -> None:
    model = llama.model().train()
    before = {name: (p.detach().clone(), p.requires_grad) for name, p in model.named_parameters()}
    exported(llama, model, rows, 8)
    assert model.training
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name][0])
        assert parameter.requires_grad == before[name][1]
        assert parameter.grad is None


def test_an_export_that_is_interrupted_gives_the_model_back_too(
    kit: Any, llama: Any, rows: Rows, tmp_path: Path
) -> None:
    model = llama.model().train()
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    with pytest.raises(Interrupted) as kept:  # with its traceback, which holds every frame
        build(kit, llama, model, rows, tmp_path / "s", stop_after=1)
    assert kept.tb is not None
    assert model.training
    assert [name for name, p in model.named_parameters() if p.requires_grad] == trained


# ---- rows that can't be used -----------------------------------------------------------------


@pytest.mark.parametrize("method", ["sjlt", "rademacher"])
def test_rows_that_cannot_be_used_carry_a_status_and_leave_the_others_alone(
    llama: Any, rows: Rows, method: str
) -> None:
    model = llama.model(broken=True)
    spec = projection(model, method)
    spoilt = [dict(row) for row in rows[:8]]
    spoilt[1]["labels"] = [-100] * len(spoilt[1]["labels"])
    spoilt[6]["input_ids"] = [llama.broken_token, *spoilt[6]["input_ids"][1:]]
    options: dict[str, Any] = {"features": FeatureSpec("sgd"), "projection": spec}
    (part,) = export_features(model, llama.batches(spoilt, 8), **options)
    expected = np.full(8, RowStatus.OK)
    expected[[1, 6]] = RowStatus.MASKED, RowStatus.NON_FINITE
    np.testing.assert_array_equal(part.status, expected)
    assert np.isnan(part.features[[1, 6]]).all()
    assert part.tokens[1] == 0
    (clean,) = export_features(model, llama.batches(rows[:8], 8), **options)
    good = expected == RowStatus.OK
    assert row_errors(part.features[good], clean.features[good]).max() <= 1e-5


def test_fault_02_a_batch_of_masked_rows_alone_is_masked(
    llama: Any, model: Any, rows: Rows
) -> None:
    masked = [{**row, "labels": [-100] * len(row["labels"])} for row in rows[:2]]
    (part,) = export_features(
        model, llama.batches(masked, 2), features=FeatureSpec("sgd"), projection=projection(model)
    )
    assert (part.status == RowStatus.MASKED).all()
    assert np.isnan(part.features).all()


@pytest.mark.parametrize("method", ["sjlt", "rademacher"])
def test_fault_03_a_gradient_of_zeros_is_zero_norm(llama: Any, rows: Rows, method: str) -> None:
    model = llama.model()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # with B = 0 and fixed, A has no influence
            parameter.data.zero_()
            parameter.requires_grad = False
    (part,) = export_features(
        model,
        llama.batches(rows[:4], 4),
        features=FeatureSpec("sgd"),
        projection=projection(model, method),
    )
    assert (part.status == RowStatus.ZERO_NORM).all()
    assert np.isnan(part.features).all()


# ---- into a store ----------------------------------------------------------------------------


class Interrupted(Exception):
    """Stands for whatever ends a process."""


def build(
    kit: Any,
    llama: Any,
    model: Any,
    rows: Rows,
    path: Path,
    *,
    stop_after: int = 0,
    max_bad_fraction: float = 0.01,
    **options: Any,
) -> Any:
    """Exports into the store at `path`, 8 rows a unit; interrupted after some rows if asked."""
    hashes = [row_hash(row["input_ids"], row["labels"]) for row in rows]
    seen = 0

    def count(done: int) -> None:
        nonlocal seen
        seen += done
        if stop_after and seen > stop_after:
            raise Interrupted

    record = kit.record("train/3", projection=projection(model).to_dict())
    with kit.writer(path) as writer:
        generation = writer.begin(record, RowSet.from_hashes(hashes), dim=DIM, unit_rows=8)
        pending = [unit.index for unit in generation.pending]
        lengths = [len(row["input_ids"]) for row in rows]
        batches = Batches(rows, llama.collate, lengths, **{"token_budget": 60, **options})
        recipe = Recipe(SPEC, projection(model), llama.moments(model))
        compute = partial(compute_unit, model, batches, recipe, on_rows=count)
        summary = fill(generation, compute, max_bad_fraction=max_bad_fraction)
        generation.commit()
    return pending, summary, seen


def chunks(path: Path) -> dict[str, bytes]:
    """Every chunk of the generation by its name."""
    base = path / generation_path("train/3")
    files = [f for f in sorted(base.rglob("*")) if f.is_file() and "c" in f.relative_to(base).parts]
    return {str(f.relative_to(base)): f.read_bytes() for f in files}


def test_a_generation_holds_what_export_features_gives(
    kit: Any, llama: Any, model: Any, rows: Rows, tmp_path: Path
) -> None:
    pending, summary, seen = build(kit, llama, model, rows, tmp_path / "s")
    assert (pending, seen, summary.rows) == ([0, 1, 2], N, N)
    assert summary.tokens == sum(len(row["input_ids"]) for row in rows)
    assert summary.status_counts == {"ok": N}
    generation = open_store(tmp_path / "s").generation("train/3")
    expected = exported(llama, model, rows, 1)
    found = generation.read(0, N)
    assert row_errors(found, expected).max() <= 2**-10  # float16
    norms = whole_features(llama, model, rows, 1).norm(dim=1)
    np.testing.assert_allclose(generation.norm, norms, rtol=1e-5)


def test_the_token_budget_changes_no_feature_beyond_rounding(
    kit: Any, llama: Any, model: Any, rows: Rows, tmp_path: Path
) -> None:
    found = []
    for budget in (1, 60, 10_000):
        build(kit, llama, model, rows, tmp_path / str(budget), token_budget=budget)
        generation = open_store(tmp_path / str(budget)).generation("train/3")
        found.append(generation.read(0, N))
    for other in found[1:]:
        assert row_errors(other, found[0]).max() <= 2**-10


@pytest.mark.parametrize("method", ["sjlt", "rademacher"])
def test_a_unit_has_the_losses_of_a_plain_pass(llama: Any, model: Any, method: Any) -> None:
    rows = llama.rows(9)
    rows[4] = {**rows[4], "labels": [-100] * len(rows[4]["labels"])}
    lengths = [len(row["input_ids"]) for row in rows]
    p = sum(each.numel() for each in model.parameters() if each.requires_grad)
    recipe = Recipe(FeatureSpec("sgd"), ProjectionSpec(method, p=p, d=16, seed=1))
    longest = sorted(lengths)[-2]
    batches = Batches(rows, llama.collate, lengths, token_budget=50, longest=longest)
    done = compute_unit(model, batches, recipe, UnitRange(0, 0, 9))
    assert done.loss is not None
    for row, loss in enumerate(done.loss):
        plain = batch_losses(model, llama.collate(rows[row : row + 1])).loss.item()
        expected = np.nan if lengths[row] > longest else plain
        np.testing.assert_allclose(loss, expected, rtol=1e-5)
    assert np.isnan(done.loss).sum() == 1 + sum(length > longest for length in lengths)


@pytest.mark.parametrize("fused", [False, True])
def test_adams_vectors_are_made_once_for_all_units_of_a_generation(
    llama: Any, model: Any, rows: Rows, fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the same bits, and freed with the recipe; other moments make their own."""
    if fused:
        monkeypatch.setattr(projected, "FUSED", ("cpu",))
        monkeypatch.setattr(joined, "RUN_PARAMETERS", 500)
    made: list[weakref.ref[FeatureMap]] = []
    prepare = FeatureMap._prepare

    def counted(self: FeatureMap, moments: Any) -> Any:
        made.append(weakref.ref(self))
        return prepare(self, moments)

    def recipe_of(moments: AdamMoments) -> Recipe:
        return Recipe(SPEC, projection(model), moments)

    units = [UnitRange(i, 8 * i, min(8 * i + 8, N)) for i in range(3)]
    batches = Batches(rows, llama.collate, [len(row["input_ids"]) for row in rows], 60)
    compute, moments = partial(compute_unit, model, batches), llama.moments(model)
    alone = [compute(recipe_of(moments), unit).features for unit in units]
    monkeypatch.setattr(FeatureMap, "_prepare", counted)
    recipe = recipe_of(moments)
    for unit, expected in zip(units, alone, strict=True):
        np.testing.assert_array_equal(compute(recipe, unit).features, expected)
    assert len(made) == len(moments.parameters)
    double = {name: replace(each, v=2 * each.v + 1e-3) for name, each in moments.parameters.items()}
    changed = compute(recipe_of(AdamMoments(double)), units[0]).features
    assert len(made) == 2 * len(moments.parameters)
    assert not np.isclose(changed, alone[0]).all()
    del recipe
    gc.collect()
    assert all(each() is None for each in made)


@pytest.mark.parametrize("stop_after", [1, 9, 20])
def test_an_interrupted_export_goes_on_with_its_pending_units_to_equal_bytes(
    kit: Any, llama: Any, model: Any, rows: Rows, tmp_path: Path, stop_after: int
) -> None:
    build(kit, llama, model, rows, tmp_path / "whole")
    with pytest.raises(Interrupted):
        build(kit, llama, model, rows, tmp_path / "cut", stop_after=stop_after)
    pending, summary, _ = build(kit, llama, model, rows, tmp_path / "cut")
    assert pending == list(range(stop_after // 8, 3))
    assert summary.rows == N - 8 * (stop_after // 8)
    assert chunks(tmp_path / "cut") == chunks(tmp_path / "whole")
    assert verify_store(tmp_path / "cut").ok


def test_rows_longer_than_the_models_limit_are_too_long_and_never_run(
    kit: Any, llama: Any, model: Any, rows: Rows, tmp_path: Path
) -> None:
    lengths = np.array([len(row["input_ids"]) for row in rows])
    longest = int(np.median(lengths))
    _, summary, seen = build(kit, llama, model, rows, tmp_path / "s", longest=longest)
    generation = open_store(tmp_path / "s").generation("train/3")
    np.testing.assert_array_equal(generation.status == RowStatus.TOO_LONG, lengths > longest)
    assert seen == int((lengths <= longest).sum())
    assert summary.status_counts["too_long"] == int((lengths > longest).sum())
    assert np.isnan(generation.read(0, N)[lengths > longest]).all()


def test_fault_01_too_many_rows_without_a_finite_gradient_stop_the_export(
    kit: Any, llama: Any, rows: Rows, tmp_path: Path
) -> None:
    model = llama.model(broken=True)
    spoilt = [dict(row) for row in rows]
    for i in (3, 9):
        spoilt[i]["input_ids"] = [llama.broken_token, *spoilt[i]["input_ids"][1:]]
    with pytest.raises(BadInput, match=r"2 of 21 rows .* the first: \[3, 9\]"):
        build(kit, llama, model, spoilt, tmp_path / "a", max_bad_fraction=0.05)
    _, summary, _ = build(kit, llama, model, spoilt, tmp_path / "b", max_bad_fraction=0.1)
    assert summary.status_counts == {"ok": N - 2, "non_finite": 2}


# ---- planning --------------------------------------------------------------------------------


@given(
    lengths=st.lists(st.integers(0, 70), max_size=60),
    budget=st.integers(1, 300),
    max_rows=st.integers(1, 20),
)
def test_every_row_is_planned_once_and_no_batch_exceeds_its_budget(
    lengths: list[int], budget: int, max_rows: int
) -> None:
    batches = plan_batches(lengths, budget, max_rows)
    assert sorted(int(i) for batch in batches for i in batch) == list(range(len(lengths)))
    longest = [max(lengths[int(i)] for i in batch) for batch in batches]
    assert longest == sorted(longest, reverse=True)
    for batch, width in zip(batches, longest, strict=True):
        assert 1 <= len(batch) <= max_rows
        assert len(batch) == 1 or len(batch) * width <= budget


@given(length=st.integers(1, 40), n=st.integers(1, 60), budget=st.integers(40, 400))
def test_batches_of_equal_rows_are_as_full_as_the_budget_allows(
    length: int, n: int, budget: int
) -> None:
    batches = plan_batches([length] * n, budget)
    assert len(batches) == -(-n // (budget // length))


@given(
    lengths=st.lists(st.integers(1, 70), min_size=1, max_size=9),
    budget=st.integers(1, 300),
    max_rows=st.integers(1, 9),
)
def test_no_way_of_cutting_rows_by_length_costs_less(
    lengths: list[int], budget: int, max_rows: int
) -> None:
    def cost(batches: list[list[int]]) -> int:
        padded = sum(len(batch) * max(batch) for batch in batches)
        return padded + len(batches) * (budget // BATCH_SHARE)

    def fits(batch: list[int]) -> bool:
        return len(batch) == 1 or (len(batch) <= max_rows and len(batch) * max(batch) <= budget)

    down = sorted(lengths, reverse=True)
    ways = []
    for cuts in product([False, True], repeat=len(down) - 1):
        ends = [i + 1 for i, cut in enumerate(cuts) if cut]
        ways.append([down[a:b] for a, b in pairwise([0, *ends, len(down)])])
    planned = plan_batches(lengths, budget, max_rows)
    found = cost([[lengths[int(i)] for i in batch] for batch in planned])
    assert found == min(cost(way) for way in ways if all(map(fits, way)))


def test_rows_of_very_different_lengths_share_no_batch() -> None:
    lengths = [400, 30, 390, 30, 30, 30]
    batches = [sorted(int(i) for i in batch) for batch in plan_batches(lengths, 2048)]
    assert batches == [[0, 2], [1, 3, 4, 5]]


@pytest.mark.parametrize(
    ("device", "method", "free", "rows"),
    [
        ("cpu", "rademacher", None, 12),  # as ever: 2 GiB
        ("cuda", "rademacher", 139 << 30, 64),
        ("cuda", "rademacher", 24 << 30, 38),
        ("cuda", "rademacher", 1 << 20, 1),
        ("cuda", "trak", 139 << 30, 12),  # which takes them to the RAM
    ],
)
def test_rows_are_gathered_in_a_fourth_of_a_devices_free_memory(
    device: str, method: Any, free: int | None, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of an 8B model under r = 16, for which a dense projection wants 64 rows at once."""
    p = 41_943_040

    def freed(_device: torch.device) -> int:
        assert free is not None, "nobody asks a CPU"
        return free

    monkeypatch.setattr(projected, "free_on", freed)
    asked = projected.buffer_bytes_on(torch.device(device), ProjectionSpec(method, p=p, d=4096))
    assert asked <= 16 << 30
    assert projected.gathered_rows(p, asked) == rows


# ---- memory ----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["sjlt", "rademacher"])
def test_a_unit_that_runs_out_of_memory_has_the_features_of_smaller_batches(
    llama: Any, rows: Rows, method: str
) -> None:
    model = llama.model()
    recipe = Recipe(SPEC, projection(model, method), llama.moments(model))
    lengths = [len(row["input_ids"]) for row in rows]
    unit = UnitRange(0, 0, len(rows))
    wanted = compute_unit(model, Batches(rows, llama.collate, lengths, 48), recipe, unit)

    def full(_module: Any, _args: Any, inputs: dict[str, Any]) -> None:
        if inputs["input_ids"].numel() > 48:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    flags = [parameter.requires_grad for parameter in model.parameters()]
    model.register_forward_pre_hook(full, with_kwargs=True)
    done: list[int] = []
    found = compute_unit(
        model, Batches(rows, llama.collate, lengths, 4096), recipe, unit, done.append
    )
    assert sum(done) == len(rows)
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    np.testing.assert_allclose(found.features, wanted.features, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(found.tokens, wanted.tokens)
