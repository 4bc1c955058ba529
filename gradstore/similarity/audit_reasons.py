"""Evidence against each row of an audit: one number to rank by, and reasons in words.

Letters: n train rows, q target sets.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
from scipy.stats import rankdata

from gradstore.format.layout import RowStatus
from gradstore.scoring.signals import RowSignals
from gradstore.similarity.audit_texts import TextSigns
from gradstore.similarity.nearest import NearestRows

Numbers = npt.NDArray[np.float64]

#: A signal is a reason for rows above this share of the others.
_HIGH = 0.9

_STATUS_WORDS = {
    "masked": "no token is a target",
    "non_finite": "the gradient is not finite",
    "zero_norm": "the gradient is zero",
    "too_long": "longer than the model takes",
    "forgotten": "removed on request",
    "unusable": "a checkpoint can't use it",
}


@dataclass(frozen=True)
class Evidence:
    """Everything known about n rows.

    Attributes:
        signals: of the checkpoints.
        near: neighbours at the newest checkpoint, (n,) each.
        texts: None where the store has none.
    """

    signals: RowSignals
    near: NearestRows
    texts: TextSigns | None

    @cached_property
    def by_length(self) -> Numbers:
        """(n,) self-influence times target tokens.

        The gradient of a mean over t tokens is about 1/√t as long as that of one: without the
        factor, short answers would lead every list.
        """
        return self.signals.self_influence * self.signals.tokens

    @cached_property
    def percentiles(self) -> Mapping[str, Numbers]:
        """(n,) share of the other usable rows below each, by signal; high means suspicious."""
        signals = self.signals
        found = {
            "loss": signals.loss,
            "self_influence": self.by_length,
            "disagreement": -signals.agreement,
        }
        return {
            name: _percentile(values) for name, values in found.items() if np.isfinite(values).any()
        }

    @cached_property
    def suspicion(self) -> Numbers:
        """(n,) mean percentile, 0 to 1; nan where the row is not usable."""
        parts = list(self.percentiles.values())
        return np.mean(parts, axis=0) if parts else np.full(len(self.signals.codes), np.nan)

    @property
    def order(self) -> npt.NDArray[np.int64]:
        """(n,) rows by suspicion, highest first, ties to the lower row; unusable ones last."""
        return np.argsort(-np.nan_to_num(self.suspicion, nan=-1.0), kind="stable").astype(np.int64)

    @cached_property
    def best_target(self) -> Numbers:
        """(n,) the highest cosine to a target set; nan without sets."""
        targets = self.signals.targets
        return targets.max(axis=1) if targets.shape[1] else np.full(len(targets), np.nan)

    @property
    def hurts_all(self) -> npt.NDArray[np.bool_]:
        """(n,) bool: with the row a step lowers no target set's loss further, to first order."""
        return np.asarray(self.best_target < 0)

    @cached_property
    def status(self) -> list[str]:
        """Names of the rows' statuses."""
        known = {int(status): status.name.lower() for status in RowStatus}
        return [known.get(int(code), "unusable") for code in self.signals.codes]


def _percentile(values: Numbers) -> Numbers:
    """Compute the share of the other rows that lie below, ties halved; nan where there is none.

    Examples:
        >>> _percentile(np.array([3.0, 1.0, np.nan, 2.0])).tolist()
        [1.0, 0.0, nan, 0.5]
    """
    there = np.isfinite(values)
    found = np.full(len(values), np.nan)
    found[there] = (rankdata(values[there]) - 1) / max(1, there.sum() - 1)
    return found


def in_words(evidence: Evidence) -> list[str]:
    """Say of every row what speaks against it; "" where nothing does."""
    return ["; ".join(_reasons(evidence, row)) for row in range(len(evidence.signals.codes))]


def _reasons(evidence: Evidence, row: int) -> list[str]:
    """List what speaks against one row, the strongest first."""
    signals, near, texts = evidence.signals, evidence.near, evidence.texts
    found = []
    if signals.codes[row] != RowStatus.OK:
        found.append(f"can't be used: {_STATUS_WORDS[evidence.status[row]]}")
    if texts is not None and texts.conflict[row] >= 0:
        found.append(f"asks the same as row {texts.conflict[row]} and answers otherwise")
    words = {
        "loss": f"surprises the model: loss {signals.loss[row]:.2f}, above {{}} of rows",
        "self_influence": "pulls hard at the model for its length: self-influence x tokens "
        f"{evidence.by_length[row]:.3g}, above {{}}",
        "disagreement": f"pulls against the other rows: mean cosine {signals.agreement[row]:+.3f}, "
        "below {}",
    }
    high = {name: shares[row] for name, shares in evidence.percentiles.items()}
    for name in sorted(high, key=lambda name: -high[name]):
        if high[name] >= _HIGH:
            found.append(words[name].format(_share(high[name])))
    if evidence.hurts_all[row]:
        found.append(f"hurts every target set: best cosine {evidence.best_target[row]:+.3f}")
    if texts is not None and texts.repeats[row] >= 0:
        found.append(f"repeats the text of row {texts.repeats[row]}")
    if near.repeats[row] >= 0:
        found.append(f"repeats the gradient of row {near.repeats[row]}")
    return found


def _share(percentile: float) -> str:
    """Show a percentile without ever saying 100%: one row is not beyond itself.

    >>> _share(0.9312), _share(0.9999)
    ('93%', '99.9%')
    """
    return (
        f"{min(percentile, 0.999):.1%}" if percentile > 0.99 else f"{int(percentile * 100 + 1e-9)}%"
    )
