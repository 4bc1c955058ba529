"""TSDS: rows drawn by an optimal transport from the target's rows to their neighbours.

Letters: n training rows, q target rows, k neighbours.

Where this differs from the authors' code: a row's density is taken over all training rows (beyond
`DENSITY_SAMPLE` of them over a sample), not over the retrieved neighbours alone; rows are drawn
without replacement; the search widens to `max_K` where a tenth of the rows leaves mass unplaced.

Cost: one search of q rows among n, and a density, over at most `DENSITY_SAMPLE` rows, of each row
that the transport reaches: at most as n (benchmarks/tsds_cost.py).
"""

from __future__ import annotations

import heapq
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from annotated_types import Ge, Gt

from dataflex.config.parameters import Count, Natural, Share
from dataflex.config.registry import register
from dataflex.data.rows import RunData
from dataflex.run.context import UpdateContext
from dataflex.selectors.base import Selection
from dataflex.selectors.by_embedding import EmbeddingSelector, load_offline, rows_of_file, scored
from gradstore.errors import BadInput
from gradstore.similarity.neighbours import Neighbours, growing_order

FloatArray = npt.NDArray[np.float64]

#: Neighbours searched first; more where the transport reaches further.
FIRST_WIDTH = 64

#: Rows whose density is looked up at once.
DENSITY_ROWS = 256

#: Rows a density is taken over, at most: a pass over all of them grows with n * n * d.
DENSITY_SAMPLE = 8192

#: Rows whose distance to their kde_K-th neighbour `sigma: auto` takes the median of.
SIGMA_ROWS = 512

#: Value of `sigma` that stands for a distance taken from the data.
AUTO = "auto"

_log = logging.getLogger(__name__)


@register("selector", "tsds")
class TsdsSelector(EmbeddingSelector):
    """Selector that draws rows which match the target's distribution and are spread out.

    Every target row spreads its mass over its nearest rows, further the less `alpha` is and the
    larger `C`; a row among near-duplicates (a dense place) gets less. Rows are drawn by their mass.

    Args:
        max_K: neighbours a target row's mass may reach.
        kde_K: neighbours that count for a row's density; at most a tenth of the rows.
        sigma: Euclidean distance between unit vectors at which a neighbour stops counting; 0
            leaves density out; auto is the median distance to a row's kde_K-th neighbour.
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
        sigma: Annotated[float, Ge(0)] | Literal["auto"] = 0.75,
        alpha: Share = 0.6,
        C: Annotated[float, Gt(0)] = 5.0,
        seed: Natural = 42,
        probs_path: str | None = None,
        **embedding: Any,  # noqa: ANN401 - the base's parameters
    ) -> None:
        super().__init__(**embedding)
        self.max_k, self.kde_k = max_K, kde_K
        self.sigma = None if isinstance(sigma, str) else float(sigma)
        self.alpha, self.scale = float(alpha), float(C)
        self.seed = seed
        self.file = None if probs_path is None else Path(probs_path).expanduser()
        self.needs_targets = self.file is None
        self._offline: FloatArray | None = None
        self._spread: tuple[Neighbours, FloatArray] | None = None

    def check_count(self, count: int, data: RunData) -> None:
        """Raise BadInput unless enough rows are usable and drawable from a file made offline."""
        if self.file is None:
            super().check_count(count, data)
            return
        self._offline = offline_probabilities(self.file, data)
        drawable = int(((self._offline > 0) & (data.train.target_tokens > 0)).sum())
        if drawable < count:
            raise BadInput(
                f"probs_path {str(self.file)!r} gives {drawable} of the {len(data.train)} training "
                f"rows a probability above 0, an update takes {count}. Lower update_step."
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
            raise BadInput(
                f"tsds: {count} rows requested, {len(rows)} have a probability above 0. "
                "Raise max_K or lower update_step."
            )
        numbers = {"drawable": float((mass > 0).sum()), "topped_up": float(missing)}
        return scored(rows, mass, context.among_candidates(usable), numbers)

    def _of(self, neighbours: Neighbours, n: int) -> FloatArray:
        """Compute (n,) mass of each row, kept as long as the embeddings stay the same."""
        if self._spread is None or self._spread[0] is not neighbours:
            usable = int(neighbours.usable.sum())
            kde_k = min(self.kde_k, max(1, usable // 10))
            sigma = scaled_sigma(neighbours, kde_k) if self.sigma is None else self.sigma
            density = Density(neighbours, n, kde_k, sigma)
            mass, found = transport_mass(
                neighbours, density, min(self.max_k, usable), self.alpha, self.scale
            )
            if found.cut_short and self.alpha > 0:  # 0 asks for all the spread there is
                self._warn(neighbours, density, found)
            self._spread = (neighbours, mass)
        return self._spread[1]

    def _warn(self, neighbours: Neighbours, density: Density, found: Transport) -> None:
        """Report a transport that ended at the last neighbour, before `alpha` could end it."""
        q, k = found.mass.shape
        way_out = "Raise max_K, or alpha."
        auto = scaled_sigma(neighbours, density.kde_k)
        if auto < density.sigma:  # a narrower kernel, so that a neighbour takes more mass
            way_out = (
                f"Set component_params.sigma: {AUTO} ({auto:.3g} on these rows), or raise max_K."
            )
        _log.warning(
            "tsds: the mass of %d target rows reached max_K = %d neighbours of each (mean density "
            "%.3g at sigma %.3g) with %.3g of the cost at which alpha %g would stop it: alpha has "
            "no effect on this selection. %s",
            q, k, density.mean, density.sigma, found.reached, self.alpha, way_out,
        )  # fmt: skip

    def _of_file(self, context: UpdateContext) -> FloatArray:
        if self._offline is None:
            assert self.file is not None
            self._offline = offline_probabilities(self.file, context.run.data)
        return self._offline


@dataclass(frozen=True)
class Transport:
    """Spread of every target row's mass over its neighbours.

    Attributes:
        mass: (q, k) share of each neighbour; each row adds up to 1/q.
        level: s, the common level reached.
        cut_short: whether it would have gone on with more neighbours.
        reached: cost over the one at which `alpha` stops the level; 1 or more unless `cut_short`.
    """

    mass: FloatArray
    level: float
    cut_short: bool
    reached: float


def transport(distances: FloatArray, density: FloatArray, alpha: float, scale: float) -> Transport:
    """Raise one level for all target rows until the cost of spreading further exceeds its gain.

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
    wanted = (1.0 - alpha) * q
    reached = alpha / scale * total / wanted if wanted > 0 else 1.0
    return Transport(mass, level, cut_short, reached)


class Density:
    """Kernel densities of training rows, each computed when it is first asked for."""

    def __init__(self, neighbours: Neighbours, n: int, kde_k: int, sigma: float) -> None:
        """Start with no density computed.

        Args:
            neighbours: of the n training rows.
            n: training rows.
            kde_k: neighbours that count.
            sigma: distance at which a neighbour stops counting.
        """
        self.kde_k, self.sigma = kde_k, sigma
        self._neighbours = neighbours
        self._known = np.full(n, np.nan)

    def __getitem__(self, rows: npt.NDArray[np.int64]) -> FloatArray:
        """Return the densities of rows, in their shape."""
        unknown = np.unique(rows[np.isnan(self._known[rows])])
        self._known[unknown] = densities(self._neighbours, unknown, self.kde_k, self.sigma)
        return np.asarray(self._known[rows])

    @property
    def mean(self) -> float:
        """Mean of those that were asked for."""
        return float(np.nanmean(self._known))


def transport_mass(
    neighbours: Neighbours, density: Density, max_k: int, alpha: float, scale: float
) -> tuple[FloatArray, Transport]:
    """Compute the mass of each training row, (n,) adding up to 1, and the transport that gave it.

    Only as many neighbours are searched as the transport reaches: the result is that of `max_k`.
    """
    width = min(FIRST_WIDTH, max_k)
    while True:
        cosines, rows = neighbours.nearest(width)
        found = transport(distance(cosines), density[rows], alpha, scale)
        if width == max_k or not found.cut_short:
            n = len(neighbours.usable)
            mass = np.bincount(rows.ravel(), weights=found.mass.ravel(), minlength=n)
            return np.asarray(mass, dtype=np.float64), found
        width = min(2 * width, max_k)


def scaled_sigma(neighbours: Neighbours, kde_k: int) -> float:
    """Return the median distance of a row to its `kde_k`-th neighbour, over evenly spaced rows."""
    usable = np.flatnonzero(neighbours.usable)
    size = min(SIGMA_ROWS, len(usable))
    rows = usable[np.arange(size) * len(usable) // size]
    return float(np.median(distance(neighbours.around(rows, kde_k)[:, -1])))


def densities(
    neighbours: Neighbours, rows: npt.NDArray[np.int64], kde_k: int, sigma: float
) -> FloatArray:
    """Compute kernel densities (len(rows),): the sum of max(0, 1 - d²/σ²) over the nearest rows.

    A row is its own first neighbour, so a density is at least 1. Beyond `DENSITY_SAMPLE` usable
    rows the others are estimated from a sample of that size: n * d per row would be n² d in all.
    """
    if sigma == 0:
        return np.ones(len(rows))
    usable = int(neighbours.usable.sum())
    found = [np.empty(0)]
    for start in range(0, len(rows), DENSITY_ROWS):
        chunk = rows[start : start + DENSITY_ROWS]
        if usable <= DENSITY_SAMPLE:
            near = neighbours.around(chunk, kde_k)
            found.append(_kernel(near, sigma))
        else:
            thinned = max(1, round(kde_k * DENSITY_SAMPLE / usable))
            near = neighbours.around_in_sample(chunk, thinned, DENSITY_SAMPLE)
            found.append(1.0 + _kernel(near, sigma) * usable / DENSITY_SAMPLE)
    return np.maximum(1.0, np.concatenate(found))


def _kernel(cosines: npt.NDArray[np.float32], sigma: float) -> FloatArray:
    """Sum max(0, 1 - d²/σ²) over the columns (m, k) of cosines: (m,)."""
    return np.asarray(np.maximum(0.0, 1.0 - distance(cosines) ** 2 / sigma**2).sum(axis=1))


def distance(cosines: npt.NDArray[np.floating[Any]]) -> FloatArray:
    """Compute the Euclidean distance of unit vectors from their cosine."""
    return np.asarray(np.sqrt(np.maximum(0.0, 2.0 - 2.0 * cosines.astype(np.float64))))


def drawn(mass: FloatArray, count: int, generator: np.random.Generator) -> npt.NDArray[np.int64]:
    """Draw at most `count` distinct rows one by one, with probability proportional to mass."""
    chances = np.flatnonzero(mass > 0)
    keys = np.log(mass[chances]) + generator.gumbel(size=len(chances))
    return chances[np.argsort(-keys, kind="stable")[:count]].astype(np.int64)


def offline_probabilities(path: Path, data: RunData) -> FloatArray:
    """Load (n,) probability of each training row, from one per row of its file.

    Raises:
        BadInput: the file holds no probabilities, or fewer than the training file has rows.
    """
    table = load_offline(path, "probs_path")
    if table.ndim != 1 or not table.size or table.dtype.kind not in "fiu":
        raise BadInput(
            f"probs_path {str(path)!r} holds {table.dtype} {table.shape}; one number per row is "
            "needed. "
            "Save a probability for each row of the training file with numpy.save."
        )
    values = table.astype(np.float64)
    if not np.isfinite(values).all() or values.min() < 0 or values.max() == 0:
        raise BadInput(
            f"probs_path {str(path)!r}: probabilities must be finite, 0 or more, and not all 0. "
            "Correct the file, or leave probs_path out."
        )
    rows = rows_of_file(data.train, "probs_path")
    if len(rows) > len(values):
        raise BadInput(
            f"probs_path {str(path)!r} holds {len(values)} probabilities, but the training rows "
            f"come from a file of at least {len(rows)} rows: it was made of other data. "
            "Make it of these, or leave probs_path out."
        )
    found = np.zeros(len(data.train))
    kept = np.flatnonzero(rows >= 0)
    found[rows[kept]] = values[kept]
    return found
