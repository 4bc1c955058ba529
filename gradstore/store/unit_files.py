"""One unit on disk: a chunk of every array, and the record that is written last and counts.

A chunk's file is the raw row-major values followed by 4 bytes of little-endian crc32c, which is
what Zarr's codecs [bytes, crc32c] give, so any Zarr v3 reader can read and check it.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping

import numpy as np

from gradstore.errors import DamagedFile, Fault
from gradstore.format.canonical import canonical_json
from gradstore.format.codec import chunk_values
from gradstore.format.layout import CRC_BYTES, RowStatus, generation_path, unit_path
from gradstore.format.plans import Plan, UnitRange
from gradstore.format.unit_records import FileSeal, UnitRecord, crc32c
from gradstore.storage.local import StoreFiles
from gradstore.storage.reading import ReadFiles


def publish_unit(
    files: StoreFiles,
    plan: Plan,
    plan_sha256: str,
    unit: UnitRange,
    values: Mapping[str, np.ndarray],
) -> tuple[UnitRecord, str] | None:
    """Write every chunk of a unit, then its record; each is durable before the next step.

    Args:
        files: the store's files.
        plan: the generation's plan.
        plan_sha256: its seal.
        unit: which unit.
        values: array name -> (rows, ...) values, in the stored dtype.

    Returns:
        The record and its seal, or None when another writer's different chunk already has a name.
    """
    base, seals, folders = generation_path(plan.name), {}, set()
    for spec in plan.arrays:
        chunk = chunk_values(values[spec.name], spec, plan.unit_rows)
        data = chunk.data.cast("B")
        checksum = crc32c(data)
        trailer = checksum.to_bytes(CRC_BYTES, "little")
        sha = hashlib.sha256(data)
        sha.update(trailer)
        path = spec.chunk_path(unit.index)
        seals[path] = FileSeal(data.nbytes + CRC_BYTES, checksum, sha.hexdigest())
        folder = f"{base}/{path}".rpartition("/")[0]
        files.make_directory(folder)
        folders.add(folder)
        staged = files.stage([data, trailer])
        won = files.link(staged, f"{base}/{path}")
        files.remove(staged)
        if not won and _file_fault(files, f"{base}/{path}", seals[path], deep=True):
            return None
    for folder in sorted(folders):
        files.sync_directory(folder)
    counts = Counter(RowStatus(code).name.lower() for code in values["status"].tolist())
    record = UnitRecord(plan.name, unit, plan_sha256, seals, dict(counts))
    document = record.to_dict()
    if not files.publish(unit_path(plan.name, unit.index), canonical_json(document)):
        return None
    return record, document["sha256"]


def read_record(
    files: ReadFiles, plan: Plan, plan_sha256: str, unit: UnitRange, expected: str | None = None
) -> tuple[UnitRecord, str]:
    """Read a unit's record and check it against the plan.

    Args:
        files: the store's files.
        plan: the generation's plan.
        plan_sha256: its seal.
        unit: which unit.
        expected: the seal that the commit names, None before a commit.

    Raises:
        DamagedFile: it is missing, edited, or of another plan or unit.
    """
    path = unit_path(plan.name, unit.index)
    try:
        record, found = UnitRecord.from_bytes(files.read(path))
    except ValueError as error:
        fault = Fault(path, "the bytes that were written", str(error))
        raise DamagedFile(fault, str(files.root)) from error
    sizes = {s.chunk_path(unit.index): s.chunk_bytes(plan.unit_rows) for s in plan.arrays}
    for what, want, have in (
        ("sha256", expected or found, found),
        ("generation", plan.name, record.generation),
        ("plan", plan_sha256, record.plan_sha256),
        ("rows", unit, record.unit),
        ("files", sizes, {name: each.bytes for name, each in record.files.items()}),
        ("row count", unit.stop - unit.start, sum(record.status.values())),
    ):
        if want != have:
            raise DamagedFile(Fault(path, f"{what} {want}", f"{what} {have}"), str(files.root))
    return record, found


def check_unit(files: ReadFiles, record: UnitRecord, *, deep: bool = False) -> list[Fault]:
    """Check size and crc32c of every chunk of a unit, and sha256 too when `deep`."""
    base = generation_path(record.generation)
    faults = (
        _file_fault(files, f"{base}/{name}", each, deep=deep) for name, each in record.files.items()
    )
    return [fault for fault in faults if fault is not None]


def check_chunk(path: str, data: bytes | memoryview, expected: FileSeal) -> Fault | None:
    """Check the bytes of a chunk's file against its trailing crc32c and the recorded one."""
    view = memoryview(data)
    found = crc32c(view[:-CRC_BYTES])
    written = int.from_bytes(view[-CRC_BYTES:], "little")
    if found != expected.crc32c or written != expected.crc32c:
        return Fault(
            path,
            f"crc32c {expected.crc32c:08x}",
            f"crc32c {found:08x} over the values, {written:08x} at the end of the file",
        )
    return None


def _file_fault(files: ReadFiles, path: str, expected: FileSeal, *, deep: bool) -> Fault | None:
    try:
        data = files.read(path, expected_bytes=expected.bytes)
    except DamagedFile as error:
        return error.fault
    fault = check_chunk(path, data, expected)
    if fault is None and deep:
        found = hashlib.sha256(data).hexdigest()
        if found != expected.sha256:
            return Fault(path, f"sha256 {expected.sha256}", f"sha256 {found}")
    return fault
