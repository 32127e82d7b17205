"""Points that do not belong where K-means had to put them."""

import numpy as np
from numpy.typing import NDArray

from fedtalora_flwr.aggregation.clustering.kernel import Matrix
from fedtalora_flwr.aggregation.clustering.partition import Labels


def strays(points: Matrix, labels: Labels, *, share: float) -> NDArray[np.bool_]:
    """Flag points that agree far less with the rest of their group than is usual.

    A point's agreement is the cosine between it and the mean of the *other* members of its group, so that it does not
    vouch for itself. It is a stray where that is below `share` times the median agreement of all points. The measure
    is relative because early in training even true members agree little. A point alone in its group is no stray, and
    where the median is not positive nobody is: there is no structure to stray from.

    Parameters
    ----------
    points
        (n, m).
    labels
        (n,).
    share
        In [0, 1); 0 flags only points that turn against their group.

    Returns
    -------
    (n,) bool.
    """
    together = labels[:, None] == labels[None, :]  # (n, n)
    np.fill_diagonal(together, False)
    others = together @ points  # (n, m), sums over the other members
    lengths = np.linalg.norm(points, axis=1) * np.linalg.norm(others, axis=1)
    dots = (points * others).sum(1)
    agreement = np.divide(dots, lengths, out=np.zeros_like(dots), where=lengths > 0)
    in_company = together.any(1)
    if not in_company.any() or (usual := np.median(agreement[in_company])) <= 0:
        return np.zeros(len(points), dtype=np.bool_)
    flagged: NDArray[np.bool_] = in_company & (agreement < share * usual)
    return flagged
