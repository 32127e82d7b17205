"""Cluster ids: K-means numbers its groups afresh each time, members tell which is which."""

from collections.abc import Sequence

import numpy as np
from scipy.optimize import linear_sum_assignment

from fedtalora_flwr.aggregation.clustering.partition import Labels


def keep_ids(labels: Labels, known: Sequence[int | None], *, votes: Sequence[int] | None = None) -> list[int]:
    """Give each new group the id that most of its members had, one id to one group (Hungarian matching).

    Parameters
    ----------
    labels
        (n,), the new groups, numbered from 0 without a gap.
    known
        n ids of the points before; None for a point that had none.
    votes
        For how many members each point counts, 1 where this is left out. The id of a point that counts for none is not
        given to a new group either.

    Returns
    -------
    The id of each group: that of the old cluster with which it shares members, in the matching that shares most
    over all groups, else the smallest id that no old cluster has.
    """
    num_groups = int(labels.max()) + 1
    ids = sorted({cluster for cluster in known if cluster is not None})
    shared = np.zeros((num_groups, len(ids)), dtype=np.int64)
    for label, cluster, counts in zip(labels, known, votes or [1] * len(known), strict=True):
        if cluster is not None:
            shared[label, ids.index(cluster)] += counts
    groups, columns = linear_sum_assignment(shared, maximize=True)
    matched = {int(g): ids[c] for g, c in zip(groups, columns, strict=True) if shared[g, c]}
    free = (number for number in range(num_groups + len(ids)) if number not in ids)
    return [matched[group] if group in matched else next(free) for group in range(num_groups)]


def in_matched_group(found: Sequence[int | None], true: Sequence[int]) -> list[bool]:
    """Tell of each point whether its cluster is that of its true group; their share is the clustering accuracy.

    Which cluster is which group is settled by the matching, one to one, that makes that share largest (Hungarian).

    Parameters
    ----------
    found
        n cluster ids; None for a point in no cluster, which counts as wrong.
    true
        n group ids, n at least 1.
    """
    clusters, groups = sorted({c for c in found if c is not None}), sorted(set(true))
    shared = np.zeros((len(clusters), len(groups)), dtype=np.int64)
    for cluster, group in zip(found, true, strict=True):
        if cluster is not None:
            shared[clusters.index(cluster), groups.index(group)] += 1
    rows, columns = linear_sum_assignment(shared, maximize=True)
    matched = {(clusters[row], groups[column]) for row, column in zip(rows, columns, strict=True)}
    return [pair in matched for pair in zip(found, true, strict=True)]
