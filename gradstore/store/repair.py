"""Repair of a store: bytes go back only where they are the committed ones.

A commit names the seal of every unit's record, and a record the sha256 of every chunk; so a unit is
repaired to the committed one, whoever computed it, or not at all.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from gradstore.errors import BadInput, DamagedData, DamagedFile, Fault
from gradstore.format.canonical import canonical_json, unseal_head
from gradstore.format.commits import Commit
from gradstore.format.layout import (
    COMMITS,
    FORGOTTEN,
    FORGOTTEN_VERSION,
    GENERATIONS,
    METADATA,
    NEEDS,
    PLANS,
    TEXTS_VERSION,
    generation_path,
    group_json,
    plan_path,
    root_json,
    unit_path,
)
from gradstore.format.paths import file_at
from gradstore.format.plans import Plan, UnitRange
from gradstore.format.unit_records import FileSeal
from gradstore.storage.local import StoreFiles, parent_of
from gradstore.storage.location import Place
from gradstore.storage.places import files_at, lock_of
from gradstore.storage.unseen import check_unseen
from gradstore.store.cleaning import remove_retired, retire
from gradstore.store.damage import Damage, assess, of_file, of_loose_plan, plan_of
from gradstore.store.documents import metadata
from gradstore.store.held import held_store
from gradstore.store.own_units import quarantine, quarantine_plan
from gradstore.store.reader import Store
from gradstore.store.rewriting import next_attempt
from gradstore.store.unit_files import (
    chunk_file,
    file_fault,
    lost_record,
    read_record,
    read_values,
    row_hash_file,
)

_log = logging.getLogger(__name__)


#: Makes whole what needs the run's configuration; gives what it could not do, a line each.
Recompute = Callable[[StoreFiles, Callable[[], Store], Sequence[Damage]], list[str]]


@dataclass(frozen=True)
class Repaired:
    """Result of a repair.

    Attributes:
        found: everything that was damaged.
        left: what is damaged still.
        notes: why some of it could not be made whole, a line each.
    """

    found: tuple[Damage, ...]
    left: tuple[Damage, ...]
    notes: tuple[str, ...] = ()


def repair_store(path: Place, recompute: Recompute | None = None) -> Repaired:
    """Verify a store and make whole what can be; nothing committed changes.

    Args:
        path: where the store is.
        recompute: for what the store's own files do not suffice.

    Raises:
        BadInput: there is no store.
        ProvenanceMismatch: its schema is newer, or what is recomputed is not of this store.
        StoreBusy: another process writes to it.
    """
    found = assess(path)
    if not found:
        return Repaired((), ())
    files = files_at(path)
    roots, aside = [damage for damage in found if damage.what == "root"], list[Damage]()
    if roots:  # nothing else was seen without it
        with lock_of(files):
            check_unseen(files)
            aside = _set_aside(files)
            if not mend(files, roots) and (unseen := _without_root(files, roots)):
                return Repaired(unseen, unseen)
        found = [*roots, *aside, *assess(path)]
    notes: list[str] = []
    with held_store(path, files) as (_, view):
        mend(files, [damage for damage in found if damage not in aside])
        left = assess(path)
        wanting = [damage for damage in left if damage.remedy == "config"]
        if recompute is not None and wanting:
            notes = recompute(files, view, wanting)
            left = assess(path)
    return Repaired(tuple(found), tuple(left), tuple(notes))


def mend(files: StoreFiles, damages: Sequence[Damage]) -> list[Damage]:
    """Make whole what the store's own files suffice for; under the writer's lock.

    Args:
        files: the store's files.
        damages: from `assess`.

    Returns:
        Those that are whole now.
    """
    mended = []
    for damage in sorted(damages, key=lambda each: each.what != "root"):
        try:
            if damage.remedy == "store" and _mend(files, damage):
                mended.append(damage)
        except DamagedData as error:  # another damage, which is told of by itself, is in the way
            _log.warning("%s stays as it is: %s", damage.faults[0].file, error)
    return mended


def _mend(files: StoreFiles, damage: Damage) -> bool:
    path = damage.faults[0].file
    if damage.what == "index":
        files.remove_tree(path)
    elif damage.what == "stray":
        quarantine(files, path)
    elif damage.what == "root":
        files.replace(METADATA, _root(files), files.read_if_there(METADATA))
    elif damage.what == "metadata":
        expected = dict(_metadata(files))
        files.make_directory(parent_of(path))
        files.replace(path, expected[path], files.read_if_there(path))
    else:
        assert damage.unit is not None
        plan, commit = plan_of(files, Store(files), damage.generation)
        return not put_back(files, plan, commit, damage.unit, {})
    return True


def _root(files: StoreFiles) -> bytes:
    """Build the root's zarr.json of what commits and plans say.

    Raises:
        DamagedFile: one of them is damaged, too.
    """
    uuids, version, faults = _told_of_root(files)
    if faults:
        raise DamagedFile(faults[0], str(files.root))
    return root_json(uuids[0], version)


def _told_of_root(files: StoreFiles) -> tuple[list[str], int, list[Fault]]:
    """Read every commit and plan: the store's id and schema as they say, and what is damaged."""
    uuids, versions, faults = [], [1], []
    versions += [FORGOTTEN_VERSION for _ in files.names(FORGOTTEN)]
    for path in [*(f"{COMMITS}/{name}" for name in files.names(COMMITS)), *files.walk(PLANS)]:
        try:
            if path.startswith(f"{COMMITS}/"):
                commit = Commit.from_bytes(files.read(path))
                uuids.append(commit.store_uuid)
                versions += [TEXTS_VERSION] if commit.texts else []
            else:
                versions.append(Plan.from_bytes(files.read(path))[0].schema_version)
        except DamagedFile as error:
            faults.append(error.fault)
        except (ValueError, BadInput) as error:
            faults.append(Fault(path, "the bytes that were written", str(error)))
    return uuids, max(versions), faults


def _set_aside(files: StoreFiles) -> list[Damage]:
    """Set aside the damaged plans that alone keep a root from being written again.

    Where every commit can be read, and none names the generation, there is nothing to lose: whoever
    begins it plans it anew, as if the root were there. A plan too large to be read may be sound,
    and so may a later release's.
    """
    uuids, _, faults = _told_of_root(files)
    if not uuids or any(fault.file.startswith(f"{COMMITS}/") for fault in faults):
        return []
    commits = (Commit.from_bytes(files.read(f"{COMMITS}/{name}")) for name in files.names(COMMITS))
    named = {plan_path(name) for commit in commits for name in commit.generations}
    loose = [fault for fault in faults if fault.file not in named and _is_plan(files, fault.file)]
    if len(loose) < len(faults):
        return []
    for fault in loose:
        _log.warning("%s was never committed: it is set aside, to be planned again", fault)
        quarantine_plan(files, fault.file.removeprefix(f"{PLANS}/").removesuffix(".json"))
    return [of_loose_plan(fault) for fault in loose]


def _is_plan(files: StoreFiles, path: str) -> bool:
    """Tell whether a file is called as a plan, small enough for one, and of no later release."""
    try:
        data = files.read(path)
        if file_at(path).kind != "plan":
            return False
        version = unseal_head(data, "units")[0].get("schema_version")
        return type(version) is not int or version <= max(NEEDS)
    except (DamagedFile, BadInput):
        return False
    except ValueError:  # not as anybody sealed it
        return True


def _without_root(files: StoreFiles, roots: Sequence[Damage]) -> tuple[Damage, ...]:
    """Tell of a root that can't be written again, and of the documents that are in its way."""
    faults = _told_of_root(files)[2]
    says = "written again once the documents named here are back; nothing else was seen without it"
    stay = [replace(root, remedy="none", says=says) for root in roots if faults]
    return (*stay, *(of_file(files, fault) for fault in faults))


def _metadata(files: StoreFiles) -> Iterator[tuple[str, bytes]]:
    """Give path and bytes of every zarr.json but the root's."""
    yield f"{GENERATIONS}/{METADATA}", group_json()
    store = Store(files)
    for commit in store.live_commits(superseded=True):
        try:
            yield from metadata(plan_of(files, store, commit.generation)[0]).items()
        except DamagedData:
            continue  # a plan that is lost is told of by itself


def put_back(
    files: StoreFiles,
    plan: Plan,
    commit: Commit,
    unit: UnitRange,
    values: Mapping[str, np.ndarray],
) -> list[str]:
    """Restore the damaged files of a committed unit, if they come out as the committed ones.

    Each file is replaced by one rename, the record last: after a crash the same call goes on.

    Args:
        files: the store's files, under the writer's lock.
        plan: the generation's plan.
        commit: the commit that names the unit.
        unit: which unit.
        values: array name -> (k, ...) stored values computed anew; what is missing is taken from
            the disk where it is sound. Row hashes are always the plan's.

    Returns:
        The files that would differ from the committed ones; nothing was changed if there are any.
    """
    base = generation_path(plan.name)
    fresh = {
        spec.chunk_path(unit.index): chunk_file(values[spec.name], spec, plan.unit_rows)
        for spec in plan.arrays
        if spec.name in values
    } | row_hash_file(plan, unit)
    expected = commit.units[unit.index]
    try:
        record = read_record(files, plan, commit.plan_sha256, unit, expected)[0]
    except DamagedFile:
        found = lost_record(files, plan, commit, unit, fresh)
        if found is None:
            return [unit_path(plan.name, unit.index)]
        record = found
    left = {
        path: seal
        for path, seal in record.files.items()
        if file_fault(files, f"{base}/{path}", seal, deep=True) is not None
    }
    others = [path for path, seal in left.items() if not _fits(fresh.get(path), seal)]
    if others:
        return [f"{base}/{path}" for path in others]
    for path in left:
        _restore(files, f"{base}/{path}", fresh[path])
    _restore(files, unit_path(plan.name, unit.index), canonical_json(record.to_dict()))
    return []


def _fits(data: bytes | None, seal: FileSeal) -> bool:
    return data is not None and hashlib.sha256(data).hexdigest() == seal.sha256


def _restore(files: StoreFiles, path: str, data: bytes) -> None:
    if files.kind(path) not in ("file", "nothing"):
        quarantine(files, path)
    found = files.read_if_there(path)
    if found == data:
        return
    files.make_directory(parent_of(path))
    files.replace(path, data, found)
    _log.info("%s is as it was committed", path)


def supersede(
    files: StoreFiles,
    view: Callable[[], Store],
    generation: str,
    values: Mapping[int, Mapping[str, np.ndarray]],
) -> str:
    """Commit a further attempt of a generation with some units' values new; the old one goes.

    As a resume from another state does: committed bytes never change, a new commit supersedes them.

    Args:
        files: the store's files, under the writer's lock.
        view: gives the store as it is now.
        generation: full name of the damaged generation.
        values: number of each damaged unit -> array name -> (k, ...) stored values.

    Returns:
        Full name of the new attempt.
    """
    plan, commit = plan_of(files, view(), generation)
    writer = next_attempt(files, view, plan)
    for unit in list(writer.pending):
        new = values.get(unit.index)
        if new is None:
            record = read_record(files, plan, commit.plan_sha256, unit, commit.units[unit.index])[0]
            new = read_values(files, plan, record)
        writer.copy_unit(unit.index, new)
    writer.commit()
    retire(files, view, [generation])
    remove_retired(files, view())
    return writer.name
