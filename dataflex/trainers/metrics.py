"""Metrics of an update for the log and events.jsonl, and their form on the screen."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from dataflex.data.rows import RunData
from dataflex.mixers.base import Mixer
from dataflex.selectors.base import Selection

#: Domains that a line on the screen names.
SHOWN = 8


#: Numbers of a run's domains: name -> domain -> value.
ByDomain = Mapping[str, Any]


def domain_metrics(mixers: Iterable[Mixer], names: Sequence[str]) -> ByDomain:
    """Collect what mixers report of domains beside proportions."""
    return {
        what: dict(zip(names, values.tolist(), strict=True))
        for mixer in mixers
        for what, values in mixer.by_domain().items()
    }


def flat(found: ByDomain) -> dict[str, float]:
    """Name the numbers for the Trainer's log: `name/domain`."""
    return {f"{what}/{name}": v for what, each in found.items() for name, v in each.items()}


def domains_summary(found: ByDomain) -> str:
    """Write the largest of the numbers, for the end of a line on the screen."""
    return "".join(f"; {what} {largest(values, '.3g')}" for what, values in found.items())


def largest(values: Mapping[str, float], form: str) -> str:
    """Write the largest few values, in the order of the domains."""
    kept = sorted(values, key=lambda name: -values[name])[:SHOWN]
    named = ", ".join(f"{n} {v:{form}}" for n, v in values.items() if n in kept)
    return named + (f" and {len(values) - SHOWN} more" if len(values) > SHOWN else "")


def selection_metrics(
    data: RunData, rows: npt.NDArray[np.int64], selection: Selection
) -> dict[str, float]:
    """Collect the metrics of a selection, for the Trainer's log.

    `skipped` counts what the event names by reason: rows that LlamaFactory dropped, and rows that
    got no score.
    """
    return {
        "kept_share": len(np.unique(rows)) / len(data.train),
        "skipped": float(sum(skipped_rows(data, selection).values())),
        **selection.numbers,
        **score_metrics(selection.scores),
    }


def skipped_rows(data: RunData, selection: Selection) -> dict[str, int]:
    """Count the training sets' rows that could not be chosen, by reason.

    Packed rows and those of a `tokenized_path` keep no origin: which of a file's rows they lack is
    not known.
    """
    return {**data.dropped, **selection.skipped}


def score_metrics(scores: npt.NDArray[np.floating[Any]] | None) -> dict[str, float]:
    """Take smallest, mean and largest of the scores that are finite, if any is."""
    if scores is None or not np.isfinite(scores).any():
        return {}
    known = np.asarray(scores, dtype=np.float64)
    return {
        "score_min": float(np.nanmin(known)),
        "score_mean": float(np.nanmean(known)),
        "score_max": float(np.nanmax(known)),
    }


def count_by_set(chosen: Mapping[str, int], sets: int) -> str:
    """Write how many rows the data sets gave that gave most, where there are several `sets`."""
    return f" ({largest(chosen, 'd')})" if sets > 1 else ""


def won_by(won: Mapping[str, int]) -> str:
    """Write how many rows each target won, for the end of a line about a selection."""
    return f"; won by {largest(won, 'd')}" if won else ""


def score_range(numbers: Mapping[str, float]) -> str:
    """Write the end of a line about an update, where rows have scores."""
    if "score_min" not in numbers:
        return ""
    return f", scores {numbers['score_min']:.3g} to {numbers['score_max']:.3g}"
