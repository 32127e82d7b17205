"""Points on a plane, for the eye alone: nothing is computed from these places."""

import numpy as np
from sklearn.manifold import TSNE
from threadpoolctl import threadpool_limits

from fedtalora_flwr.aggregation.clustering.kernel import Matrix

_PERPLEXITY = 8.0  # neighbours that a point attends to: about the members of a cluster


def on_a_plane(points: Matrix, *, seed: int) -> Matrix:
    """Lay points (n, m) out on a plane, (n, 2), neighbours beside each other (t-SNE, van der Maaten and Hinton 2008).

    Distances between groups, and the size of a group, say nothing. Up to three points lie on a line.
    """
    if len(points) < 4:
        return np.stack([np.arange(len(points), dtype=np.float64), np.zeros(len(points))], 1)
    perplexity = min(_PERPLEXITY, (len(points) - 1) / 3)
    with threadpool_limits(1):  # sums in the same order on any number of cores
        places: Matrix = TSNE(perplexity=perplexity, init="random", random_state=seed).fit_transform(points)
    return places.astype(np.float64)
