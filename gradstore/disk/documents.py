"""The documents of a committed generation, each checked against the commit before it counts."""

from __future__ import annotations

from gradstore.disk.canonical import Json
from gradstore.disk.commits import Commit
from gradstore.disk.damage import DamagedFile, Fault
from gradstore.disk.plans import Plan
from gradstore.disk.reading import ReadFiles
from gradstore.errors import BadInput
from gradstore.layout import (
    METADATA,
    array_json,
    generation_path,
    group_json,
    group_paths,
    plan_path,
    provenance_path,
)
from gradstore.provenance import read_provenance


def metadata(plan: Plan) -> dict[str, bytes]:
    """Gives path -> bytes of every zarr.json that a generation needs, outermost first."""
    documents = {f"{path}/{METADATA}": group_json() for path in group_paths(plan.name)}
    base = generation_path(plan.name)
    for spec in plan.arrays:
        documents[f"{base}/{spec.name}/{METADATA}"] = array_json(
            spec, len(plan.rows), plan.unit_rows
        )
    return documents


def check_metadata(files: ReadFiles, path: str, expected: bytes) -> None:
    """Compares a zarr.json with what layout would write; DamagedFile if a byte differs."""
    found = files.read(path, expected_bytes=len(expected))
    if found != expected:
        raise DamagedFile(Fault(path, repr(expected)[1:], repr(found)[1:]), str(files.root))


def read_committed_plan(files: ReadFiles, commit: Commit) -> Plan:
    """Reads the plan that a commit names; DamagedFile if it is not that one."""
    path = plan_path(commit.generation)
    try:
        plan, found = Plan.from_bytes(files.read(path))
    except (ValueError, BadInput) as error:
        fault = Fault(path, "the plan that was committed", str(error))
        raise DamagedFile(fault, str(files.root)) from error
    for what, want, have in (
        ("sha256", commit.plan_sha256, found),
        ("generation", commit.generation, plan.name),
        ("number of units", len(commit.units), len(plan.units)),
    ):
        if want != have:
            raise DamagedFile(Fault(path, f"{what} {want}", f"{what} {have}"), str(files.root))
    return plan


def read_space(files: ReadFiles, plan: Plan) -> dict[str, Json]:
    """Reads the provenance that a plan names; DamagedFile if it is not that one."""
    path = provenance_path(plan.space)
    try:
        provenance, found = read_provenance(files.read(path), plan.space)
    except (ValueError, BadInput) as error:
        fault = Fault(path, "the provenance that was committed", str(error))
        raise DamagedFile(fault, str(files.root)) from error
    if found != plan.provenance_sha256:
        fault = Fault(path, f"sha256 {plan.provenance_sha256}", f"sha256 {found}")
        raise DamagedFile(fault, str(files.root))
    return provenance
