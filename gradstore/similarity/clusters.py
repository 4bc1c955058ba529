"""Clusterings of embeddings: five ways to cut n rows into groups, one answer.

All are seeded and deterministic, read the rows in float32 chunks (so that a memory map will do) and
give ties to the lower index. No cluster of an answer is empty: where there are fewer distinct rows
than clusters asked for, there are fewer clusters.

Letters: n rows, d dimensions, k clusters.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from gradstore.errors import BadInput
from gradstore.similarity.row_chunks import RowChunks, RowMatrix, squared_distances

#: Numbers of the sample that k-means++ draws its first centroids from: 1 GiB of float32.
SEEDING_NUMBERS = 1 << 28

_KMEANS, _FARTHEST, _LSH, _PARTITION = range(4)


@dataclass(frozen=True)
class Clusters:
    """Rows in groups.

    Attributes:
        labels: (n,) int64, the cluster of each row, 0 to k - 1; every cluster has a row.
        centroids: (k, d) float32; unit vectors of `spherical_kmeans`, rows of `farthest_first`,
            means otherwise.
        distances: (n,) float32, squared distance of each row (of its unit vector in
            `spherical_kmeans`) to its cluster's centroid.
    """

    labels: npt.NDArray[np.int64]
    centroids: npt.NDArray[np.float32]
    distances: npt.NDArray[np.float32]

    @property
    def count(self) -> int:
        """Number of clusters, k."""
        return len(self.centroids)

    @property
    def sizes(self) -> npt.NDArray[np.int64]:
        """(k,) int64, rows of each cluster."""
        return np.bincount(self.labels, minlength=self.count)

    def members(self) -> list[npt.NDArray[np.int64]]:
        """Return k arrays: the positions of each cluster's rows, ascending."""
        order = np.argsort(self.labels, kind="stable")
        return np.split(order, np.cumsum(self.sizes)[:-1])


def cluster(
    method: str,
    rows: RowMatrix,
    num_clusters: int,
    *,
    seed: int,
    max_iter: int = 20,
    lsh_num_bits: int | None = None,
    chunk_rows: int = 4096,
    device: str | torch.device = "cpu",
) -> Clusters:
    """Cluster by a method's name: one of `METHODS`.

    Raises:
        BadInput: an unknown method, no row, or fewer than one cluster.
    """
    if method not in METHODS:
        raise BadInput(f"clustering_method is {method!r}; choose one of {', '.join(METHODS)}")
    if method == "random_projection_lsh":
        return random_projection_lsh(
            rows, num_clusters, seed=seed, num_bits=lsh_num_bits, chunk_rows=chunk_rows,
            device=device,
        )  # fmt: skip
    if method in ("kmeans", "spherical_kmeans"):
        return METHODS[method](
            rows, num_clusters, seed=seed, max_iter=max_iter, chunk_rows=chunk_rows, device=device
        )
    return METHODS[method](rows, num_clusters, seed=seed, chunk_rows=chunk_rows, device=device)


def rows_read(method: str, n: int, num_clusters: int, max_iter: int) -> int:
    """Count the rows that a clustering of n rows reads in chunks, at most (`CountedRows`).

    Args:
        method: one of `METHODS`.
        n: rows.
        num_clusters: k.
        max_iter: of the two k-means, which may converge earlier.
    """
    passes = {
        "farthest_first": min(num_clusters, n),  # one for each centre
        "random_projection_lsh": 4,
        "random_partition": 2,
    }
    return n * passes.get(method, 2 * max_iter + 1)


def kmeans(
    rows: RowMatrix,
    num_clusters: int,
    *,
    seed: int,
    max_iter: int = 20,
    chunk_rows: int = 4096,
    device: str | torch.device = "cpu",
) -> Clusters:
    """Run Lloyd's k-means from k-means++ seeds; an emptied cluster takes the farthest row.

    Args:
        rows: (n, d) finite floats.
        num_clusters: k; at most n are made.
        seed: of the first centroids.
        max_iter: updates of the centroids, at most; stops when no row changes its cluster.
        chunk_rows: rows compared with all centroids at once.
        device: where that happens.
    """
    reader = RowChunks.of(rows, num_clusters, chunk_rows, device, unit=False)
    return _lloyd(reader, min(num_clusters, len(rows)), seed, max_iter)


def spherical_kmeans(
    rows: RowMatrix,
    num_clusters: int,
    *,
    seed: int,
    max_iter: int = 20,
    chunk_rows: int = 4096,
    device: str | torch.device = "cpu",
) -> Clusters:
    """Run k-means on directions: rows count as unit vectors, centroids are unit vectors.

    Arguments as for `kmeans`. The nearest centroid is the one with the largest cosine.
    """
    reader = RowChunks.of(rows, num_clusters, chunk_rows, device, unit=True)
    return _lloyd(reader, min(num_clusters, len(rows)), seed, max_iter)


def farthest_first(
    rows: RowMatrix,
    num_clusters: int,
    *,
    seed: int,
    chunk_rows: int = 4096,
    device: str | torch.device = "cpu",
) -> Clusters:
    """Run Gonzalez' traversal: a seeded first centre, then the row farthest from all centres.

    Every row belongs to its nearest centre. Reads all rows once for each centre.
    """
    reader = RowChunks.of(rows, num_clusters, chunk_rows, device, unit=False)
    n = len(rows)
    centre = int(np.random.default_rng([seed, _FARTHEST]).integers(n))
    nearest = np.full(n, np.inf, dtype=np.float32)
    labels = np.zeros(n, dtype=np.int64)
    centres: list[int] = []
    while len(centres) < min(num_clusters, n) and nearest[centre] > 0:
        point = reader.take(np.array([centre]))
        distances = np.concatenate(
            [squared_distances(c, point)[:, 0].cpu() for _, c in reader.chunks()]
        )
        closer = distances < nearest
        labels[closer], nearest[closer] = len(centres), distances[closer]
        centres.append(centre)
        centre = int(nearest.argmax())
    return Clusters(labels, reader.take(np.array(centres)).cpu().numpy(), nearest)


def random_projection_lsh(
    rows: RowMatrix,
    num_clusters: int,
    *,
    seed: int,
    num_bits: int | None = None,
    chunk_rows: int = 4096,
    device: str | torch.device = "cpu",
) -> Clusters:
    """Cluster rows that lie on the same side of every random hyperplane through the mean row.

    Args:
        rows: (n, d) finite floats.
        num_clusters: approximate number of clusters; only sets the default of `num_bits`.
        seed: of the hyperplanes.
        num_bits: hyperplanes, 1 to 62, so at most 2 ** num_bits clusters; None for
            ceil(log2(num_clusters)).
        chunk_rows: rows read at once.
        device: where products are computed.
    """
    reader = RowChunks.of(rows, num_clusters, chunk_rows, device, unit=False)
    bits = max(1, math.ceil(math.log2(num_clusters))) if num_bits is None else num_bits
    if not 1 <= bits <= 62:
        raise BadInput(f"lsh_num_bits is {bits}; choose 1 to 62")
    generator = np.random.default_rng([seed, _LSH])
    planes = generator.standard_normal((rows.shape[1], bits)).astype(np.float32)
    directions = torch.from_numpy(planes).to(reader.device)
    mean = _means(reader, np.zeros(len(rows), dtype=np.int64), 1)
    powers = 1 << np.arange(bits, dtype=np.int64)
    codes = np.empty(len(rows), dtype=np.int64)
    for start, chunk in reader.chunks():
        sides = ((chunk - mean) @ directions > 0).cpu().numpy()
        codes[start : start + len(chunk)] = sides @ powers
    _, labels = np.unique(codes, return_inverse=True)
    return _around_means(reader, labels.astype(np.int64))


def random_partition(
    rows: RowMatrix,
    num_clusters: int,
    *,
    seed: int,
    chunk_rows: int = 4096,
    device: str | torch.device = "cpu",
) -> Clusters:
    """Split a seeded shuffle into k parts whose sizes differ by at most one (the baseline)."""
    reader = RowChunks.of(rows, num_clusters, chunk_rows, device, unit=False)
    n = len(rows)
    labels = np.empty(n, dtype=np.int64)
    order = np.random.default_rng([seed, _PARTITION]).permutation(n)
    for number, part in enumerate(np.array_split(order, min(num_clusters, n))):
        labels[part] = number
    return _around_means(reader, labels)


#: Names that `clustering_method` uses.
Method = Literal[
    "kmeans", "spherical_kmeans", "farthest_first", "random_projection_lsh", "random_partition"
]

METHODS: dict[Method, Callable[..., Clusters]] = {
    "kmeans": kmeans,
    "spherical_kmeans": spherical_kmeans,
    "farthest_first": farthest_first,
    "random_projection_lsh": random_projection_lsh,
    "random_partition": random_partition,
}


def _first_centroids(reader: RowChunks, k: int, seed: int) -> Tensor:
    """Choose (<= k, d) rows by k-means++ (Arthur & Vassilvitskii 2007); large data is sampled."""
    generator = np.random.default_rng([seed, _KMEANS])
    n, d = reader.rows.shape
    size = min(n, max(k, SEEDING_NUMBERS // max(d, 1)))
    chosen = np.sort(generator.permutation(n)[:size]) if size < n else np.arange(n)
    sample = reader.take(chosen)
    picked = [int(generator.integers(size))]
    nearest = np.full(size, np.inf)
    while True:
        latest = squared_distances(sample, sample[picked[-1]][None])[:, 0]
        nearest = np.minimum(nearest, latest.double().cpu().numpy())
        running = np.cumsum(nearest)
        if len(picked) == k or running[-1] == 0:
            return sample[picked]
        point = generator.random() * running[-1]
        picked.append(int(np.searchsorted(running, point, side="right")))


def _assign(reader: RowChunks, centroids: Tensor) -> tuple[npt.NDArray[np.int64], Tensor]:
    """Return each row's (n,) nearest centroid and (n,) float32 squared distance, on the host."""
    labels, distances = [], []
    for _, chunk in reader.chunks():
        squared = squared_distances(chunk, centroids)
        nearest = squared.argmin(1)
        labels.append(nearest.cpu().numpy())
        distances.append(squared.gather(1, nearest[:, None])[:, 0].cpu())
    return np.concatenate(labels), torch.cat(distances)


def _means(reader: RowChunks, labels: npt.NDArray[np.int64], k: int) -> Tensor:
    """Compute the (k, d) mean row of each cluster; zeros for an empty one."""
    sums = torch.zeros((k, reader.rows.shape[1]), device=reader.device)
    for start, chunk in reader.chunks():
        # A product instead of a scatter: its sums have a fixed order on a GPU too.
        present, inverse = np.unique(labels[start : start + len(chunk)], return_inverse=True)
        member = functional.one_hot(torch.from_numpy(inverse)).T.float().to(reader.device)
        sums[torch.from_numpy(present).to(reader.device)] += member @ chunk
    sizes = torch.from_numpy(np.bincount(labels, minlength=k)).to(reader.device)
    return sums / sizes.clamp(min=1)[:, None]


def _lloyd(reader: RowChunks, k: int, seed: int, max_iter: int) -> Clusters:
    centroids = _first_centroids(reader, k, seed)
    labels, distances = _assign(reader, centroids)
    for _ in range(max_iter):
        centroids = _means(reader, labels, len(centroids))
        if reader.unit:
            centroids = functional.normalize(centroids)
        empty = np.flatnonzero(np.bincount(labels, minlength=len(centroids)) == 0)
        far = np.argsort(-distances.numpy(), kind="stable")[: len(empty)]
        if len(empty):
            centroids[torch.from_numpy(empty).to(reader.device)] = reader.take(far)
        before = labels
        labels, distances = _assign(reader, centroids)
        if np.array_equal(before, labels):
            break
    kept, compact = np.unique(labels, return_inverse=True)
    centroids = centroids[torch.from_numpy(kept).to(reader.device)]
    return Clusters(compact.astype(np.int64), centroids.cpu().numpy(), distances.numpy())


def _around_means(reader: RowChunks, labels: npt.NDArray[np.int64]) -> Clusters:
    """Build the clusters of given labels, with their means as centroids."""
    means = _means(reader, labels, int(labels.max()) + 1)
    distances = np.empty(len(labels), dtype=np.float32)
    for start, chunk in reader.chunks():
        own = means[torch.from_numpy(labels[start : start + len(chunk)]).to(reader.device)]
        distances[start : start + len(chunk)] = (chunk - own).square().sum(1).cpu().numpy()
    return Clusters(labels, means.cpu().numpy(), distances)
