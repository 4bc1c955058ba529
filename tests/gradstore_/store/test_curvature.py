"""Factors of a metric in a store: a file a fit, for every set of a state; checked and cleaned."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gradstore
from gradstore.errors import BadInput, DamagedData, ProvenanceMismatch
from gradstore.export.features import FeatureSpec, Recipe
from gradstore.export.gradient_space import GradientSpace
from gradstore.export.kronecker import CurvatureRule
from gradstore.export.kronecker_fit import fit_factors
from gradstore.export.projected import compute_unit
from gradstore.export.settings import BuildSettings
from gradstore.export.units import Batches
from gradstore.format.plans import UnitRange
from gradstore.format.records import RowSet
from gradstore.storage.reading import ReadFiles
from gradstore.store import building, curvature
from gradstore.store.curvature import FactorSample
from gradstore.store.verify import verify_store

SETTINGS = {"proj_dim": 32, "tokens_per_batch": 60, "gradient_type": "sgd"}


class Build:
    """Calls of `gradstore.build` on the tiny llama, in one store."""

    def __init__(self, llama: Any, path: Path) -> None:
        self.llama, self.model, self.path = llama, llama.model(), path
        self.train, self.target = llama.rows(20), llama.rows(6, seed=8)

    def __call__(self, train: bool = True, target: Any = None, **changes: Any) -> gradstore.Store:
        rows = self.target if target is None else target
        given = {"preconditioner": "ekfac", "step": 7, **SETTINGS, **changes}
        gradstore.build(self.model, None, self.train if train else None, rows, self.path, **given)
        return gradstore.open_store(self.path)

    def interrupted(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Build, and stop in the first target set."""

        def stop(*_: Any, **__: Any) -> Any:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(building, "compute_unit", stop)
            with pytest.raises(KeyboardInterrupt):
                self()

    @property
    def files(self) -> list[Path]:
        return sorted((self.path / "curvature").iterdir())


@pytest.fixture
def build(llama: Any, tmp_path: Path) -> Build:
    return Build(llama, tmp_path / "store")


@pytest.fixture
def unfitted(monkeypatch: pytest.MonkeyPatch) -> Any:
    """From its call on, whoever fits factors fails."""

    def fail(*_: Any) -> Any:
        raise AssertionError("fitted again")

    return lambda: monkeypatch.setattr(curvature, "fit_factors", fail)


@pytest.mark.parametrize("kind", ["kfac", "ekfac"])
def test_rows_of_every_set_are_in_one_metric_that_the_store_keeps(build: Build, kind: Any) -> None:
    store = build(preconditioner=kind, damping=0.3)
    (file,) = build.files
    told = store.generation("train/7").record.curvature
    assert told == store.generation("target/target/7").record.curvature
    assert (told["kind"], told["damping"], told["rows"]) == (kind, 0.3, 20)
    assert file.name == f"{told['sha256']}.safetensors"
    kept = store.factors(store.generation("train/7"))
    assert kept is not None
    lengths = [len(row["input_ids"]) for row in build.train]
    batches = Batches(build.train, build.llama.collate, lengths, 60)
    assert fit_factors(build.model, batches.sample(42), kind).sha256 == kept.sha256
    spec = FeatureSpec("sgd", curvature=kept)
    projection = gradstore_projection(store)
    for name, rows in (("train/7", build.train), ("target/target/7", build.target)):
        batches = Batches(rows, build.llama.collate, [len(row["input_ids"]) for row in rows], 60)
        exact = compute_unit(
            build.model, batches, Recipe(spec, projection), UnitRange(0, 0, len(rows))
        )
        generation = store.generation(name)
        np.testing.assert_allclose(generation.norm, exact.norm, rtol=1e-5)
        error = np.linalg.norm(generation.read(0, len(rows)) - exact.features)
        assert error <= 1e-3 * np.linalg.norm(exact.features)  # float16
    assert verify_store(build.path).ok


def gradstore_projection(store: gradstore.Store) -> Any:
    from gradkernels import ProjectionSpec

    return ProjectionSpec.from_dict(store.generation("train/7").record.projection)


def test_factors_that_are_larger_than_any_document_are_read_and_not_fitted_again(
    build: Build, unfitted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = build()
    (file,) = build.files
    monkeypatch.setattr(ReadFiles, "most_bytes", file.stat().st_size - 1)
    unfitted()
    assert store.factors(store.generation("train/7")) is not None
    build(train=False, target={"later": build.target[:3]})
    assert build.files == [file]
    assert verify_store(build.path).ok


def test_large_factors_of_a_build_that_ended_before_its_plan_are_found(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    build()
    (file,) = build.files
    for part in ("commits", "plans", "generations"):
        shutil.rmtree(build.path / part)
    monkeypatch.setattr(ReadFiles, "most_bytes", file.stat().st_size - 1)
    build()
    assert build.files == [file]
    assert verify_store(build.path).ok


def test_targets_of_a_later_day_are_put_into_the_same_metric(build: Build, unfitted: Any) -> None:
    build()
    unfitted()
    store = build(train=False, target={"later": build.target[:3]})
    later = store.generation("target/later/7")
    assert later.record.curvature == store.generation("train/7").record.curvature
    first = store.generation("target/target/7")
    # In batches of other rows, and in float16.
    np.testing.assert_allclose(later.read(0, 3), first.read(0, 3), rtol=1e-3, atol=1e-4)
    build()  # the same again: nothing is computed
    assert len(build.files) == 1


def test_targets_alone_are_refused_where_no_training_rows_were_fitted(build: Build) -> None:
    with pytest.raises(BadInput, match=r"ekfac is fitted on training rows.*none of this model's"):
        build(train=False)
    build(preconditioner="kfac")
    with pytest.raises(BadInput, match="ekfac is fitted on training rows"):
        build(train=False)
    next(p for p in build.model.parameters() if p.requires_grad).data += 0.1
    with pytest.raises(BadInput, match="kfac is fitted on training rows"):
        build(train=False, preconditioner="kfac", step=8)


def test_factors_of_an_interrupted_build_are_taken_up(
    build: Build, unfitted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in the first target set: its plan names the factors, and nothing is committed."""
    build.interrupted(monkeypatch)
    assert gradstore.open_store(build.path).generations() == []
    unfitted()
    store = build()
    assert store.generation("train/7").record.curvature["sha256"] == build.files[0].stem


@pytest.mark.parametrize("lost", [False, True])
def test_damaged_factors_that_nothing_committed_needs_are_fitted_again(
    build: Build, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, lost: bool
) -> None:
    build.interrupted(monkeypatch)
    (file,) = build.files
    content = file.read_bytes()
    file.chmod(0o644)
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    if lost:
        file.unlink()
    store = build()
    assert file.name in "".join(caplog.messages)
    assert store.generation("train/7").record.curvature["sha256"] == file.stem
    assert file.read_bytes() == content
    assert verify_store(build.path).ok


def test_damaged_and_missing_factors_are_found_by_verify_and_by_whoever_needs_them(
    build: Build,
) -> None:
    build()
    (file,) = build.files
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.chmod(0o644)
    file.write_bytes(content)
    (fault,) = verify_store(build.path).faults
    assert file.name in str(fault)
    with pytest.raises(DamagedData, match="the factors of its name"):
        build(train=False, target={"later": build.target[:3]})
    file.write_bytes(content[:100])
    assert "holds no Kronecker factors" in str(verify_store(build.path).faults[0])
    file.unlink()
    (fault,) = verify_store(build.path).faults
    assert "no file" in str(fault)
    store = gradstore.open_store(build.path)
    with pytest.raises(DamagedData, match="no file"):
        store.factors(store.generation("train/7"))


def test_clean_up_removes_the_factors_that_no_generation_names(build: Build) -> None:
    build()
    first = build.files[0].name
    next(p for p in build.model.parameters() if p.requires_grad).data += 0.1
    store = build(step=9)
    assert len(build.files) == 2
    (build.path / "curvature" / ("0" * 64 + ".safetensors")).write_bytes(b"of a dead run")
    with gradstore.StoreWriter(build.path, provenance=store.provenance()) as writer:
        writer.clean()
        assert len(build.files) == 2
        writer.clean(keep_generations=1)
    assert [file.name for file in build.files] != [first]
    assert build.files[0].stem == store.generation("train/9").record.curvature["sha256"]
    assert len(build.files) == 1
    assert verify_store(build.path).ok


def test_rows_in_two_metrics_are_not_scored_together(build: Build) -> None:
    build()
    gradstore.checkpoint_features(build(train=False))
    store = build(train=False, damping=0.5)
    with pytest.raises(ProvenanceMismatch, match=r"metric differs: train/7.*one preconditioner"):
        gradstore.checkpoint_features(store)
    store = build(preconditioner="none", step=9)
    with pytest.raises(ProvenanceMismatch, match="sgd and sgd in the metric of ekfac"):
        gradstore.checkpoint_features(store, "all")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"gradient_type": "adam"}, "preconditioner: ekfac is the curvature of plain gradients"),
        ({"damping": 0.0}, "damping is 0.0"),
        ({"damping": float("inf")}, "damping is inf"),
        ({"preconditioner": "shampoo"}, "preconditioner is 'shampoo'"),
    ],
)
def test_a_metric_that_cannot_be_taken_is_refused(
    build: Build, given: dict[str, Any], said: str
) -> None:
    with pytest.raises(BadInput, match=said):
        build(**given)
    assert not build.path.exists()


def test_of_several_workers_one_fits_the_factors_and_all_take_them(
    build: Build, unfitted: Any
) -> None:
    """Two fits on a GPU may differ, and features in two metrics can't be compared."""
    provenance = build(preconditioner="none").provenance()
    lengths = [len(row["input_ids"]) for row in build.train]
    rows = RowSet.from_hashes([b"%016d" % i for i in range(20)], [("train", i) for i in range(20)])
    sample = FactorSample(Batches(build.train, build.llama.collate, lengths, 60), rows, 42)
    space = GradientSpace.of(build.model, BuildSettings(**SETTINGS))

    def factors(writer: gradstore.StoreWriter) -> str:
        rule = CurvatureRule("ekfac", 0.1)
        return writer.factors(build.model, space, rule, autocast="off", sample=sample).sha256

    workers = [
        gradstore.StoreWriter(build.path, provenance=provenance, worker=gradstore.Worker(i, 2))
        for i in (1, 2)
    ]
    try:
        first = factors(workers[0])
        unfitted()
        assert factors(workers[1]) == first
        assert [file.stem for file in build.files] == [first]
    finally:
        for writer in workers:
            writer.close()
