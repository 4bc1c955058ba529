"""One unit on disk: a chunk of every array, and the record that is written last and counts.

A chunk's file is the raw row-major values followed by 4 bytes of little-endian crc32c, which is
what Zarr's codecs [bytes, crc32c] give, so any Zarr v3 reader can read and check it.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from gradstore.errors import DamagedFile, Fault, StoreIOError
from gradstore.format.canonical import canonical_json
from gradstore.format.codec import chunk_values
from gradstore.format.commits import Commit
from gradstore.format.layout import (
    CRC_BYTES,
    ArraySpec,
    RowStatus,
    generation_path,
    unit_path,
)
from gradstore.format.plans import Plan, UnitRange
from gradstore.format.unit_records import FileSeal, UnitRecord, crc32c
from gradstore.storage.local import StoreFiles, parent_of
from gradstore.storage.reading import ReadFiles


@dataclass(frozen=True)
class StagedUnit:
    """A unit whose chunks are durable in staging, and have no names yet.

    Attributes:
        record: what each chunk must be.
        staged: chunk path within the generation -> path in staging.
    """

    record: UnitRecord
    staged: Mapping[str, str]


def stage_unit(
    files: StoreFiles,
    plan: Plan,
    plan_sha256: str,
    unit: UnitRange,
    values: Mapping[str, np.ndarray],
) -> StagedUnit:
    """Write every chunk of a unit to staging; where that fails nothing of it is left there.

    Args:
        files: the store's files.
        plan: the generation's plan.
        plan_sha256: its seal.
        unit: which unit.
        values: array name -> (rows, ...) values, in the stored dtype.
    """
    seals: dict[str, FileSeal] = {}
    contents: list[tuple[memoryview, bytes]] = []
    for spec in plan.arrays:
        data = chunk_values(values[spec.name], spec, plan.unit_rows).data.cast("B")
        checksum = crc32c(data)
        trailer = checksum.to_bytes(CRC_BYTES, "little")
        sha = hashlib.sha256(data)
        sha.update(trailer)
        contents.append((data, trailer))
        seals[spec.chunk_path(unit.index)] = FileSeal(
            data.nbytes + CRC_BYTES, checksum, sha.hexdigest()
        )
    counts = status_counts(values["status"].tolist())
    staged = dict(zip(seals, files.stage_all(contents), strict=True))
    return StagedUnit(UnitRecord(plan.name, unit, plan_sha256, seals, counts), staged)


def status_counts(codes: list[int]) -> dict[str, int]:
    """Count rows by the name of their status; ValueError where there is no such status."""
    return {RowStatus(code).name.lower(): count for code, count in Counter(codes).items()}


def publish_anew(files: StoreFiles, path: str, data: bytes) -> bool:
    """Publish a document that nothing committed names, over one that a dead writer's came late as.

    Returns:
        Whether the name holds `data` now; False where others' bytes do not come late.
    """
    if files.publish(path, data):
        return True
    staged = files.stage([data])
    try:
        return files.supplant(staged, path)
    finally:
        files.discard([staged])


def name_unit(files: StoreFiles, staged: StagedUnit) -> tuple[UnitRecord, str] | None:
    """Give a unit's chunks their names, then write its record; each durable before the next step.

    Repeated, by another process too, it does what is left to do. Where a dead writer's files may
    come late, a unit that is whole stands as it is, and parts of one are replaced.

    Returns:
        The record and its seal, or None when other chunks, or another record, have the names.
    """
    record = staged.record
    base = generation_path(record.generation)
    folders = {parent_of(f"{base}/{path}") for path in staged.staged}
    named = files.at_once(
        lambda path: _name_chunk(files, staged.staged[path], f"{base}/{path}", record.files[path]),
        staged.staged,
    )
    others = [path for path, fits in zip(staged.staged, list(named), strict=True) if not fits]
    if others:
        whole = _late_unit(files, record)
        if whole is not None:
            return whole
        if not all(files.supplant(staged.staged[path], f"{base}/{path}") for path in others):
            return None
    for folder in sorted(folders):
        files.sync_directory(folder)
    document = record.to_dict()
    path = unit_path(record.generation, record.unit.index)
    data = canonical_json(document)
    if not publish_anew(files, path, data):
        return None
    return record, document["sha256"]


def _late_unit(files: StoreFiles, expected: UnitRecord) -> tuple[UnitRecord, str] | None:
    """Return the record that a dead writer's came late as, if all its chunks are there."""
    path = unit_path(expected.generation, expected.unit.index)
    data = files.read_if_there(path) if files.late_writes else None
    try:
        found, sha = UnitRecord.from_bytes(data or b"")
    except ValueError:
        return None
    same = (found.generation, found.unit, found.plan_sha256, found.files.keys()) == (
        expected.generation, expected.unit, expected.plan_sha256, expected.files.keys(),
    )  # fmt: skip
    return (found, sha) if same and not check_unit(files, found, deep=True) else None


def _name_chunk(files: StoreFiles, source: str, path: str, expected: FileSeal) -> bool:
    """Link a chunk; True also where it is linked already, though its staged file may be gone."""
    files.make_directory(parent_of(path))
    try:
        if files.link(source, path):
            return True
    except StoreIOError as error:
        if not isinstance(error.__cause__, FileNotFoundError):
            raise
    return file_fault(files, path, expected, deep=True) is None


def chunk_file(values: np.ndarray, spec: ArraySpec, unit_rows: int) -> bytes:
    """Build a chunk's file: padded values (rows, ...) and their crc32c."""
    data = chunk_values(values, spec, unit_rows).tobytes()
    return data + crc32c(data).to_bytes(CRC_BYTES, "little")


def sealed_record(
    plan: Plan, plan_sha256: str, unit: UnitRange, chunks: Mapping[str, bytes]
) -> tuple[UnitRecord, str]:
    """Make the record of a unit's files, and its seal.

    Args:
        plan: the generation's plan.
        plan_sha256: its seal.
        unit: which unit.
        chunks: path of each chunk, in the order of the plan's arrays -> the bytes of its file.
    """
    seals = {
        path: FileSeal(len(data), crc32c(data[:-CRC_BYTES]), hashlib.sha256(data).hexdigest())
        for path, data in chunks.items()
    }
    status = next(spec for spec in plan.arrays if spec.name == "status")
    codes = list(chunks[status.chunk_path(unit.index)][: unit.stop - unit.start])
    record = UnitRecord(plan.name, unit, plan_sha256, seals, status_counts(codes))
    return record, record.to_dict()["sha256"]


def lost_record(
    files: ReadFiles, plan: Plan, commit: Commit, unit: UnitRange, fresh: Mapping[str, bytes]
) -> UnitRecord | None:
    """Make the lost record of a committed unit of its files.

    Args:
        files: the store's files.
        plan: the generation's plan.
        commit: the commit that names the unit.
        unit: which unit.
        fresh: path of a chunk -> bytes made anew, for chunks that the disk may not have.

    Returns:
        The committed record; None if neither the files on disk nor the fresh ones make it.
    """
    sizes = {s.chunk_path(unit.index): s.chunk_bytes(plan.unit_rows) for s in plan.arrays}
    on_disk: dict[str, bytes] = {}
    for path, size in sizes.items():
        try:
            data = files.read(f"{generation_path(plan.name)}/{path}", expected_bytes=size)
        except DamagedFile:
            continue
        if crc32c(data[:-CRC_BYTES]) == int.from_bytes(data[-CRC_BYTES:], "little"):
            on_disk[path] = data
    for chunks in ({**fresh, **on_disk}, {**on_disk, **fresh}):
        if chunks.keys() != sizes.keys():
            continue
        try:
            record, sha = sealed_record(plan, commit.plan_sha256, unit, chunks)
        except ValueError:  # a status that there is not
            continue
        if sha == commit.units[unit.index]:
            return record
    return None


def row_hash_file(plan: Plan, unit: UnitRange) -> dict[str, bytes]:
    """Map the path of a unit's chunk of row hashes to its bytes, which follow from the plan."""
    spec = next(spec for spec in plan.arrays if spec.name == "row_hash")
    hashes = plan.rows.hashes[unit.start : unit.stop]
    return {spec.chunk_path(unit.index): chunk_file(hashes, spec, plan.unit_rows)}


def read_values(files: ReadFiles, plan: Plan, record: UnitRecord) -> dict[str, np.ndarray]:
    """Read the stored values of a unit, each file compared with its sha256 first.

    Returns:
        Array name -> (rows of the unit, ...) in the stored dtype, to be changed at will.

    Raises:
        DamagedFile: a file is not as it was recorded.
    """
    values = {}
    for spec in plan.arrays:
        name = spec.chunk_path(record.unit.index)
        path = f"{generation_path(plan.name)}/{name}"
        fault = file_fault(files, path, record.files[name], deep=True)
        if fault is not None:
            raise DamagedFile(fault, str(files.root))
        data = files.read(path, expected_bytes=record.files[name].bytes)
        little = np.dtype(spec.dtype).newbyteorder("<")
        chunk = np.frombuffer(data[:-CRC_BYTES], little).reshape(spec.chunk_shape(plan.unit_rows))
        values[spec.name] = chunk[: record.unit.stop - record.unit.start].copy()
    return values


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
    path, arrays = unit_path(plan.name, unit.index), zip(plan.arrays, plan.chunk_sizes, strict=True)
    try:
        record, found = UnitRecord.from_bytes(files.read(path))
    except ValueError as error:
        fault = Fault(path, "the bytes that were written", str(error))
        raise DamagedFile(fault, str(files.root)) from error
    sizes = {spec.chunk_path(unit.index): size for spec, size in arrays}
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
    faults = files.at_once(
        lambda name: file_fault(files, f"{base}/{name}", record.files[name], deep=deep),
        record.files,
    )
    return [fault for fault in faults if fault is not None]


def check_chunk(path: str, data: bytes | memoryview, expected: int) -> Fault | None:
    """Check the bytes of a chunk's file against its trailing crc32c and the recorded one."""
    view = memoryview(data)
    found = crc32c(view[:-CRC_BYTES])
    written = int.from_bytes(view[-CRC_BYTES:], "little")
    if found != expected or written != expected:
        return Fault(
            path,
            f"crc32c {expected:08x}",
            f"crc32c {found:08x} over the values, {written:08x} at the end of the file",
        )
    return None


def file_fault(files: ReadFiles, path: str, expected: FileSeal, *, deep: bool) -> Fault | None:
    """Compare a chunk's file with its seal: size, crc32c and, when `deep`, sha256."""
    try:
        data = files.read(path, expected_bytes=expected.bytes)
    except DamagedFile as error:
        return error.fault
    fault = check_chunk(path, data, expected.crc32c)
    if fault is None and deep:
        found = hashlib.sha256(data).hexdigest()
        if found != expected.sha256:
            return Fault(path, f"sha256 {expected.sha256}", f"sha256 {found}")
    return fault
