"""What lies on disk is plain Zarr v3, and what is read back is what was written."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import google_crc32c
import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from gradstore.errors import BadInput
from gradstore.format.codec import LARGEST, decode, encode, row_maxima, settle_status
from gradstore.format.layout import RowStatus
from gradstore.format.records import RowSet
from gradstore.store.reader import open_store

if TYPE_CHECKING:
    from conftest import StoreKit


def test_zarr_reads_the_whole_matrix_and_every_column(kit: StoreKit, fast_path: Path) -> None:
    generation = kit.build(fast_path / "s").generation("train/1")
    group = zarr.open_group(str(generation.path), mode="r")
    features = group["features"][:]
    assert features.shape == (40, 4)
    assert features.dtype == np.float16
    assert np.array_equal(
        features, np.concatenate([generation.raw(u) for u in range(3)]), equal_nan=True
    )
    for name in ("scale", "norm", "status", "tokens", "row_hash"):
        assert np.array_equal(group[name][:], getattr(generation, name), equal_nan=name == "scale")


def test_every_level_is_a_zarr_group(kit: StoreKit, fast_path: Path) -> None:
    kit.build(fast_path / "s", "a/target/skill/7")
    root = zarr.open_group(str(fast_path / "s"), mode="r")
    assert root.attrs["schema_version"] == 1
    for path in ("generations", "generations/a", "generations/a/target/skill/7"):
        assert isinstance(root[path], zarr.Group)


def test_zarr_notices_a_flipped_bit(kit: StoreKit, fast_path: Path) -> None:
    generation = kit.build(fast_path / "s").generation("train/1")
    chunk = generation.path / "features/c/1/0"
    data = bytearray(chunk.read_bytes())
    data[17] ^= 4
    chunk.write_bytes(data)
    with pytest.raises(ValueError, match="checksum"):
        zarr.open_group(str(generation.path), mode="r")["features"][:]


def test_a_chunk_is_its_values_then_crc32c_padded_to_full_size(
    kit: StoreKit, fast_path: Path
) -> None:
    generation = kit.build(fast_path / "s").generation("train/1")
    data = (generation.path / "features/c/2/0").read_bytes()
    assert len(data) == 16 * 4 * 2 + 4
    assert int.from_bytes(data[-4:], "little") == google_crc32c.value(data[:-4])
    values = np.frombuffer(data[:-4], "<f2").reshape(16, 4)
    assert np.isnan(values[8:]).all()
    status = (generation.path / "status/c/2").read_bytes()
    assert status[8:16] == bytes(8)


def test_the_default_unit_has_256_rows(kit: StoreKit, fast_path: Path) -> None:
    with kit.writer(fast_path / "s") as writer:
        generation = writer.begin(kit.record(), kit.rows(300), dim=4)
        assert [(u.start, u.stop) for u in generation.pending] == [(0, 256), (256, 300)]


@pytest.mark.parametrize(
    ("dtype", "stored"),
    [
        ("float16", np.float16),
        ("bfloat16", np.uint16),
        ("float32", np.float32),
        ("int8", np.int8),
    ],
)
def test_rows_come_back_within_rounding_and_bad_rows_as_nan(
    kit: StoreKit, fast_path: Path, dtype: str, stored: type
) -> None:
    values = kit.features(40)
    with kit.writer(fast_path / "s") as writer:
        generation = writer.begin(kit.record(), kit.rows(40), dim=4, dtype=dtype, unit_rows=16)
        kit.fill(generation, values)
        generation.commit()
    found = open_store(fast_path / "s").generation("train/1")
    assert found.dtype == dtype
    assert found.raw(0).dtype == zarr.open_group(str(found.path))["features"].dtype == stored
    read = found.read(0, 40)
    usable = np.isfinite(values).all(1) & values.any(1)
    assert np.array_equal(found.usable, usable)
    assert found.status[3] == RowStatus.NON_FINITE
    assert found.status[5] == RowStatus.ZERO_NORM
    assert np.isnan(read[~usable]).all()
    largest = np.abs(values[usable]).max(1, keepdims=True)
    assert (np.abs(read[usable] - values[usable]) <= largest * 0.00394).all()  # 1 / 254
    for start, stop in ((0, 0), (7, 21), (16, 32), (39, 40), (40, 40)):
        assert np.array_equal(found.read(start, stop), read[start:stop], equal_nan=True)
    for rows in ([39, 0, 17, 16, 0], [], np.arange(40)[::-1]):
        assert np.array_equal(found.take(rows), read[np.asarray(rows, int)], equal_nan=True)
    for row in (-1, 40):
        with pytest.raises(BadInput, match=f"has rows 0 to 39, not {row} to {row}; ask for rows"):
            found.take([row])


@settings(max_examples=200, deadline=None)
@given(
    hnp.arrays(
        np.float32,
        (3, 5),
        elements=st.floats(-LARGEST, LARGEST, width=32),
    ),
    st.sampled_from(
        [("float16", 2.0**-11), ("bfloat16", 2.0**-8), ("float32", 2.0**-24), ("int8", 0.00394)]
    ),
)
def test_fault_04_encoding_never_overflows_whatever_the_size(
    values: np.ndarray, kind: tuple[str, float]
) -> None:
    usable = values.any(axis=1)
    stored, scale = encode(values, usable, kind[0])
    read = decode(stored, scale, kind[0]).astype(np.float64)
    assert np.isnan(read[~usable]).all()
    largest = np.abs(values[usable].astype(np.float64)).max(axis=1, keepdims=True, initial=0)
    error = np.abs(read[usable] - values[usable])
    assert (error <= largest * kind[1] + 1e-45).all()


def test_a_row_called_ok_that_is_not_gets_its_true_status() -> None:
    features = np.array([[1, 2], [np.inf, 1], [3e38, 1], [0, 0], [np.nan, 0], [1, 1]], np.float32)
    norm = np.array([1, 1, 1, 0, 1, 1], np.float32)
    status = np.array([0, 0, 0, 0, 0, RowStatus.MASKED], np.uint8)
    assert settle_status(row_maxima(features), norm, status).tolist() == [0, 2, 2, 3, 2, 1]


def test_info_has_the_promised_schema(kit: StoreKit, fast_path: Path) -> None:
    store = kit.build(fast_path / "s")
    with kit.writer(fast_path / "s") as writer:
        begun = writer.begin(kit.record("train/2"), kit.rows(40), dim=4, unit_rows=16)
        kit.fill(begun, kit.features(40), units=1)
    info = open_store(fast_path / "s").info()
    assert info["store_uuid"] == store.uuid
    assert info["schema_version"] == 1
    first, second = info["generations"]
    assert first["name"] == "train/1"
    assert (first["role"], first["step"], first["rows"], first["usable_rows"]) == (
        "train",
        1,
        40,
        38,
    )
    assert (first["dim"], first["dtype"], first["committed"]) == (4, "float16", True)
    assert first["projection"]["method"] == "sjlt"
    assert first["bytes"] == 3 * (16 * 4 * 2 + 16 * 4 * 3 + 16 + 16 * 16 + 6 * 4)
    assert first["status"]["non_finite"] == 1
    assert first["duplicate_rows"] == 0
    assert second["committed"] is False
    assert second["rows_done"] == 16


def test_fault_07_equal_rows_are_legitimate_and_counted(kit: StoreKit, fast_path: Path) -> None:
    rows = type(kit.rows(1))(np.zeros((20, 16), np.uint8))
    with kit.writer(fast_path / "s") as writer:
        generation = writer.begin(kit.record(), rows, dim=4, unit_rows=16)
        kit.fill(generation, kit.features(20))
        generation.commit()
        assert writer.store.info()["generations"][0]["duplicate_rows"] == 19


def test_an_unknown_dtype_is_refused_with_all_that_there_are(
    kit: StoreKit, fast_path: Path
) -> None:
    listed = r"'int4'; choose 1bit \| int8 \| bfloat16 \| float16 \| float32$"
    with kit.writer(fast_path / "s") as writer, pytest.raises(BadInput, match=listed):
        writer.begin(kit.record(), kit.rows(4), dim=4, dtype="int4")


def test_wrong_shapes_are_refused_with_both_shapes(kit: StoreKit, fast_path: Path) -> None:
    with kit.writer(fast_path / "s") as writer:
        generation = writer.begin(kit.record(), kit.rows(40), dim=4, unit_rows=16)
        one = np.ones(16, np.float32)
        with pytest.raises(BadInput, match=r"\(16, 4\).*\(16, 5\)"):
            generation.write_unit(0, np.ones((16, 5), np.float32), one, one * 0, one)
        with pytest.raises(BadInput, match="status codes"):
            generation.write_unit(0, np.ones((16, 4), np.float32), one, one * 9, one)
        with pytest.raises(BadInput, match="3 of 3 units are pending"):
            generation.commit()
        with pytest.raises(BadInput, match="not pending"):
            generation.write_unit(3, np.ones((16, 4), np.float32), one, one * 0, one)


def test_generations_of_the_same_rows_hold_them_once(kit: StoreKit, fast_path: Path) -> None:
    kit.build(fast_path / "s", "train/1", "train/2", "target/a/1")
    with kit.writer(fast_path / "s") as writer:
        rows = kit.rows(40)
        other = RowSet(rows.hashes, [("set two", i) for i in range(40)])
        kit.fill(begun := writer.begin(kit.record("train/3"), other, dim=4), kit.features(40))
        begun.commit()
    one, two, target, three = open_store(fast_path / "s").generations()
    assert one.plan.rows is two.plan.rows is target.plan.rows
    assert three.plan.rows is not one.plan.rows
    assert np.array_equal(three.plan.rows.hashes, one.plan.rows.hashes)
    assert three.sources == other.sources != one.sources == kit.rows(40).sources
