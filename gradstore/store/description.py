"""Descriptions of generations, as `gradstore info --json` gives them."""

from __future__ import annotations

from gradstore.errors import BadInput, DamagedData
from gradstore.format.canonical import Json
from gradstore.format.layout import RowStatus, plan_path
from gradstore.format.plans import Plan
from gradstore.storage.reading import ReadFiles
from gradstore.store.generation import Generation
from gradstore.store.unit_files import read_record


def describe(generation: Generation) -> dict[str, Json]:
    """Describe a committed generation."""
    entry = _entry(generation.plan, generation.status_counts(), generation.bytes, committed=True)
    return entry | {"commit": generation.commit_sha}


def describe_planned(files: ReadFiles, name: str) -> dict[str, Json] | None:
    """Describe the finished part of an uncommitted generation; None without a plan."""
    try:
        plan, sha = Plan.from_bytes(files.read(plan_path(name)))
    except (ValueError, BadInput, DamagedData):
        return None
    done = []
    for unit in plan.units:
        try:
            done.append(read_record(files, plan, sha, unit)[0])
        except DamagedData:
            continue
    counts = {status.name.lower(): 0 for status in RowStatus}
    for record in done:
        for status, count in record.status.items():
            counts[status] = counts.get(status, 0) + count
    rows = sum(record.unit.stop - record.unit.start for record in done)
    size = sum(record.chunk_bytes for record in done)
    return _entry(plan, counts, size, committed=False) | {"rows_done": rows}


def _entry(plan: Plan, counts: dict[str, int], size: int, *, committed: bool) -> dict[str, Json]:
    return {
        "name": plan.name,
        "role": plan.record.role,
        "set": plan.record.set,
        "step": plan.record.step,
        "space": plan.space,
        "rows": len(plan.rows),
        "usable_rows": counts["ok"],
        "dim": plan.dim,
        "dtype": plan.dtype,
        "feature": plan.record.feature,
        "projection": dict(plan.record.projection),
        "committed": committed,
        "bytes": size,
        "status": counts,
        "duplicate_rows": plan.rows.duplicates,
    }
