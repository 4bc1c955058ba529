"""Checks that generations may be scored together, made before any feature is read."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, SupportsFloat

import numpy as np

from gradstore.errors import BadInput, ProvenanceMismatch
from gradstore.scoring.plain_rows import PlainArray, as_source, as_sources
from gradstore.scoring.scan import FeatureSource
from gradstore.scoring.subtasks import source_name

_EQUAL_FIELDS = ("adapter_hash", "effective_seed", "autocast", "attention")


@dataclass(frozen=True, init=False)
class CheckpointFeatures:
    """Features of the train rows and of the target rows at one checkpoint.

    Attributes:
        train: n rows.
        targets: one source per target set; the same sets in the same order at every checkpoint.
        weight: share of this checkpoint in the sum, from `checkpoint_weights`; used as it is.

    Raises:
        BadInput: neither a source of features nor an array, or a weight that is no number.

    Examples:
        >>> import numpy as np
        >>> from gradstore import CheckpointFeatures, influence_scores
        >>> train, target = np.eye(3), np.array([[2.0, 0.0, 0.0]])
        >>> influence_scores([CheckpointFeatures(train, [target])]).values.tolist()
        [1.0, 0.0, 0.0]
    """

    train: FeatureSource
    targets: tuple[FeatureSource, ...]
    weight: float

    def __init__(
        self,
        train: FeatureSource | PlainArray,
        targets: Sequence[FeatureSource | PlainArray] | FeatureSource | PlainArray,
        weight: float = 1.0,
    ) -> None:
        """Take generations or arrays.

        Args:
            train: a generation, any `FeatureSource`, or an array (n, d) of a real dtype. Rows of an
                array that are zero or not finite are skipped.
            targets: one such (m, d) for each target set; a single set may stand alone.
            weight: of this checkpoint.
        """
        if isinstance(weight, bool | str) or not isinstance(weight, SupportsFloat):
            raise BadInput(
                f"weight is {weight!r}; give a number, such as checkpoint_weights makes."
            )
        object.__setattr__(self, "train", as_source(train, "train"))
        object.__setattr__(self, "targets", as_sources(targets))
        object.__setattr__(self, "weight", float(weight))


class ComparableGeneration(Protocol):
    """A generation, as far as comparing needs it."""

    @property
    def name(self) -> str:
        """Such as "train/16"."""

    @property
    def dim(self) -> int:
        """d, the length of a row."""

    @property
    def record(self) -> Any:  # noqa: ANN401 - a GenerationRecord, or anything with its fields
        """Has adapter_hash, effective_seed, autocast, attention, projection (a mapping)."""


def check_comparable(train: ComparableGeneration, targets: Sequence[ComparableGeneration]) -> None:
    """Raise ProvenanceMismatch for target generations that a train one cannot be scored against.

    Args:
        train: the train generation of one checkpoint.
        targets: target generations meant to be of the same checkpoint.

    Raises:
        ProvenanceMismatch: space, adapter, effective seed, autocast, attention implementation,
            projection or dim differ; the message lists every difference.
    """
    mine = _fields(train)
    lines = []
    for target in targets:
        theirs = _fields(target)
        lines += [
            f"{field} differs: {train.name} has {mine.get(field)!r}, "
            f"{target.name} has {theirs.get(field)!r}"
            for field in dict.fromkeys((*mine, *theirs))
            if mine.get(field) != theirs.get(field)
        ]
    if lines:
        raise ProvenanceMismatch(
            "; ".join(lines) + ". Their features can't be compared. Score generations of one "
            "checkpoint, or export the target set again with the train generation's model and "
            "settings.",
            lines,
        )


def _fields(generation: ComparableGeneration) -> dict[str, object]:
    """Map the name of every field that must be equal to its value, projection fields dotted."""
    record = generation.record
    projection: Mapping[str, object] = record.projection
    return {
        "space": getattr(generation, "space", None),
        **{name: getattr(record, name) for name in _EQUAL_FIELDS},
        "dim": int(generation.dim),
        **{f"projection.{key}": value for key, value in projection.items()},
    }


def check_checkpoints(checkpoints: Sequence[CheckpointFeatures]) -> None:
    """Raise BadInput or ProvenanceMismatch unless the checkpoints can be combined.

    Raises:
        BadInput: none given, no target set, an empty train set, other target sets at another
            checkpoint, or weights that are negative, nan, infinite or all zero.
        ProvenanceMismatch: other rows at another checkpoint, or d or space differs within one.
    """
    if not isinstance(checkpoints, Sequence) or not all(
        isinstance(one, CheckpointFeatures) for one in checkpoints
    ):
        raise BadInput(
            "checkpoints must be a list of CheckpointFeatures, one for each checkpoint; "
            "checkpoint_features(store) makes it."
        )
    if not checkpoints:
        raise BadInput(
            "no checkpoint to score with; export at least one generation first "
            "(checkpoint_features(store) finds them)"
        )
    weights = [float(checkpoint.weight) for checkpoint in checkpoints]
    if not all(math.isfinite(w) and w >= 0 for w in weights) or sum(weights) <= 0:
        raise BadInput(
            f"checkpoint weights {weights} must be finite, >= 0 and not all zero; "
            "checkpoint_weights(learning_rates) makes them"
        )
    first = checkpoints[0]
    if not first.targets:
        raise BadInput("no target set to score against; name at least one")
    if first.train.rows == 0:
        raise BadInput("the train set has no rows; there is nothing to score; give at least one")
    for index, checkpoint in enumerate(checkpoints):
        if len(checkpoint.targets) != len(first.targets):
            raise BadInput(
                f"checkpoint {index} has {len(checkpoint.targets)} target sets, checkpoint 0 has "
                f"{len(first.targets)}; combine the same sets at every checkpoint"
            )
        _check_same_rows(checkpoint.train, first.train, index)
        for target, reference in zip(checkpoint.targets, first.targets, strict=True):
            _check_same_rows(target, reference, index)
            for field in ("space", "dim"):
                mine = getattr(checkpoint.train, field, None)
                theirs = getattr(target, field, None)
                if mine != theirs and None not in (mine, theirs):  # an array has no space
                    line = (
                        f"{field} differs: {source_name(checkpoint.train)} has {mine}, "
                        f"{source_name(target)} has {theirs}"
                    )
                    step = ". Their features can't be compared. Score sets of one space and model."
                    raise ProvenanceMismatch(line + step, [line])


def _check_same_rows(source: FeatureSource, reference: FeatureSource, index: int) -> None:
    """Check that row i is the same sample at every checkpoint, or the sum would mix samples."""
    if source is reference:
        return
    name, first_name = source_name(source), source_name(reference)
    if source.rows != reference.rows:
        line = f"rows differ: {first_name} has {reference.rows}, {name} has {source.rows}"
        raise ProvenanceMismatch(f"{line}. Combine generations of the same rows.", [line])
    mine, theirs = getattr(source, "row_hash", None), getattr(reference, "row_hash", None)
    if mine is None or theirs is None:
        return
    differing = np.flatnonzero((np.asarray(mine) != np.asarray(theirs)).any(axis=1))
    if differing.size:
        line = (
            f"{differing.size:,} of {source.rows:,} rows differ between {first_name} and {name} "
            f"(checkpoint {index}), first row {differing[0]}"
        )
        raise ProvenanceMismatch(
            f"{line}. Combine generations of the same rows in the same order.", [line]
        )
