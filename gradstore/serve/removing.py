"""Files that a removal must leave, since something committed needs them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from gradstore.errors import BadInput
from gradstore.format.layout import CURVATURE, INDEX
from gradstore.format.paths import StorePath, file_at
from gradstore.storage.local import STAGING
from gradstore.store.reader import Store


def needed(store: Store | None, paths: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Yield each path that may not be removed, and what needs it.

    A folder's name, and any other that no file of a store has, is none of them: nothing is there.

    Args:
        store: as it is now; None while there is none, and nothing committed.
        paths: relative to the store, each of its names checked.

    Raises:
        DamagedData: a committed plan can't be read, so that what it needs is not known.
    """
    if store is None or not store.commits:
        return
    live = {commit.generation for commit in store.live_commits(superseded=True)}
    texts, factors = store.text_commits().keys(), None
    for path in paths:
        where = _file_at(path)
        if where is None:
            continue
        if where.kind in ("root", "group", "space", "commit", "request", "receipt"):
            yield path, "the store itself"
        elif where.kind == "text":
            if where.name in texts:
                yield path, "rows whose text is kept"
        elif where.kind == "factors":
            factors = _factors(store) if factors is None else factors
            if path in factors:
                yield path, "generations in this metric"
        elif where.name in live:
            yield path, f"generation {where.name}"


def _file_at(path: str) -> StorePath | None:
    """Tell what file has a path; None for what is in staging, derived, or no file of a store."""
    if path.split("/")[0] in (STAGING, INDEX):
        return None
    try:
        return file_at(path)
    except BadInput:
        return None


def _factors(store: Store) -> set[str]:
    """Return the paths of the factors that committed generations name."""
    told = (each.record.curvature for each in store.generations(superseded=True))
    return {f"{CURVATURE}/{each['sha256']}.safetensors" for each in told if each}
