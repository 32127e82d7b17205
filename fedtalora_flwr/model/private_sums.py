"""A client's feature sums, differentially private for each example.

Of features f, r long at most, an example that is blanked out changes ``(sum f f^T, r sum onehot(y) f^T)`` by
``|f| (|f|^2 + r^2)^(1/2) <= 2^(1/2) r^2``, where of the symmetric sum each number counts once. So each gets Gaussian
noise of sigma times that, the symmetric one a symmetric noise (Wang, arXiv 1803.02596). How many examples each class
has is public, and with it what the constant 1 behind the features sums up to.

What noise has made of the sums no examples can have. All from here on is post-processing: with n_c examples of class
c, a mean is no longer than r; and what is left within classes,

    W = G - sum_c n_c mu_c mu_c^T,

has no eigenvalue below 0, of n examples of k classes n - k above it at most, and a trace of at most
``n r^2 - sum_c n_c |mu_c|^2``. The eigenvalues are lowered alike until that holds, which takes off them what the noise
has put onto all.
"""

import math

import torch
from torch import Tensor

from fedtalora_flwr.model.heads import FeatureRoot
from fedtalora_flwr.model.heads.base import triangular
from fedtalora_flwr.model.private import Uniform, secret_normal, secret_uniform


def private_root(
    features: Tensor,
    labels: Tensor,
    *,
    num_classes: int,
    radius: float,
    noise_multiplier: float,
    uniform: Uniform = secret_uniform,
) -> FeatureRoot:
    """Sum features with noise, and give a root that examples can have.

    Parameters
    ----------
    features
        (n, m); a longer one than `radius` is scaled down to it.
    labels
        (n,) int64 in [0, `num_classes`).
    num_classes
        C.
    radius
        r.
    noise_multiplier
        sigma: the noise's standard deviation over what an example changes.
    uniform
        Draws the noise; any other than the default is for tests.
    """
    if not len(labels):
        return FeatureRoot.zero(num_classes=num_classes, feature_dim=features.shape[1])
    counts = torch.bincount(labels, minlength=num_classes).double()  # (C,)
    gram, moment = noisy_sums(
        features,
        labels,
        num_classes=num_classes,
        radius=radius,
        noise_multiplier=noise_multiplier,
        uniform=uniform,
    )
    return possible_root(gram, moment, counts, radius=radius)


def noisy_sums(
    features: Tensor,
    labels: Tensor,
    *,
    num_classes: int,
    radius: float,
    noise_multiplier: float,
    uniform: Uniform = secret_uniform,
) -> tuple[Tensor, Tensor]:
    """Give sum f f^T, (m, m), and sum onehot(y) f^T, (C, m), with noise, float64; parameters as of `private_root`."""
    f = features.double()
    f = f * _down_to(f, radius)
    m, deviation = f.shape[1], noise_multiplier * math.sqrt(2) * radius**2
    upper = torch.triu_indices(m, m)
    gram = f.T @ f
    gram[upper[0], upper[1]] += deviation * secret_normal(upper.shape[1], uniform=uniform)
    moment = f.new_zeros(num_classes, m).index_add_(0, labels, f)
    noise = secret_normal(moment.numel(), uniform=uniform).view(moment.shape)
    return gram.triu() + gram.triu(1).T, moment + deviation / radius * noise


def possible_root(gram: Tensor, moment: Tensor, counts: Tensor, *, radius: float) -> FeatureRoot:
    """Find sums near noisy ones that examples can have.

    Parameters
    ----------
    gram, moment
        (m, m) and (C, m), of `noisy_sums`.
    counts
        (C,) float64, the examples of each class.
    radius
        r.
    """
    held, num_examples, m = counts.nonzero().flatten(), int(counts.sum()), len(gram)
    size = counts[held, None]  # (k, 1)
    means = moment[held] / size
    means = means * _down_to(means, radius)
    between = size.sqrt() * means  # (k, m)
    values, vectors = torch.linalg.eigh(gram - between.T @ between)
    first = m - min(m, num_examples - len(held))
    within = _lowered(values[first:], total=num_examples * radius**2 - float(between.square().sum()))
    rows = torch.cat([between, within.sqrt()[:, None] * vectors[:, first:].T])
    ones = torch.cat([size.sqrt(), within.new_zeros(len(within), 1)])  # of the constant behind the features
    told = torch.cat([size * means, size], dim=1)
    sums = moment.new_zeros(len(moment), m + 1).index_copy_(0, held, told)
    return FeatureRoot(triangular(torch.cat([rows, ones], dim=1)), sums)


def _down_to(rows: Tensor, radius: float) -> Tensor:
    """Give the factor (n, 1) that makes each row no longer than `radius`."""
    factor: Tensor = (radius / rows.norm(dim=1, keepdim=True).clamp(min=1e-30)).clamp(max=1)
    return factor


def _lowered(values: Tensor, *, total: float) -> Tensor:
    """Lower numbers alike, none below 0, until their sum is `total` at most."""
    found = values.clamp(min=0)
    if float(found.sum()) <= total:
        return found
    if total <= 0:
        return torch.zeros_like(values)
    down = values.sort(descending=True).values
    # Where the j largest are to stay above 0, each loses (their sum - total) / j; j is the most for which they do.
    less = (down.cumsum(0) - total) / torch.arange(1, len(values) + 1)
    last = max(0, int((down > less).sum()) - 1)  # rounding may leave not even the largest
    return (values - less[last]).clamp(min=0)
