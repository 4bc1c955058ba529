"""COINCIDE's arithmetic: how many rows of each cluster, and which (Lee et al. 2024).

Letters: k clusters, n rows of a cluster, d dimensions, m chosen.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gradstore.similarity.clusters import Clusters
from gradstore.similarity.row_chunks import RowMatrix

FloatArray = npt.NDArray[np.float64]


def transferability(centroids: npt.NDArray[Any]) -> FloatArray:
    """Compute the (k,) mean cosine of each centroid to the others; 0 if there is no other.

    Args:
        centroids: (k, d), of any length above 0.
    """
    wide = np.asarray(centroids, dtype=np.float64)
    unit = wide / np.maximum(np.linalg.norm(wide, axis=1, keepdims=True), 1e-300)
    own = np.einsum("kd,kd->k", unit, unit)
    return np.asarray((unit @ unit.sum(axis=0) - own) / max(1, len(unit) - 1))


def density(rows: Tensor, chunk_rows: int = 2048, single: float = 1.0) -> float:
    """Compute the mean of exp(-|x - y|²) over all pairs of different rows.

    Args:
        rows: (n, d) of one cluster.
        chunk_rows: rows compared with all others at once.
        single: what a cluster of one row has.
    """
    n = len(rows)
    if n == 1:
        return single
    return float((kernel_sums(rows, chunk_rows).sum() - n) / (n * (n - 1)))


def kernel(x: Tensor, y: Tensor) -> Tensor:
    """Compute the (a, b) float64 kernel exp(-|x_i - y_j|²) of (a, d) and (b, d)."""
    squared = x.square().sum(1).double()[:, None] + y.square().sum(1).double()[None, :]
    return (2 * (x @ y.T).double() - squared).clamp(max=0).exp()


def kernel_sums(rows: Tensor, chunk_rows: int = 2048) -> FloatArray:
    """Compute the (n,) sums of each row's kernel over all rows, itself included."""
    parts = [kernel(part, rows).sum(dim=1).cpu().numpy() for part in rows.split(chunk_rows)]  # type: ignore[no-untyped-call]
    return np.concatenate(parts)


def preferences(transfer: FloatArray, densities: FloatArray, temperature: float) -> FloatArray:
    """Compute the (k,) logits of the share of each cluster: S / (τ·D)."""
    return np.asarray(transfer / (temperature * densities))


def shares(logits: FloatArray) -> FloatArray:
    """Compute the (k,) shares, the softmax of the logits."""
    powers = np.exp(logits - logits.max())
    return np.asarray(powers / powers.sum())


def capped_counts(
    logits: FloatArray, sizes: npt.NDArray[np.int64], total: int
) -> npt.NDArray[np.int64]:
    """Allocate rows to clusters by largest remainder, never more than a cluster has.

    In a round every cluster with room gets the whole part of its share of what is left, then one
    more each by falling remainder (ties to the lower cluster) until nothing is left. What full
    clusters could not take goes to the next round, shared by those that still have room.

    Args:
        logits: (k,) of the shares; kept as logits, so that no share is lost to underflow.
        sizes: (k,) rows of each cluster.
        total: how many rows in all, at most the sum of `sizes`.

    Returns:
        (k,) int64 that sum to `total`.
    """
    counts = np.zeros(len(sizes), dtype=np.int64)
    while (left := total - int(counts.sum())) > 0:
        open_clusters = np.flatnonzero(counts < sizes)
        ideal = left * shares(logits[open_clusters])
        whole = np.minimum(np.floor(ideal).astype(np.int64), (sizes - counts)[open_clusters])
        counts[open_clusters] += whole
        order = open_clusters[np.argsort(-(ideal - np.floor(ideal)), kind="stable")]
        order = order[counts[order] < sizes[order]]
        counts[order[: left - int(whole.sum())]] += 1
    return counts


@dataclass(frozen=True)
class RepresentativeRows:
    """Rows that stand for their cluster.

    Attributes:
        rows: (m,) int64, in the order they were picked.
        distances: (m,) squared MMD to the whole cluster after each pick.
    """

    rows: npt.NDArray[np.int64]
    distances: FloatArray


def pick_by_mmd(
    rows: Tensor,
    count: int,
    allowed: npt.NDArray[np.bool_] | None = None,
    chunk_rows: int = 2048,
) -> RepresentativeRows:
    """Pick rows greedily, each time the one that minimizes the MMD between picked rows and cluster.

    MMD² = mean K(C, C) + mean K(C', C') - 2·mean K(C, C'), K(x, y) = exp(-|x - y|²); ties go to the
    lower row.

    Args:
        rows: (n, d) of one cluster C.
        count: m, rows to pick.
        allowed: (n,) bool, rows that may be picked; None for all. All count for the cluster.
        chunk_rows: rows compared with all others at once.
    """
    n = len(rows)
    sums = kernel_sums(rows, chunk_rows)
    whole = sums.sum() / n**2
    free = np.ones(n, dtype=np.bool_) if allowed is None else allowed.copy()
    to_picked = np.zeros(n)  # each row's kernel summed over the picked ones
    inside = across = 0.0
    picked, distances = [], []
    for size in range(1, count + 1):
        values = whole + (inside + 2 * to_picked + 1) / size**2 - 2 * (across + sums) / (size * n)
        values[~free] = np.inf
        best = int(values.argmin())
        picked.append(best)
        distances.append(max(0.0, float(values[best])))
        inside += 2 * to_picked[best] + 1
        across += sums[best]
        free[best] = False
        to_picked += kernel(rows, rows[best : best + 1])[:, 0].cpu().numpy()
    return RepresentativeRows(np.array(picked, dtype=np.int64), np.array(distances))


@dataclass(frozen=True)
class Spread:
    """Rows chosen from all clusters.

    Attributes:
        rows: (m,) int64 places, cluster by cluster, in the order they were picked.
        clusters: (m,) int64, where each comes from.
        numbers: for a log.
    """

    rows: npt.NDArray[np.int64]
    clusters: npt.NDArray[np.int64]
    numbers: dict[str, float]


@dataclass(frozen=True)
class Groups:
    """Rows in k clusters.

    Attributes:
        members: k arrays of rows' places.
        transfer: (k,) S, how alike a cluster is to the others.
        densities: (k,) D, how alike its rows are.
    """

    members: tuple[npt.NDArray[np.int64], ...]
    transfer: FloatArray
    densities: FloatArray

    @staticmethod
    def of(
        rows: RowMatrix, clusters: Clusters, *, device: str, chunk_rows: int, single: float
    ) -> Groups:
        """Judge clusters of (n, d) `rows`; arguments as for `density`."""
        members = tuple(clusters.members())
        densities = [
            density(torch.from_numpy(rows[places]).to(device), chunk_rows, single)
            for places in members
        ]
        return Groups(members, transferability(clusters.centroids), np.array(densities))

    @property
    def count(self) -> int:
        """Number of clusters, k."""
        return len(self.members)

    @property
    def numbers(self) -> dict[str, float]:
        """Numbers for a log: clusters, their sizes, means of S and D."""
        return {
            "clusters": float(self.count),
            "largest_cluster": float(max(map(len, self.members))),
            "transferability_mean": float(self.transfer.mean()),
            "density_mean": float(self.densities.mean()),
        }

    def spread(
        self,
        rows: RowMatrix,
        count: int,
        allowed: npt.NDArray[np.bool_],
        *,
        temperature: float,
        device: str,
        chunk_rows: int,
    ) -> Spread:
        """Pick rows in every cluster: the number from its share, the rows by MMD to the cluster.

        Args:
            rows: (n, d), those that were clustered.
            count: m, at most the allowed ones.
            allowed: (n,) bool, rows that may be chosen; all of them describe their cluster.
            temperature: tau.
            device: where distances are computed.
            chunk_rows: rows compared with all others of a cluster at once.
        """
        free = [allowed[places] for places in self.members]
        sizes = np.array([int(mask.sum()) for mask in free], dtype=np.int64)
        counts = capped_counts(
            preferences(self.transfer, self.densities, temperature), sizes, count
        )
        used = np.flatnonzero(counts)
        chosen, gaps = [], []
        for number in used:
            places = self.members[number]
            held = torch.from_numpy(rows[places]).to(device)
            picked = pick_by_mmd(held, int(counts[number]), free[number], chunk_rows)
            chosen.append(places[picked.rows])
            gaps.append(picked.distances[-1])
        return Spread(
            np.concatenate(chosen),
            np.repeat(used, counts[used]),
            {"clusters_used": float(len(used)), "mmd2_mean": float(np.mean(gaps))},
        )
