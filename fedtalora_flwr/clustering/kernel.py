"""From a Gram matrix to points: K-means needs distances, and inner products are enough to have them."""

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]

_ROUNDING = 1e-10  # eigenvalues below this share of the largest are what float64 leaves of zero


def cosines(gram: Matrix) -> Matrix:
    """Normalise a Gram matrix (n, n) to unit points; a point that is zero stays zero."""
    norms = np.sqrt(np.diag(gram).clip(min=0.0))  # (n,)
    scale = np.divide(1.0, norms, out=np.zeros_like(norms), where=norms > 0)
    normalised: Matrix = gram * np.outer(scale, scale)
    return normalised


def embed(gram: Matrix) -> Matrix:
    """Give points (n, m), m <= n, with these inner products: ``G = V diag(l) V^T``, rows of ``V diag(sqrt(l))``.

    The points are defined up to a rotation, which no distance sees.
    """
    values, vectors = np.linalg.eigh((gram + gram.T) / 2)
    kept = values > _ROUNDING * values[-1:]
    kept[-1] = True  # points that are all zero still have one coordinate
    points: Matrix = vectors[:, kept] * np.sqrt(values[kept].clip(min=0.0))
    return points
