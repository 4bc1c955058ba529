"""Losses of rows: an optional array of a generation, for releases that know of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gradstore.errors import BadInput
from gradstore.format.canonical import canonical_json, parse, seal
from gradstore.format.layout import LOSSES_VERSION, SCHEMA_VERSION, plan_path
from gradstore.format.plans import Plan
from gradstore.store.reader import open_store
from gradstore.store.verify import verify_store

N = 40


def begin(kit: Any, writer: Any, name: str = "train/1", *, losses: bool = True) -> Any:
    return writer.begin(
        kit.record(name), kit.rows(N), dim=kit.dim, unit_rows=kit.unit_rows, losses=losses
    )


def write(generation: Any, kit: Any, *, losses: bool = True) -> None:
    values = kit.features(N)
    for unit in list(generation.pending):
        rows, k = slice(unit.start, unit.stop), unit.stop - unit.start
        generation.write_unit(
            unit.index, values[rows], np.ones(k, np.float32), np.zeros(k, np.uint8), np.arange(k),
            np.arange(unit.start, unit.stop) / 8 if losses else None,
        )  # fmt: skip
    generation.commit()


def test_losses_come_back_checked_and_the_store_asks_for_a_release_that_knows_them(
    kit: Any, tmp_path: Path
) -> None:
    with kit.writer(tmp_path / "s") as writer:
        write(begin(kit, writer), kit)
    store = open_store(tmp_path / "s")
    loss = store.generation("train/1").loss
    assert loss is not None
    assert loss.dtype == np.float32
    np.testing.assert_array_equal(loss, np.arange(N, dtype=np.float32) / 8)
    assert store.schema_version == LOSSES_VERSION
    assert verify_store(tmp_path / "s").ok
    chunk = tmp_path / "s" / "generations" / "train" / "1" / "loss" / "c" / "0"
    chunk.write_bytes(b"\0" * chunk.stat().st_size)
    assert [fault.file for fault in verify_store(tmp_path / "s").faults] == [
        "generations/train/1/loss/c/0"
    ]


def test_a_generation_without_losses_is_of_the_first_schema_to_the_byte(
    kit: Any, tmp_path: Path
) -> None:
    store = kit.build(tmp_path / "s")
    assert store.schema_version == SCHEMA_VERSION
    assert store.generation("train/1").loss is None
    document = parse((tmp_path / "s" / plan_path("train/1")).read_bytes())
    assert "losses" not in document
    assert document["schema_version"] == SCHEMA_VERSION


def test_a_generation_that_exists_without_losses_is_reused_as_it_is(
    kit: Any, tmp_path: Path
) -> None:
    store = kit.build(tmp_path / "s")
    with kit.writer(tmp_path / "s") as writer:
        again = begin(kit, writer)
        assert again.pending == []
        assert again.name == "train/1"
    assert open_store(tmp_path / "s").head == store.head


def test_an_export_interrupted_without_losses_goes_on_without(kit: Any, tmp_path: Path) -> None:
    with kit.writer(tmp_path / "s") as writer:
        half = begin(kit, writer, losses=False)
        kit.fill(half, kit.features(N), units=1)
    with kit.writer(tmp_path / "s") as writer:
        rest = begin(kit, writer)
        assert len(rest.pending) == len(rest.plan.units) - 1
        write(rest, kit)
    store = open_store(tmp_path / "s")
    assert store.generation("train/1").loss is None
    assert store.schema_version == SCHEMA_VERSION


def test_a_unit_without_the_losses_that_were_planned_is_refused(kit: Any, tmp_path: Path) -> None:
    with kit.writer(tmp_path / "s") as writer:
        generation = begin(kit, writer)
        with pytest.raises(BadInput, match=r"needs losses \(16,\)"):
            write(generation, kit, losses=False)


@pytest.mark.parametrize("losses", [False, None, 1, "yes"])
def test_a_plan_says_losses_in_one_way_alone(kit: Any, losses: object) -> None:
    plan = Plan("train/1", "gradient", "0" * 64, kit.record(), kit.rows(3), kit.dim, "float16")
    document = parse(replace(plan, losses=True).to_bytes())
    assert Plan.from_bytes(canonical_json(document))[0].losses
    del document["sha256"]
    with pytest.raises(ValueError, match=r"fields|schema"):
        Plan.from_bytes(canonical_json(seal({**document, "losses": losses})))
