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


def centred(gram: Matrix) -> Matrix:
    """Give the Gram matrix (n, n) of the same points less their mean."""
    n = len(gram)
    less_mean = np.eye(n) - 1 / n
    moved: Matrix = less_mean @ gram @ less_mean
    return moved


def directions(gram: Matrix, *, num_dims: int) -> Matrix:
    """Give unit points (n, m) that say in which direction each point of a Gram matrix lies from the others.

    What all points share is no sign of a group, and most of what is left is each point's own noise, in as many
    dimensions as there are points. So the points are scaled to unit length, their mean is taken off, and of the rest
    only the strongest `num_dims` dimensions stay, scaled to unit length again (as in spectral clustering, Ng, Jordan
    and Weiss 2001). A point at the mean stays there.
    """
    gram = cosines(centred(cosines(gram)))
    points = embed(gram, num_dims=num_dims)
    lengths = np.linalg.norm(points, axis=1, keepdims=True)
    unit: Matrix = np.divide(points, lengths, out=np.zeros_like(points), where=lengths > _ROUNDING)
    return unit


def embed(gram: Matrix, *, num_dims: int | None = None) -> Matrix:
    """Give points (n, m), m <= n, with these inner products: ``G = V diag(l) V^T``, rows of ``V diag(sqrt(l))``.

    The points are defined up to a rotation, which no distance sees. With `num_dims` only the strongest dimensions stay.
    """
    values, vectors = np.linalg.eigh((gram + gram.T) / 2)
    if num_dims is not None:
        values, vectors = values[-num_dims:], vectors[:, -num_dims:]
    kept = values > _ROUNDING * values[-1:]
    kept[-1] = True  # points that are all zero still have one coordinate
    points: Matrix = vectors[:, kept] * np.sqrt(values[kept].clip(min=0.0))
    return points
