"""proj_method trak: an export has the bits of TRAK's `BasicProjector`, and says what it takes."""

from __future__ import annotations

import logging
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gradkernels import ProjectionSpec

import gradstore
from gradstore.capture.per_sample import GradientCapture
from gradstore.capture.slots import ParameterSlot
from gradstore.errors import BadInput, ProvenanceMismatch
from gradstore.export import memory
from gradstore.export.features import FeatureMap, FeatureSpec
from gradstore.export.memory import check_published, most_rows
from gradstore.export.projected import export_features, gathered_rows
from gradstore.export.units import Batches
from gradstore.store import building

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # its source holds an escape that Python warns of
    from trak.projectors import BasicProjector, ProjectionType

N, DIM = 32, 150
SETTINGS = {"proj_dim": DIM, "proj_method": "trak", "seed": 0, "dtype": "float32",
            "tokens_per_batch": 60}  # fmt: skip


def features_of(llama: Any, model: Any, batches: Any, spec: FeatureSpec) -> torch.Tensor:
    """(N, p) float32 features of whole gradients, kept flat as they were captured."""
    with GradientCapture(model) as capture:
        feature_map = FeatureMap(spec, capture.slots, llama.moments(model))
        out = torch.empty(N, capture.p)
        for positions, batch in batches:

            def sink(slot: ParameterSlot, block: torch.Tensor, at: Any = positions) -> None:
                columns = slice(slot.start, slot.start + slot.numel)
                out[torch.from_numpy(at), columns] = feature_map.apply_(slot, block)

            capture.capture(batch, sink)
    return out


def projected_by_trak(x: torch.Tensor) -> np.ndarray:
    """(N, DIM) of rows sixteen at a time, as LESS's script projects them."""
    projector = BasicProjector(x.shape[1], DIM, 0, ProjectionType.rademacher, torch.device("cpu"),
                               block_size=128, dtype=torch.float32)  # fmt: skip
    return torch.cat([projector.project(part, 0) for part in x.split(16)]).numpy()


@pytest.mark.parametrize(("size", "kept"), [(5, 64), (1, 9), (8, 3)])
@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_an_export_has_the_bits_of_basic_projector_on_the_captured_gradients(
    llama: Any, size: int, kept: int, kind: Any
) -> None:
    """In batches of `size`, of which `kept` rows wait for each other; fewer than a batch, too."""
    model, rows, spec = llama.model(), llama.rows(N), FeatureSpec(kind)
    x = features_of(llama, model, llama.batches(rows, size), spec)
    projection = ProjectionSpec("trak", p=x.shape[1], d=DIM, seed=0)
    parts = list(export_features(
        model, llama.batches(rows, size), features=spec, projection=projection,
        moments=llama.moments(model), buffer_bytes=kept * 4 * x.shape[1],
    ))  # fmt: skip
    found = np.concatenate([part.features for part in parts])
    assert np.concatenate([part.rows for part in parts]).tolist() == list(range(N))
    np.testing.assert_array_equal(found, projected_by_trak(x))


class Interrupted(Exception):
    pass


def test_a_build_keeps_the_seed_and_goes_on_with_the_same_bits(
    llama: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, rows = llama.model(), llama.rows(300)
    build = {"gradient_type": "sgd", "step": 7, **SETTINGS}
    gradstore.build(model, None, rows, rows[:4], tmp_path / "whole", **build)
    compute, calls = building.compute_unit, []

    def stops(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 3:  # the target's unit, the first training unit, and no more
            raise Interrupted
        return compute(*args)

    monkeypatch.setattr(building, "compute_unit", stops)
    with pytest.raises(Interrupted):
        gradstore.build(model, None, rows, rows[:4], tmp_path / "parts", **build)
    gradstore.build(model, None, rows, rows[:4], tmp_path / "parts", **build)
    assert len(calls) == 4
    whole, parts = (gradstore.open_store(tmp_path / name).generation("train/7")
                    for name in ("whole", "parts"))  # fmt: skip
    np.testing.assert_array_equal(parts.read(0, 300), whole.read(0, 300))
    assert whole.record.projection["method"] == "trak"
    assert whole.record.effective_seed == 0  # at every step, as in LESS
    with pytest.raises(ProvenanceMismatch, match=r"projection\.method differs"):
        gradstore.build(model, None, rows, None, tmp_path / "whole",
                        **{**build, "proj_method": "rademacher", "step": 9})  # fmt: skip


def test_what_does_not_fit_is_refused_before_the_start(
    llama: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    big = ProjectionSpec("trak", p=42_000_000, d=4096)
    rows = gathered_rows(big.p)
    need = 4 * big.p * (128 + rows + 16)
    monkeypatch.setattr(memory, "free_ram", lambda: need)
    with caplog.at_level(logging.INFO):
        check_published(big, rows)
    assert "42,000,000 parameters x 128 outputs, and whole gradients of 12 rows" in caplog.text
    with pytest.raises(BadInput, match=r"proj_method trak takes about .* \(24.4 GiB are free\)"):
        check_published(big, rows + 1)  # a batch that the waiting rows leave no room for
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(BadInput, match="Take proj_method rademacher"):
        check_published(big, rows)
    check_published(ProjectionSpec("rademacher", p=big.p, d=4096), 256)
    monkeypatch.setattr(memory, "free_ram", lambda: None)
    check_published(big, rows + 1)
    monkeypatch.setattr(memory, "free_ram", lambda: 1000)
    with pytest.raises(BadInput, match="proj_method trak takes about"):
        gradstore.build(llama.model(), None, llama.rows(4), None, tmp_path / "store",
                        gradient_type="sgd", **SETTINGS)  # fmt: skip
    assert not (tmp_path / "store").exists()


def test_a_batch_has_no_more_rows_than_are_counted(llama: Any) -> None:
    rows = llama.rows(40)
    lengths = [len(row["input_ids"]) for row in rows]
    for budget in (10, 60, 5000):
        batches = Batches(rows, llama.collate, lengths, budget)
        assert most_rows(batches) == min(256, max(1, budget // min(lengths)))
    assert most_rows(Batches(rows, llama.collate, lengths, 5000, max_rows=8)) == 8
    assert most_rows(Batches([], llama.collate, [], 60)) == 60


def test_without_trak_a_build_is_refused_by_name(
    llama: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "trak", None)
    with pytest.raises(BadInput, match=r"proj_method is 'trak', but the package traker \(TRAK\)"):
        gradstore.build(llama.model(), None, llama.rows(4), None, tmp_path / "store", **SETTINGS)
