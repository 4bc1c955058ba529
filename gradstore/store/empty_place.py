"""A place without a store: whether one may be made there."""

from __future__ import annotations

from gradstore.errors import BadInput
from gradstore.format.layout import (
    COMMITS,
    CURVATURE,
    FORGOTTEN,
    GENERATIONS,
    INDEX,
    METADATA,
    PLANS,
    SPACES,
)
from gradstore.format.text_table import TEXTS
from gradstore.storage.local import STAGING
from gradstore.storage.lock import LOCK
from gradstore.storage.reading import ReadFiles

_OURS = {METADATA, COMMITS, GENERATIONS, PLANS, SPACES, STAGING, LOCK, TEXTS, CURVATURE, FORGOTTEN,
         INDEX}  # fmt: skip


def check_empty(files: ReadFiles) -> None:
    """Refuse a place that holds something else than the beginnings of a store.

    Raises:
        BadInput: it does; names one of its files.
        StoreIOError: it can't be looked at.
    """
    files.check_place()
    foreign = sorted(set(files.names("")) - _OURS)
    if foreign:
        raise BadInput(
            f'"{files.root}" is no store and not empty (it holds {foreign[0]!r}). '
            "Choose another folder with gradstore=PATH"
        )
