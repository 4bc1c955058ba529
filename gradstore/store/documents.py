"""The documents of a committed generation, each checked against the commit before it counts."""

from __future__ import annotations

import re

from gradstore.errors import BadInput, DamagedFile, Fault
from gradstore.format.canonical import Json
from gradstore.format.commits import Commit
from gradstore.format.forgotten import Receipt, Request
from gradstore.format.layout import (
    COMMITS,
    FORGOTTEN,
    METADATA,
    array_json,
    commit_path,
    generation_path,
    group_json,
    group_paths,
    plan_path,
    provenance_path,
    receipt_path,
    request_path,
    unit_path,
)
from gradstore.format.plans import Plan, seal_of_plan
from gradstore.format.provenance import read_provenance
from gradstore.storage.reading import ReadFiles

#: Names in the folder of what was removed on request, and in that of commits.
_REQUEST_NAME = re.compile(r"[1-9][0-9]{0,8}\.request\.json")
_COMMIT_NAME = re.compile(r"([1-9][0-9]{0,17})\.json")


def metadata(plan: Plan) -> dict[str, bytes]:
    """Map path -> bytes for every zarr.json that a generation needs, outermost first."""
    documents = {f"{path}/{METADATA}": group_json() for path in group_paths(plan.name)}
    base = generation_path(plan.name)
    for spec in plan.arrays:
        documents[f"{base}/{spec.name}/{METADATA}"] = array_json(
            spec, len(plan.rows), plan.unit_rows
        )
    return documents


def files_of(plan: Plan) -> list[str]:
    """List every file in a generation's folder."""
    own = f"{generation_path(plan.name)}/"
    found = [path for path in metadata(plan) if path.startswith(own)]
    for unit in plan.units:
        found += [own + spec.chunk_path(unit.index) for spec in plan.arrays]
        found.append(unit_path(plan.name, unit.index))
    return found


def check_metadata(files: ReadFiles, path: str, expected: bytes) -> None:
    """Compare a zarr.json with the bytes layout would write; DamagedFile if a byte differs."""
    found = files.read(path, expected_bytes=len(expected))
    if found != expected:
        raise DamagedFile(Fault(path, repr(expected)[1:], repr(found)[1:]), str(files.root))


def read_committed_plan(files: ReadFiles, commit: Commit) -> Plan:
    """Read the plan that a commit names; DamagedFile if it is a different one."""
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


def check_committed_plan(files: ReadFiles, commit: Commit) -> None:
    """Check that the plan that a commit names is there, without its rows; else DamagedFile."""
    path = plan_path(commit.generation)
    try:
        found = seal_of_plan(files.read(path))
    except ValueError as error:
        fault = Fault(path, "the plan that was committed", str(error))
        raise DamagedFile(fault, str(files.root)) from error
    if found != commit.plan_sha256:
        fault = Fault(path, f"sha256 {commit.plan_sha256}", f"sha256 {found}")
        raise DamagedFile(fault, str(files.root))


def check_beside_plan(files: ReadFiles, plan: Plan) -> dict[str, Json]:
    """Check every zarr.json of a generation and its space's provenance, which is returned."""
    provenance = read_space(files, plan)
    for _ in files.at_once(lambda each: check_metadata(files, *each), metadata(plan).items()):
        pass
    return provenance


def read_space(files: ReadFiles, plan: Plan) -> dict[str, Json]:
    """Read the provenance that a plan names; DamagedFile if it is a different one."""
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


def read_chain(files: ReadFiles, store_uuid: str, known: tuple[Commit, ...] = ()) -> list[Commit]:
    """Read all commits, oldest first, and check the chain.

    Args:
        files: the store's files.
        store_uuid: what every commit must name.
        known: commits checked before by this process; they are not read again.

    Raises:
        DamagedFile: a commit is missing, edited, or of another store ("chain broken at N").
    """
    listed = 0
    for name in files.names(COMMITS):
        match = _COMMIT_NAME.fullmatch(name)
        if match is None:
            fault = Fault(f"{COMMITS}/{name}", "only <N>.json files here", "another name")
            raise DamagedFile(fault, str(files.root))
        listed = max(listed, int(match[1]))
    chain = list(known)
    paths = map(commit_path, range(len(chain) + 1, listed + 1))
    there = files.at_once(files.read_if_there, paths)
    while True:  # a listing may lag behind the commits, so the next one is asked for by its name
        number = len(chain) + 1
        path = commit_path(number)
        data = next(there) if number <= listed else files.read_if_there(path)
        if data is None and number > listed:
            return chain
        if data is None:
            raise _broken(files, path, number, "a commit", "no file")
        chain.append(_read_one(files, path, data, store_uuid, chain))


def read_requests(files: ReadFiles, store_uuid: str) -> list[tuple[Request, Receipt | None]]:
    """Read what was asked to be removed, in order, each with its receipt if it is complete.

    Raises:
        DamagedFile: a document is not as it was written, or of another store.
    """
    found: list[tuple[Request, Receipt | None]] = []
    numbers = (int(n.split(".")[0]) for n in files.names(FORGOTTEN) if _REQUEST_NAME.fullmatch(n))
    listed = max(numbers, default=0)
    while True:  # as of commits, no listing says which is the last
        number = len(found) + 1
        path = request_path(number)
        receipt: Receipt | None = None
        data = files.read_if_there(path)
        if data is None and number > listed:
            return found
        try:
            if data is None:
                raise ValueError("no file")
            request = Request.from_bytes(data)
            seals = [(request.number, number), (request.store_uuid, store_uuid)]
            told = files.read_if_there(receipt_path(number))
            if told is not None:
                path = receipt_path(number)
                receipt = Receipt.from_bytes(told)
                seals.append((receipt.request_sha256, request.to_dict()["sha256"]))
        except ValueError as error:
            fault = Fault(path, "the bytes that were written", str(error))
            raise DamagedFile(fault, str(files.root)) from error
        for have, want in seals:
            if have != want:
                raise DamagedFile(Fault(path, str(want), str(have)), str(files.root))
        found.append((request, receipt))


def _read_one(
    files: ReadFiles, path: str, data: bytes, store_uuid: str, chain: list[Commit]
) -> Commit:
    number = len(chain) + 1
    try:
        commit = Commit.from_bytes(data)
    except ValueError as error:
        raise _broken(files, path, number, "the bytes that were committed", str(error)) from error
    parent = chain[-1].sha256 if chain else None
    for name, expected, found in (
        ("number", number, commit.number),
        ("store", store_uuid, commit.store_uuid),
        ("parent", parent, commit.parent),
    ):
        if expected != found:
            raise _broken(files, path, number, f"{name} {expected}", f"{name} {found}")
    return commit


def _broken(files: ReadFiles, path: str, number: int, expected: str, found: str) -> DamagedFile:
    fault = Fault(path, expected, f"{found} (chain broken at {number})")
    return DamagedFile(fault, str(files.root))
