"""From an input that nobody has labelled to the cluster whose adapter it needs.

The untouched backbone gives features f, the same on every node and in every round. Each client sums them over its slots
once, after the last round: ``G = sum f f^T`` over all its examples and one row ``sum f`` a slot. The server adds a
slot's row to that of its cluster, and the ridge solution of "which cluster" (see `heads.ridge`) is the router: exact on
the pooled data, whoever holds what, and no client says which task a slot is about.
"""

from collections.abc import Mapping

import torch

from fedtalora_flwr.aggregation import ClusteredState, Slot
from fedtalora_flwr.config import RunConfig
from fedtalora_flwr.model import heads
from fedtalora_flwr.model.heads import FeatureRoot, FeatureSums, Head
from fedtalora_flwr.model.lora import AdaptedModel
from fedtalora_flwr.model.train import Examples, sum_features


def router(config: RunConfig) -> Head:
    """Build the head whose classes are clusters, from ``ridge-lambda`` and ``ridge-features``."""
    return heads.resolve("ridge", config.settings)


def sum_slots(model: AdaptedModel, slots: list[Examples], *, config: RunConfig) -> FeatureRoot:
    """Sum a client's features over its slots: one row a slot.

    Parameters
    ----------
    model
        Loaded with the start of a run, which adds nothing to the untouched backbone.
    slots
        The examples of each slot, by its number.
    config
        The run's settings.
    """
    head = router(config)
    total = FeatureRoot.zero(num_classes=len(slots), feature_dim=head.lifted_dim(model.backbone.feature_dim))
    for number, examples in enumerate(slots):  # not as one: texts of another task are of another length
        numbered = Examples(examples.inputs, torch.full_like(examples.labels, number))
        total = total + sum_features(model, numbered, head=head, num_classes=len(slots), config=config)
    return total


def by_cluster(sums: Mapping[int, FeatureSums], state: ClusteredState) -> FeatureSums:
    """Add clients' sums up, with a row for each cluster, in the order of their ids; strays are in no row.

    Parameters
    ----------
    sums
        Partition id -> its sums, one row a slot.
    state
        Says which slot is in which cluster.
    """
    ids = sorted(state.clusters)
    first = next(iter(sums.values()))
    gram, rows = torch.zeros_like(first.gram), torch.zeros(len(ids), first.moment.shape[1], dtype=first.moment.dtype)
    for partition, one in sorted(sums.items()):
        gram += one.gram
        for number, row in enumerate(one.moment):
            place = state.place(Slot(partition, number))
            if isinstance(place, int):
                rows[ids.index(place)] += row
    return FeatureSums(gram, rows)
