"""TSDS: rows drawn by an optimal transport from the target's rows to their neighbours.

Letters: n training rows, q target rows, k neighbours.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
from annotated_types import Ge, Gt

from dataflex.config.parameters import Count, Natural, Share
from dataflex.config.registry import register
from dataflex.data.rows import RunData
from dataflex.run.context import UpdateContext
from dataflex.selectors.base import Selection
from dataflex.selectors.by_embedding import EmbeddingSelector, load_offline, rows_of_file
from gradstore.errors import BadInput
from gradstore.similarity.neighbours import Neighbours, growing_order

FloatArray = npt.NDArray[np.float64]

#: Neighbours looked at first; more where the transport reaches further.
FIRST_WIDTH = 64

#: Rows whose density is looked up at once.
DENSITY_ROWS = 256


@register("selector", "tsds")
class TsdsSelector(EmbeddingSelector):
    """Draw rows that match the target's distribution and are spread out.

    Every target row spreads its mass over its nearest rows, further the less `alpha` is and the
    larger `C`; a row among near-duplicates (a dense place) gets less. Rows are drawn by their mass.

    Args:
        max_K: neighbours a target row's mass may reach; at most a tenth of the rows.
        kde_K: neighbours that count for a row's density; at most a tenth of the rows.
        sigma: Euclidean distance between unit vectors at which a neighbour stops counting; 0
            leaves density out.
        alpha: weight of being near the target against being spread out, 0 to 1.
        C: scale of distances against spread, above 0.
        seed: combined with the step.
        probs_path: a .npy of DataFlex 1.1.0, one probability per row of the one training file;
            stands for embeddings.
        embedding: as for `EmbeddingSelector`.
    """

    paper = (
        "Liu et al. 2024, TSDS: Data Selection for Task-Specific Model Finetuning, arXiv:2410.11303"
    )

    def __init__(
        self,
        max_K: Count = 5000,
        kde_K: Count = 1000,
        sigma: Annotated[float, Ge(0)] = 0.75,
        alpha: Share = 0.6,
        C: Annotated[float, Gt(0)] = 5.0,
        seed: Natural = 42,
        probs_path: str | None = None,
        **embedding: Any,  # noqa: ANN401 - the base's parameters
    ) -> None:
        super().__init__(**embedding)
        self.max_k, self.kde_k = max_K, kde_K
        self.sigma, self.alpha, self.scale = float(sigma), float(alpha), float(C)
        self.seed = seed
        self.file = None if probs_path is None else Path(probs_path).expanduser()
        self.needs_targets = self.file is None
        self._offline: FloatArray | None = None
        self._spread: tuple[Neighbours, FloatArray] | None = None

    def check_count(self, count: int, data: RunData) -> None:
        """Enough rows are usable, and a file made offline gives enough of them a chance."""
        if self.file is None:
            super().check_count(count, data)
            return
        self._offline = offline_probabilities(self.file, data)
        drawable = int(((self._offline > 0) & (data.train.target_tokens > 0)).sum())
        if drawable < count:
            raise BadInput(
                f"probs_path {str(self.file)!r} gives {drawable} of the {len(data.train)} training "
                f"rows a chance, an update takes {count}. Lower update_step."
            )

    def choose(
        self, count: int, context: UpdateContext, neighbours: Neighbours | None
    ) -> Selection:
        """Draw by mass; where too few rows have any, the next-nearest follow."""
        n = len(context.run.data.train)
        generator = np.random.default_rng([self.seed, context.step])
        if neighbours is None:
            mass, usable = self._of_file(context), np.ones(n, dtype=np.bool_)
        else:
            mass, usable = self._of(neighbours, n), neighbours.usable
        allowed = context.among_candidates(usable)
        rows = drawn(np.where(allowed, mass, 0.0), count, generator)
        missing = count - len(rows)
        if missing and neighbours is not None:
            allowed[rows] = False
            nearest, _ = growing_order(neighbours, self.max_k, missing, allowed)
            rows = np.concatenate([rows, nearest[:missing]])
        if len(rows) < count:
            raise BadInput(f"tsds: {count} rows asked, {len(rows)} have a chance.")
        numbers = {"drawable": float((mass > 0).sum()), "topped_up": float(missing)}
        return Selection(rows, mass[rows], numbers=numbers)

    def _of(self, neighbours: Neighbours, n: int) -> FloatArray:
        """(n,) mass of each row; the same as long as the embeddings are."""
        if self._spread is None or self._spread[0] is not neighbours:
            most = max(1, int(neighbours.usable.sum()) // 10)
            mass = transport_mass(
                neighbours,
                n,
                max_k=min(self.max_k, most),
                kde_k=min(self.kde_k, most),
                sigma=self.sigma,
                alpha=self.alpha,
                scale=self.scale,
            )
            self._spread = (neighbours, mass)
        return self._spread[1]

    def _of_file(self, context: UpdateContext) -> FloatArray:
        if self._offline is None:
            assert self.file is not None
            self._offline = offline_probabilities(self.file, context.run.data)
        return self._offline


@dataclass(frozen=True)
class Transport:
    """How far every target row's mass spreads.

    Attributes:
        mass: (q, k) share of each neighbour; each row adds up to 1/q.
        level: s, the common level reached.
        cut_short: whether it would have gone on with more neighbours.
    """

    mass: FloatArray
    level: float
    cut_short: bool


def transport(distances: FloatArray, density: FloatArray, alpha: float, scale: float) -> Transport:
    """Raise one level for all target rows until spreading further costs more than it is worth.

    Args:
        distances: (q, k) Euclidean, from the nearest neighbour on.
        density: (q, k) of those neighbours, above 0.
        alpha: weight of distance against spread.
        scale: C.
    """
    q, k = distances.shape
    reach = np.cumsum(1.0 / density, axis=1)  # (q, k): the level at which a neighbour is full
    spent = np.cumsum(distances / density, axis=1)
    cost, total, level = np.zeros(q), 0.0, float(reach[:, 0].min())
    heap = [(float(reach[j, 0]), j, 0) for j in range(q)]
    heapq.heapify(heap)
    cut_short = False
    while True:
        level, j, rank = heapq.heappop(heap)
        if rank + 1 == k:
            cut_short = True
            break
        now = distances[j, rank + 1] * level - spent[j, rank]
        total, cost[j] = total + now - cost[j], now
        if alpha / scale * total >= (1.0 - alpha) * q:
            break
        heapq.heappush(heap, (float(reach[j, rank + 1]), j, rank + 1))
    # A neighbour's share grows until it is full, and the next one takes what is left of 1/q.
    full = np.minimum(reach, level) / level
    mass = np.diff(full, axis=1, prepend=0.0) / q
    return Transport(mass, level, cut_short)


def transport_mass(
    neighbours: Neighbours,
    n: int,
    *,
    max_k: int,
    kde_k: int,
    sigma: float,
    alpha: float,
    scale: float,
) -> FloatArray:
    """(n,) mass of each training row, adding up to 1.

    Only as many neighbours are looked at as the transport reaches: the result is that of `max_k`.
    """
    density = np.full(n, np.nan)
    width = min(FIRST_WIDTH, max_k)
    while True:
        cosines, rows = neighbours.nearest(width)
        unknown = np.unique(rows[np.isnan(density[rows])])
        density[unknown] = densities(neighbours, unknown, kde_k, sigma)
        found = transport(distance(cosines), density[rows], alpha, scale)
        if width == max_k or not found.cut_short:
            mass = np.bincount(rows.ravel(), weights=found.mass.ravel(), minlength=n)
            return np.asarray(mass, dtype=np.float64)
        width = min(2 * width, max_k)


def densities(
    neighbours: Neighbours, rows: npt.NDArray[np.int64], kde_k: int, sigma: float
) -> FloatArray:
    """(len(rows),) kernel density of training rows: the sum of max(0, 1 - d²/σ²) over the nearest.

    A row is its own first neighbour, so a density is at least 1.
    """
    if sigma == 0:
        return np.ones(len(rows))
    found = []
    for start in range(0, len(rows), DENSITY_ROWS):
        near = distance(neighbours.around(rows[start : start + DENSITY_ROWS], kde_k))
        found.append(np.maximum(0.0, 1.0 - near**2 / sigma**2).sum(axis=1))
    return np.maximum(1.0, np.concatenate(found)) if found else np.empty(0)


def distance(cosines: npt.NDArray[np.floating[Any]]) -> FloatArray:
    """Euclidean distance of unit vectors from their cosine."""
    return np.asarray(np.sqrt(np.maximum(0.0, 2.0 - 2.0 * cosines.astype(np.float64))))


def drawn(mass: FloatArray, count: int, generator: np.random.Generator) -> npt.NDArray[np.int64]:
    """At most `count` distinct rows, drawn one by one with a chance that follows their mass."""
    chances = np.flatnonzero(mass > 0)
    keys = np.log(mass[chances]) + generator.gumbel(size=len(chances))
    return chances[np.argsort(-keys, kind="stable")[:count]].astype(np.int64)


def offline_probabilities(path: Path, data: RunData) -> FloatArray:
    """(n,) probability of each training row, from one per row of its file.

    Raises:
        BadInput: the file holds no probabilities, or fewer than the training file has rows.
    """
    table = load_offline(path, "probs_path")
    if table.ndim != 1 or not table.size or table.dtype.kind not in "fiu":
        raise BadInput(
            f"probs_path {str(path)!r} holds {table.dtype} {table.shape}; one number per row is "
            "needed."
        )
    values = table.astype(np.float64)
    if not np.isfinite(values).all() or values.min() < 0 or values.max() == 0:
        raise BadInput(
            f"probs_path {str(path)!r}: probabilities must be finite, 0 or more, and not all 0."
        )
    rows = rows_of_file(data.train, "probs_path")
    if len(rows) > len(values):
        raise BadInput(
            f"probs_path {str(path)!r} holds {len(values)} probabilities, but the training rows "
            f"come from a file of at least {len(rows)} rows: it was made of other data."
        )
    found = np.zeros(len(data.train))
    kept = np.flatnonzero(rows >= 0)
    found[rows[kept]] = values[kept]
    return found
