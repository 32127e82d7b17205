"""K-means on a number of clusters that is given, or that the silhouette chooses."""

import numpy as np
from numpy.typing import NDArray
from sklearn.cluster import KMeans
from sklearn.metrics import silhouette_score
from threadpoolctl import threadpool_limits

from fedtalora_flwr.aggregation.clustering.kernel import Matrix

Labels = NDArray[np.int64]

_STARTS = 10  # k-means++ starts, of which the tightest is kept
_TRIES = 32  # numbers of groups that the silhouette looks at before it looks closer
_DIGITS = 9  # points that agree to these decimals are one point
# Mean silhouette from which on several clusters are taken to be there at all: unit vectors of noise alone reach 0.05 in
# 300 dimensions, and six members a group of cosine 0.3 to each other 0.16.
_STRUCTURE = 0.1


def kmeans(points: Matrix, *, num_clusters: int, seed: int) -> Labels:
    """Cut points (n, m) into at most `num_clusters` groups, numbered from 0 by their first member.

    There are fewer groups than asked for where there are fewer distinct points; none is empty.

    Raises
    ------
    ValueError
        If `num_clusters` is below 1, or there is no point.
    """
    if num_clusters < 1 or not len(points):
        raise ValueError(f"cannot cut {len(points)} points into {num_clusters} clusters; both must be at least 1")
    with threadpool_limits(1):  # sums in the same order on any number of cores
        fit = KMeans(min(num_clusters, _num_distinct(points)), n_init=_STARTS, random_state=seed).fit(points)
    return _by_first_member(fit.labels_)


def kmeans_by_silhouette(points: Matrix, *, largest: int, seed: int) -> Labels:
    """Cut points (n, m) into the number of groups, up to `largest`, whose mean silhouette is highest.

    One group, for which there is no silhouette, is the answer where no cut shows structure. Up to 33 groups every
    number is tried; beyond, numbers at equal distances and then all those around the best.
    """
    highest = min(largest, len(points) - 1, _num_distinct(points))
    cuts: dict[int, tuple[float, Labels]] = {}

    def best_of(numbers: range) -> int:
        for num_clusters in numbers:
            if num_clusters not in cuts:
                labels = kmeans(points, num_clusters=num_clusters, seed=seed)
                cuts[num_clusters] = float(silhouette_score(points, labels)), labels
        return max(numbers, key=lambda num_clusters: cuts[num_clusters][0])

    if highest < 2:
        return np.zeros(len(points), dtype=np.int64)
    step = -(-(highest - 1) // _TRIES)
    near = best_of(range(2, highest + 1, step))
    score, labels = cuts[best_of(range(max(2, near - step + 1), min(highest, near + step - 1) + 1))]
    return labels if score > _STRUCTURE else np.zeros(len(points), dtype=np.int64)


def _num_distinct(points: Matrix) -> int:
    return len(np.unique(points.round(_DIGITS) + 0.0, axis=0))  # + 0.0 makes -0 and 0 the same row


def _by_first_member(labels: NDArray[np.integer]) -> Labels:
    _, first, numbered = np.unique(labels, return_index=True, return_inverse=True)
    rank: Labels = np.argsort(np.argsort(first))
    renumbered: Labels = rank[numbered]
    return renumbered
