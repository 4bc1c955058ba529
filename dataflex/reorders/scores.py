"""Sources of a reorder's scores: a column, a file, an earlier selection, the model."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from dataflex.config.parameters import Count
from dataflex.config.registry import grouped
from dataflex.data.rows import RawRows, RunData, as_numbers
from dataflex.run.context import UpdateContext
from gradstore.errors import BadInput, ProvenanceMismatch
from gradstore.format.foreign import read_json

FloatArray = npt.NDArray[np.float64]

_log = logging.getLogger(__name__)

#: Where scores may come from.
Source = Literal["precomputed", "cached_selection", "model_loss"]

#: The key of `score_params` that names a file there.
SOURCES: Mapping[Source, str | None] = {
    "precomputed": "score_path",
    "cached_selection": "cache_path",
    "model_loss": None,
}

#: Kinds of files by that key.
SUFFIXES = {"score_path": (".npy", ".json", ".jsonl"), "cache_path": (".json",)}


#: What to do about a selection that is not as a run wrote it.
AS_WRITTEN = "Name a selections/step_<g>.json of a run with the same data, as it was written."


@dataclass(frozen=True)
class ScoreParams:
    """`score_params`; each `score_source` reads its own.

    Attributes:
        score_field: column of the data files, or key in a score file, for precomputed.
        score_path: a file of scores, one a row, instead of the column (.npy, .json, .jsonl).
        cache_path: a selection of an earlier run, `selections/step_<g>.json`.
        metric_key: which of its metrics; None for the only one.
        batch_size: rows of a scoring batch, at most, for model_loss.
        max_samples: rows scored at an update, at most; the others count as the median.
        num_workers: a key of DataFlex 1.1.0 that is ignored: rows are already tokenised.
    """

    score_field: str = "score"
    score_path: str | None = None
    cache_path: str | None = None
    metric_key: str | None = None
    batch_size: Count = 8
    max_samples: Count | None = None
    num_workers: Any = 0


def make_score_params(source: Source, params: Mapping[str, Any]) -> ScoreParams:
    """Parse and check the configured `score_params`.

    Raises:
        ValueError: an unknown key, a value out of range, or no file where `source` needs one.
    """
    found = grouped(ScoreParams, "score_params", params)
    if source == "cached_selection" and not found.cache_path:
        raise ValueError(
            "score_source cached_selection needs score_params.cache_path: "
            "a selections/step_<g>.json of an earlier run"
        )
    return found


def file_faults(source: Source, params: ScoreParams) -> list[str]:
    """List the faults of the score file that can be found before it is opened."""
    key = SOURCES[source]
    value = getattr(params, key) if key else None
    if key is None or value is None:
        return []
    path = Path(value).expanduser()
    if path.suffix not in SUFFIXES[key]:
        return [f"score_params.{key} {value!r}: expected a file {', '.join(SUFFIXES[key])}."]
    return [] if path.is_file() else [f"score_params.{key} {value!r} does not exist."]


def fixed_scores(source: Source, params: ScoreParams, data: RunData) -> FloatArray:
    """Load (n,) scores of the training rows that need no model; NaN where a row has none.

    Raises:
        BadInput: they are missing, no numbers, or of another number of rows.
        ProvenanceMismatch: the selection was made on other rows.
    """
    if source == "cached_selection":
        return _selection_scores(params, data)
    if params.score_path is not None:
        return _file_scores(params, len(data.train), "training rows")
    if data.raw is None:
        raise BadInput(
            f"where the training rows come from is unknown, so column {params.score_field!r} "
            "cannot be looked up: give their scores in a file, score_params.score_path."
        )
    return raw_scores(params, data.raw)


def raw_scores(params: ScoreParams, rows: RawRows) -> FloatArray:
    """Load (n,) scores of rows by origin: from a file, else the column; NaN where missing."""
    if params.score_path is not None:
        return _file_scores(params, len(rows), "rows in the data files")
    return _known(rows.numbers(params.score_field), f"column {params.score_field!r}")


def model_scores(
    params: ScoreParams, context: UpdateContext, positions: npt.NDArray[np.int64], seed: int
) -> tuple[FloatArray, int]:
    """Compute losses of rows under the present model; must be called on every rank.

    Args:
        params: how many rows to score, and how many at once.
        context: the boundary.
        positions: (m,) rows asked for.
        seed: of the draw of rows to score, where `max_samples` leaves some out.

    Returns:
        (m,) losses in the order of `positions`, NaN where not scored; tokens of the pass.

    Raises:
        BadInput: none is finite.
    """
    board = context.run.board
    if board is None:
        raise BadInput(
            "losses are scored during training alone: set score_source: precomputed, with scores "
            "in a column or a file"
        )
    scored = positions
    if params.max_samples is not None and len(positions) > params.max_samples:
        generator = np.random.default_rng([seed, context.step])
        scored = np.sort(generator.choice(positions, params.max_samples, replace=False))
    losses = board.losses(context.step, scored, max_rows=params.batch_size)
    if not np.isfinite(losses[scored]).any():
        raise BadInput("no training row has a finite loss. Check the model and the labels.")
    return losses[positions], board.tokens


def _file_scores(params: ScoreParams, n: int, rows: str) -> FloatArray:
    path = Path(str(params.score_path)).expanduser()
    scores = read_scores(path, params.score_field)
    if len(scores) != n:
        raise BadInput(
            f"score file {str(path)!r} has {len(scores)} scores, but there are {n} {rows}. "
            "Give one score a row, in the order of the rows."
        )
    return _known(scores, f"score file {str(path)!r}")


def _known(scores: FloatArray, where: str) -> FloatArray:
    if not np.isfinite(scores).any():
        raise BadInput(
            f"{where}: not one of {len(scores)} scores is a finite number. Check "
            "score_params.score_field and what wrote the scores."
        )
    return scores


def read_scores(path: Path, field: str) -> FloatArray:
    """Read the (n,) scores in a file.

    Args:
        path: .npy with n numbers; .json with a list of numbers, or of mappings, or a mapping that
            holds one; .jsonl with a number or a mapping a line.
        field: the key in mappings.

    Raises:
        BadInput: the file cannot be read as that; names what it holds.
    """
    where = f"score file {str(path)!r}"
    try:
        if path.suffix == ".npy":
            return np.asarray(np.load(path, allow_pickle=False), dtype=np.float64).reshape(-1)
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".jsonl":
            entries = [read_json(line) for line in text.splitlines() if line.strip()]
        else:
            content = read_json(text)
            entries = _member(content, field, where)
    except (ValueError, EOFError) as error:
        raise BadInput(
            f"{where} cannot be read: {error}. Give one number a row: .npy, JSON list or "
            "JSON lines."
        ) from error
    if not isinstance(entries, list):
        raise BadInput(f"{where} holds no list of scores: give one number a row, in their order.")
    values = [_member(entry, field, where) for entry in entries]
    return np.array(as_numbers(values, where), dtype=np.float64)


def _member(entry: Any, field: str, where: str) -> Any:  # noqa: ANN401 - JSON
    """Return a mapping's value under `field`; anything else unchanged."""
    if not isinstance(entry, dict):
        return entry
    if field not in entry:
        raise BadInput(
            f"{where} has no {field!r}; it has {', '.join(map(str, entry))}. "
            "Set score_params.score_field."
        )
    return entry[field]


def _selection_scores(params: ScoreParams, data: RunData) -> FloatArray:
    """Load an earlier selection's scores by position; rows that it did not choose have none."""
    path, n = Path(str(params.cache_path)).expanduser(), len(data.train)
    where = f"selection {str(path)!r}"
    try:
        content = read_json(path.read_text(encoding="utf-8"))
        indices = [int(i) for i in content["indices"]]
        metrics = {str(key): list(values) for key, values in content["metric"].items()}
        made_on = (content.get("manifest") or {}).get("rows_sha256")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadInput(
            f"{where} cannot be read (expected indices, metric): {error!r}. {AS_WRITTEN}"
        ) from error
    if made_on not in (None, hashlib.sha256(data.train.row_set.hashes.tobytes()).hexdigest()):
        raise ProvenanceMismatch(
            f"{where} was made on other training rows (data, template, tokenizer or cutoff_len "
            "differ): its positions would mean other rows here. Restore those, or name another "
            "selection in score_params.cache_path."
        )
    if made_on is None:
        _log.warning("%s does not say on which rows it was made: its positions are taken as "
                     "positions of these %d training rows", where, n)  # fmt: skip
    values = _metric(metrics, params.metric_key, where)
    if len(values) != len(indices):
        raise BadInput(
            f"{where} has {len(indices)} indices, but {len(values)} scores. {AS_WRITTEN}"
        )
    if any(not 0 <= i < n for i in indices):
        raise BadInput(
            f"{where} names position {max(indices)}, but there are {n} training rows. {AS_WRITTEN}"
        )
    scores = np.full(n, np.nan)
    for i, value in zip(indices, as_numbers(values, where), strict=True):
        if not np.isfinite(scores[i]):
            scores[i] = value
    return _known(scores, where)


def _metric(metrics: Mapping[str, list[Any]], key: str | None, where: str) -> list[Any]:
    if key is None and len(metrics) == 1:
        return next(iter(metrics.values()))
    if key is None or key not in metrics:
        raise BadInput(
            f"{where} has metrics {', '.join(metrics) or 'none'}, not {key!r}. "
            "Set score_params.metric_key."
        )
    return metrics[key]
