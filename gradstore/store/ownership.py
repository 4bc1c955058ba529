"""Ownership of a store: rows or a run that an export would be refused for, found early."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict

from gradstore.export.share import OptimizerStep
from gradstore.format.names import space_run
from gradstore.format.provenance import Difference, compare, refuse
from gradstore.format.records import RowSet
from gradstore.store.reader import Store


def check_rows_and_run(
    store: Store, sets: Mapping[str, RowSet], *, space: str, run: str, run_id: str
) -> None:
    """Refuse rows or a run that the first export would be refused for.

    Generations of another run under the same prefix would be scored together with this run's, so
    they are refused whatever their steps.

    Args:
        store: opened for writing; what makes features comparable was compared already.
        sets: rows of each target set by its name, and of the training set under "".
        space: the space that this run will write to; its rows must be those of all spaces.
        run: prefix of the generations (`gradstore_run`).
        run_id: of the generations, the same for a run and its resumes.

    Raises:
        ProvenanceMismatch: lists every set with other rows, and another run's id.
    """
    stored = store.generations()
    newest = {g.set: g for g in stored}
    differences = []
    for name, given in sets.items():
        known, rows = newest.get(name), store.without_forgotten(given, of=name)
        note = "" if known is None else rows.difference(known.plan.rows)
        if known is not None and note:
            field = f"target.{name}.rows" if name else "train.rows"
            note = f"{note} (stored with {known.name})"
            differences.append(Difference(field, known.plan.rows.sha256, rows.sha256, note=note))
    same_rows = not differences
    prefix = space_run(space, run)
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


def check_step(store: Store, step: OptimizerStep, *, run: str) -> None:
    """Refuse shares of another optimizer step than that of the run's newest generation of them.

    Args:
        store: opened for writing.
        step: whose shares are to be written.
        run: prefix of the generations (`gradstore_run`).

    Raises:
        ProvenanceMismatch: lists what differs.
    """
    for generation in reversed(store.generations()):
        share = generation.record.feature_options.get("share")
        if generation.record.run != run or not share:
            continue
        mine = {f"rows' share of a step: {key}": value for key, value in asdict(step).items()}
        theirs = {f"rows' share of a step: {key}": share[key] for key in asdict(step)}
        if differences := compare(theirs, mine):
            hint = "keep its generations apart with gradstore_run=NAME"
            raise refuse(str(store.path), differences, hint=hint)
        return
