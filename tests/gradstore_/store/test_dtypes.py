"""Stores of every dtype: their schema, their target sets, and their damage."""

from __future__ import annotations

import random
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import numpy as np
import pytest
import zarr

from gradstore.errors import DamagedData, ProvenanceMismatch
from gradstore.format.layout import FIRST_DTYPES, FeatureDtype, dtype_of_role
from gradstore.store.reader import open_store
from gradstore.store.verify import verify_store

if TYPE_CHECKING:
    from conftest import StoreKit

DTYPES = get_args(FeatureDtype)


@pytest.fixture(params=DTYPES)
def built(request: pytest.FixtureRequest, kit: StoreKit, fast_path: Path) -> Path:
    kit.dtype, kit.dim = request.param, 8
    kit.build(fast_path / "s", "train/1", "target/a/1")
    return fast_path / "s"


def test_dtypes_of_the_first_schema_need_no_newer_one(kit: StoreKit, built: Path) -> None:
    store = open_store(built)
    assert store.schema_version == (1 if kit.dtype in FIRST_DTYPES else 2)
    assert [entry["dtype"] for entry in store.info()["generations"]] == [
        kit.dtype,
        dtype_of_role(kit.dtype, "target"),
    ]


def test_target_rows_are_float_whatever_the_training_rows_are(kit: StoreKit, built: Path) -> None:
    """Queries keep their direction to 2^-11 of their largest entry."""
    target = open_store(built).generation("target/a/1")
    values = kit.features(40, seed=1)
    read = target.read(0, 40)
    largest = np.abs(values[target.usable]).max(axis=1, keepdims=True)
    bits = 8 if kit.dtype == "bfloat16" else 11
    assert (np.abs(read - values)[target.usable] <= largest * 2.0**-bits).all()


def test_another_dtype_is_refused_whichever_role_was_first(kit: StoreKit, fast_path: Path) -> None:
    """A store of few bits takes float16 targets, a float16 one no training rows of few bits."""
    kit.build(fast_path / "a", "target/a/1")
    kit.dtype = "bfloat16"
    with kit.writer(fast_path / "a") as writer, pytest.raises(ProvenanceMismatch, match="bfloat16"):
        kit.add(writer, "train/1")
    kit.dtype = "int8"
    kit.build(fast_path / "b", "train/1")
    kit.dtype = "float32"
    with kit.writer(fast_path / "b") as writer, pytest.raises(ProvenanceMismatch, match="float32"):
        kit.add(writer, "target/a/1")
    kit.dtype = "float16"
    with kit.writer(fast_path / "b") as writer:
        kit.add(writer, "target/a/1")
        with pytest.raises(ProvenanceMismatch, match="int8"):  # though the newest rows are float16
            kit.add(writer, "train/2")


def test_1bit_rows_lie_on_disk_as_eight_dimensions_to_a_byte(
    kit: StoreKit, fast_path: Path
) -> None:
    """The last byte's other bits are 0, and a row that can't be used is zeros with scale NaN."""
    kit.dtype, kit.dim = "1bit", 20
    found = kit.build(fast_path / "s").generation("train/1")
    group = zarr.open_group(str(found.path), mode="r")
    bits, scale = np.asarray(group["features"][:]), np.asarray(group["scale"][:])
    assert bits.shape == (40, 3)
    assert bits.dtype == np.uint8
    assert not (bits[:, 2] >> 4).any()
    assert not bits[~found.usable].any()
    assert np.array_equal(np.isnan(scale), ~found.usable)
    values = kit.features(40, seed=1)[found.usable].astype(np.float64)
    np.testing.assert_array_equal(found.take([39, 2, 17]), found.read(0, 40)[[39, 2, 17]])
    read = found.read(0, 40)[found.usable].astype(np.float64)
    np.testing.assert_allclose((read * values).sum(1), np.square(values).sum(1), rtol=1e-5)


def test_a_flipped_bit_of_any_array_is_reported(built: Path) -> None:
    draw = random.Random(0)
    for file in sorted((built / "generations/train/1").rglob("c/*/0")):
        data = bytearray(file.read_bytes())
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        kept = file.read_bytes()
        file.write_bytes(data)
        generation = open_store(built).generation("train/1")
        with pytest.raises(DamagedData, match=r"crc32c"):
            assert generation.read(0, 40) is generation.row_hash
        generation = open_store(built).generation("train/1")
        with pytest.raises(DamagedData, match=r"crc32c"):
            assert generation.take(range(40)) is generation.row_hash
        assert not verify_store(built).ok
        file.write_bytes(kept)
    assert verify_store(built).ok


def test_an_interrupted_export_goes_on_to_the_same_bytes(
    kit: StoreKit, built: Path, fast_path: Path
) -> None:
    whole = open_store(built).generation("train/1")
    values = kit.features(40, seed=1)
    for units in (1, None):
        with kit.writer(fast_path / "t") as writer:
            begun = writer.begin(
                kit.record(), kit.rows(40), dim=8, dtype=kit.dtype, unit_rows=kit.unit_rows
            )
            kit.fill(begun, values, units)
            if units is None:
                begun.commit()
    resumed = open_store(fast_path / "t").generation("train/1")
    for unit in range(len(whole.units)):
        assert resumed.raw(unit).tobytes() == whole.raw(unit).tobytes()
