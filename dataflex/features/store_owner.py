"""Ownership of a store: rows or a run that an export would refuse, found before training."""

from __future__ import annotations

import logging
import uuid
from typing import TYPE_CHECKING

from dataflex.run.context import RunContext
from dataflex.run.output_owner import known_identity
from gradstore.errors import BadInput, ProvenanceMismatch
from gradstore.format.layout import GRADIENT, METADATA
from gradstore.storage.location import Location
from gradstore.store.ownership import check_rows_and_run
from gradstore.store.reader import open_store

if TYPE_CHECKING:
    from dataflex.config.keys import RunConfig
    from gradstore.store.reader import Store

_log = logging.getLogger(__name__)


def built_by(config: RunConfig) -> str:
    """Return the run id of generations built outside of training; nothing is written.

    The run that owns output_dir. Where none does, as with checkpoints of plain LlamaFactory, what
    output_dir's own store was built by before, and at first an id made of the folder's path.

    Raises:
        BadInput: output_dir's record of its run is damaged.
    """
    if (known := known_identity(config.output_dir)) is not None:
        return known
    if (own := config.own_store) is not None and (own / METADATA).exists():
        for generation in open_store(own).generations():
            if generation.space == GRADIENT and generation.record.run == config.store_run:
                return generation.record.run_id
    return uuid.uuid5(uuid.NAMESPACE_URL, config.output_dir.resolve().as_uri()).hex


def check_owner(store: Store, run: RunContext, *, space: str = GRADIENT, run_id: str = "") -> None:
    """Refuse rows or a run that the first export would be refused for, see `check_rows_and_run`.

    Args:
        store: opened for writing; what makes features comparable was compared already.
        run: with its rows and its id.
        space: the space that this run will write to; its rows must be those of all spaces.
        run_id: what its generations carry; this run's id by default, and of embeddings that runs
            share, their model's hash.

    Raises:
        ProvenanceMismatch: lists every set with other rows, and another run's id.
    """
    data = run.data
    sets = {"": data.train.row_set, **{rows.name: rows.row_set for rows in data.targets}}
    run_id = run_id or run.run_id
    check_rows_and_run(store, sets, space=space, run=run.config.store_run, run_id=run_id)


def check_same_store(path: Location, expected: str | None) -> None:
    """Refuse, before anything is created, a store that is not the checkpoint's.

    Args:
        path: of the run's store.
        expected: uuid of the checkpoint's; None where a run starts.

    Raises:
        ProvenanceMismatch: there is another store, or none.
    """
    if expected is None:
        return
    try:
        found = f"holds store {open_store(path).uuid}"
    except BadInput:
        found = "holds no store"
    if found != f"holds store {expected}":
        raise ProvenanceMismatch(
            f"the checkpoint belongs to store {expected}, but {path} {found}: not this run's "
            "store. Restore the run's store, name it with gradstore=PATH, or start a new run "
            "with overwrite_output_dir: true."
        )
