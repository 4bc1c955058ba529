"""The start of a group of workers: what the first of them does while nobody else writes.

A group is all workers that share a store's lock, from the first that joins until none is left,
whatever their numbers. From here on nobody removes or moves a file of an uncommitted generation, so
nothing half-written may be there.
"""

from __future__ import annotations

import logging
from dataclasses import replace

from gradstore.errors import BadInput, DamagedFile, Fault
from gradstore.format.canonical import canonical_json, parse
from gradstore.format.text_table import TEXTS
from gradstore.storage.leases import Worker, leases_of
from gradstore.storage.local import StoreFiles
from gradstore.store.attempts import ever_committed, readable_plans
from gradstore.store.own_units import OwnUnits, quarantine
from gradstore.store.reader import Store

_log = logging.getLogger(__name__)


def group_mark(files: StoreFiles) -> str:
    """Return the path of the mark of the group that has the lock.

    It is written last, and goes with the rest of staging: the next writer that has the store to
    itself removes it.
    """
    return f"{leases_of(files)}/group"


def begin_group(files: StoreFiles, store: Store, lease_seconds: float) -> None:
    """Quarantine what interrupted writers left half-written, then mark the start of the group.

    Args:
        files: the store's files, under the exclusive lock.
        store: today's view.
        lease_seconds: of the worker that begins it, and so of all that join it.
    """
    plans = readable_plans(files, store)
    for plan, sha in plans.values():
        OwnUnits(files, plan, sha).finished(plan.units)
    kept = store.text_commits()
    for sha in [] if files.late_writes else files.names(TEXTS):
        if sha not in kept:  # of a writer that died before it committed, or retired
            quarantine(files, f"{TEXTS}/{sha}")
    names = sorted({*plans, *ever_committed(store)})
    mark = {"generations": names, "lease_seconds": float(lease_seconds)}
    files.publish(group_mark(files), canonical_json(mark))


def of_group(files: StoreFiles, worker: Worker) -> Worker:
    """Return a worker with the lease of the group that it has joined.

    One with a shorter lease would take over tasks of workers that live; so all have the first's.
    """
    try:
        seconds = parse(files.read(group_mark(files))).get("lease_seconds", worker.lease_seconds)
        joined = replace(worker, lease_seconds=seconds)
    except (ValueError, BadInput):  # told of where the mark is read for its generations
        return worker
    if joined != worker:
        _log.warning(
            "worker %s has a lease of %g s, and those that are at work on store \"%s\" of %g s: it "
            "takes theirs. Give all of them the same --lease-seconds",
            worker, worker.lease_seconds, files.root, seconds,
        )  # fmt: skip
    return joined


def generations_before(files: StoreFiles) -> frozenset[str]:
    """Return the full names of the generations planned or committed before the group began.

    Raises:
        DamagedFile: the mark is not as it was written.
    """
    mark = group_mark(files)
    try:
        return frozenset(map(str, parse(files.read(mark))["generations"]))
    except (ValueError, KeyError, TypeError) as error:
        fault = Fault(mark, "the mark of a group", str(error))
        raise DamagedFile(fault, str(files.root)) from error
