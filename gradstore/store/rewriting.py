"""A further attempt of a generation that was planned before, with other rows or values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from gradstore.errors import DamagedData
from gradstore.format.layout import plan_path
from gradstore.format.names import GenerationName
from gradstore.format.plans import Plan
from gradstore.storage.local import StoreFiles
from gradstore.store.attempts import ever_committed
from gradstore.store.generation_writer import GenerationWriter
from gradstore.store.reader import Store
from gradstore.store.space_writer import publish_plan


def next_attempt(files: StoreFiles, view: Callable[[], Store], plan: Plan) -> GenerationWriter:
    """Plan the next attempt of a generation; take it up where a process died while writing it.

    Args:
        files: the store's files, under the writer's lock.
        view: gives the store as it is now.
        plan: what is to be written, under the name of any attempt.

    Returns:
        Writer of the attempt, with the units that are not done yet pending.
    """
    store = view()
    base = GenerationName.parse(plan.name).base()
    planned = store.planned()
    committed = ever_committed(store)
    used = [
        n.attempt for n in map(GenerationName.parse, [*planned, *committed]) if n.base() == base
    ]
    attempt = max(used)
    while files.has(plan_path(str(base.with_attempt(attempt + 1)))):  # a listing may lag behind
        attempt += 1
    newest = replace(plan, name=str(base.with_attempt(attempt)))
    if newest.name in committed or not _is_planned(files, newest):
        newest = replace(plan, name=str(base.with_attempt(attempt + 1)))
    publish_plan(files, store, newest)
    return GenerationWriter(files, newest, newest.sha256, view)


def _is_planned(files: StoreFiles, plan: Plan) -> bool:
    """Return whether this very plan lies there."""
    try:
        return files.read(plan_path(plan.name)) == plan.to_bytes()
    except DamagedData:
        return False
