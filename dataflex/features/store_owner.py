"""Ownership of a store: rows or a run that an export would refuse, found before training."""

from __future__ import annotations

import logging
import uuid
from typing import TYPE_CHECKING

from dataflex.run.context import RunContext
from dataflex.run.output_owner import known_identity
from gradstore.format.layout import GRADIENT, METADATA
from gradstore.format.names import space_run
from gradstore.format.provenance import Difference, refuse
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
    if config.owns_store and (config.store_path / METADATA).exists():
        for generation in open_store(config.store_path).generations():
            if generation.space == GRADIENT and generation.record.run == config.store_run:
                return generation.record.run_id
    return uuid.uuid5(uuid.NAMESPACE_URL, config.output_dir.resolve().as_uri()).hex


def check_owner(store: Store, run: RunContext, *, space: str = GRADIENT, run_id: str = "") -> None:
    """Refuse rows or a run that the first export would be refused for.

    Generations of another run under the same prefix would be scored together with this run's, so
    they are refused whatever their steps.

    Args:
        store: opened for writing; what makes features comparable was compared already.
        run: with its rows and its id.
        space: the space that this run will write to; its rows must be those of all spaces.
        run_id: what its generations carry; this run's id by default, and of embeddings that runs
            share, their model's hash.

    Raises:
        ProvenanceMismatch: lists every set with other rows, and another run's id.
    """
    stored = store.generations()
    newest = {(str(g.role), g.set): g for g in stored}
    sets = [("train.rows", ("train", ""), run.data.train)]
    sets += [(f"target.{t.name}.rows", ("target", t.name), t) for t in run.data.targets]
    differences = []
    for field, key, rows in sets:
        known = newest.get(key)
        note = "" if known is None else rows.row_set.difference(known.plan.rows)
        if known is not None and note:
            note = f"{note} (stored with {known.name})"
            hashes = known.plan.rows.sha256, rows.row_set.sha256
            differences.append(Difference(field, *hashes, note=note))
    same_rows = not differences
    run_id = run_id or run.run_id
    prefix = space_run(space, run.config.store_run)
    others = [
        g
        for g in stored
        if g.record.run == prefix and (g.space != space or g.record.run_id != run_id)
    ]
    if others:
        other, theirs = others[-1], others[-1].record.run_id
        note = f"{other.name} was made by run {theirs}, this is run {run_id}"
        if other.space != space:
            note = f"{other.name} is of space {other.space!r}, this run writes to {space!r}"
        differences.append(Difference("run_id", theirs, run_id, note=note))
    if differences:
        hint = "keep this run's generations apart with gradstore_run=NAME" if same_rows else ""
        raise refuse(str(store.path), differences, hint=hint)
