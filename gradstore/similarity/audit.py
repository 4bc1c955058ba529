"""Audit of a data set: rows that are probably wrong, repeat others, or can't be used; with reasons.

Letters: n train rows, m usable ones, q target sets, k neighbours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from gradstore.errors import expect, expect_whole
from gradstore.scoring.pairing import Which, checkpoint_features, shared_sets
from gradstore.scoring.signals import row_signals
from gradstore.similarity.audit_reasons import Evidence, in_words
from gradstore.similarity.audit_texts import text_signs
from gradstore.similarity.nearest import NearestRows, nearest_rows
from gradstore.similarity.rows import UsableRows

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

    from gradstore.store.generation import Generation
    from gradstore.store.reader import Store

#: Nearest rows that a row is compared with, where the caller does not say and there are as many.
NEIGHBOURS = 10


@dataclass(frozen=True)
class AuditOptions:
    """Limits of an audit.

    Attributes:
        neighbours: k; None takes 10, or all other rows where there are fewer.
        duplicate_cosine: cosine from which on two gradients count as the same.
        text_similarity: Jaccard similarity of 5-grams from which on two texts do.

    Raises:
        BadInput: neighbours below 1, or another limit that is not above 0 and at most 1.
    """

    neighbours: int | None = None
    duplicate_cosine: float = 0.99
    text_similarity: float = 0.8

    def __post_init__(self) -> None:
        """Check the limits before any pass over the features."""
        if self.neighbours is not None:
            expect_whole(self.neighbours, "neighbours")
        for name in ("duplicate_cosine", "text_similarity"):
            value = getattr(self, name)
            number = isinstance(value, int | float | np.floating) and not isinstance(value, bool)
            expect(number and 0 < value <= 1, name, value, "a number above 0 and at most 1")


@dataclass(frozen=True)
class Audit:
    """The rows of a data set, those that are most probably wrong first.

    Attributes:
        table: one line per row in the order of `rank`; docs/audit.md explains the columns.
        generation: name of the newest training generation.
        checkpoints: their steps, oldest first.
        targets: the target sets.
        counts: rows with each finding: `repeated_text`, `repeated_gradient`, `answer_conflict`,
            `hurts_all_targets`, and each status of rows that can't be used.
        notes: columns that are empty, each with the reason and the remedy.
    """

    table: pa.Table
    generation: str
    checkpoints: tuple[int, ...]
    targets: tuple[str, ...]
    counts: dict[str, int]
    notes: tuple[str, ...]

    def frame(self) -> pd.DataFrame:
        """Return the table as a pandas frame."""
        return self.table.to_pandas()


def audit(
    store: Store,
    *,
    checkpoints: Which = "all",
    run: str = "",
    targets: Sequence[str] | None = None,
    options: AuditOptions | None = None,
    device: str | torch.device = "cpu",
    on_rows: Callable[[int], None] | None = None,
) -> Audit:
    """Look for training rows that are wrong, repeat others, harm every target, or can't be used.

    Ranks the rows by `suspicion`: the mean of the row's percentiles of loss, length-corrected
    self-influence and disagreement with the other training rows, as far as the store has them. Rows
    that can't be used come last. One pass over the features of each checkpoint, and m² d / 2
    multiplications for the neighbours (at the newest checkpoint); memory does not grow with n d.

    Args:
        store: what `open_store` returns.
        checkpoints: "all", "last" or how many of the newest.
        run: prefix of the generations (`gradstore_run`).
        targets: target sets; None takes those that every checkpoint has, and none is fine.
        options: limits.
        device: where the products are computed.
        on_rows: called with the number of rows compared with all others.

    Raises:
        BadInput: no training generation or usable row, a set that is not there, or limits that do
            not fit.
        DamagedData: a chunk is not the committed one.
    """
    limits = options or AuditOptions()
    expect(isinstance(limits, AuditOptions), "options", options, "AuditOptions(...)")
    sets = shared_sets(store, checkpoints, run=run) if targets is None else list(targets)
    pairs = checkpoint_features(store, checkpoints, run=run, targets=sets)
    train: Generation = pairs[-1].train  # type: ignore[assignment]
    texts = text_signs(store.texts(train), limits.text_similarity)
    signals = row_signals(pairs, device=device)
    near = _neighbours(train, signals.usable, limits, device, on_rows)
    evidence = Evidence(signals, near, texts)
    return Audit(
        table=_table(train, evidence, sets),
        generation=train.name,
        checkpoints=tuple(pair.train.step for pair in pairs),  # type: ignore[attr-defined]
        targets=tuple(sets),
        counts=_counts(evidence),
        notes=_notes(evidence),
    )


def _neighbours(
    train: Generation,
    usable: npt.NDArray[np.bool_],
    limits: AuditOptions,
    device: str | torch.device,
    on_rows: Callable[[int], None] | None,
) -> NearestRows:
    """Find the neighbours of the usable rows; all fields are (n,) and speak of the n rows."""
    rows = UsableRows(train, usable)
    m = len(rows)
    asked = limits.neighbours
    found = nearest_rows(
        rows,
        max(1, min(NEIGHBOURS, m - 1)) if asked is None else asked,
        repeats_at=limits.duplicate_cosine,
        device=device,
        on_rows=on_rows,
    )
    cosine = np.full(train.rows, np.nan, dtype=np.float32)
    nearest_cosine, nearest = cosine.copy(), np.full(train.rows, -1, dtype=np.int64)
    repeats = nearest.copy()
    cosine[rows.rows], nearest_cosine[rows.rows] = found.cosine, found.nearest_cosine
    for target, source in ((nearest, found.nearest), (repeats, found.repeats)):
        target[rows.rows] = np.where(source < 0, -1, rows.rows[source])
    return NearestRows(cosine, nearest, nearest_cosine, repeats)


def _table(train: Generation, evidence: Evidence, sets: Sequence[str]) -> pa.Table:
    """Make the table, most suspicious rows first."""
    import pyarrow as pa

    order = evidence.order
    signals, near, texts = evidence.signals, evidence.near, evidence.texts
    sources = train.sources
    nothing = [None] * train.rows
    columns: dict[str, pa.Array] = {
        "row": pa.array(range(train.rows), pa.int64()),
        "source_set": pa.array([s[0] for s in sources] if sources else nothing, pa.string()),
        "source_row": pa.array([s[1] for s in sources] if sources else nothing, pa.int64()),
        "row_hash": pa.array([bytes(h).hex() for h in train.row_hash], pa.string()),
        "prompt": pa.array(nothing if texts is None else texts.prompts, pa.string()),
        "response": pa.array(nothing if texts is None else texts.responses, pa.string()),
        "status": pa.array(evidence.status, pa.string()),
        "tokens": pa.array(signals.tokens, pa.int32()),
        "suspicion": _numbers(evidence.suspicion),
        "loss": _numbers(signals.loss),
        "gradient_norm": _numbers(signals.gradient_norm),
        "self_influence": _numbers(signals.self_influence),
        "self_influence_x_tokens": _numbers(evidence.by_length),
        "agreement": _numbers(signals.agreement),
        "neighbour_cosine": _numbers(near.cosine),
        "nearest_row": _rows(near.nearest),
        "nearest_cosine": _numbers(near.nearest_cosine),
        "repeats_gradient_of": _rows(near.repeats),
        "repeats_text_of": _rows(None if texts is None else texts.repeats, train.rows),
        "answers_unlike_row": _rows(None if texts is None else texts.conflict, train.rows),
        "answer_conflict": _numbers(
            np.full(train.rows, np.nan) if texts is None else texts.conflict_share
        ),
        "best_target": _numbers(evidence.best_target),
        "hurts_all_targets": pa.array(
            evidence.hurts_all, pa.bool_(), mask=np.isnan(evidence.best_target)
        ),
        **{
            f"target:{name}": _numbers(column)
            for name, column in zip(sets, signals.targets.T, strict=True)
        },
        "reasons": pa.array(in_words(evidence), pa.string()),
    }  # fmt: skip
    table = pa.table(columns).take(pa.array(order))
    return table.add_column(0, "rank", pa.array(range(1, train.rows + 1), pa.int64()))


def _numbers(values: npt.NDArray[np.floating]) -> pa.Array:
    """Make a column of floats, null where there is no number."""
    import pyarrow as pa

    return pa.array(values, pa.float64(), from_pandas=True)


def _rows(rows: npt.NDArray[np.int64] | None, count: int = 0) -> pa.Array:
    """Make a column of row numbers, null where there is none."""
    import pyarrow as pa

    if rows is None:
        return pa.nulls(count, pa.int64())
    return pa.array(rows, pa.int64(), mask=rows < 0)


def _counts(evidence: Evidence) -> dict[str, int]:
    texts = evidence.texts
    found = {
        "repeated_text": 0 if texts is None else int((texts.repeats >= 0).sum()),
        "repeated_gradient": int((evidence.near.repeats >= 0).sum()),
        "answer_conflict": 0 if texts is None else int((texts.conflict >= 0).sum()),
        "hurts_all_targets": int(evidence.hurts_all.sum()),
    }
    for status in evidence.status:
        if status != "ok":
            found[status] = found.get(status, 0) + 1
    return found


def _notes(evidence: Evidence) -> tuple[str, ...]:
    notes = []
    if evidence.texts is None:
        notes.append(
            "no text of these rows in the store: prompts, responses, repeated texts and answers "
            "that conflict are empty; run `dataflex-cli gradstore build` again with store_text: "
            "true"
        )
    if not np.isfinite(evidence.signals.loss).any():
        notes.append(
            "no losses at these checkpoints (an earlier release exported them): `loss` is empty "
            "and not in `suspicion`; build them into a new store to have it"
        )
    if evidence.signals.targets.shape[1] == 0:
        notes.append(
            "no target set at every one of these checkpoints: harm is empty; build the target sets"
        )
    return tuple(notes)
