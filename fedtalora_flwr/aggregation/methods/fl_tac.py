"""FL-TAC: one adapter for each local task of a client, averaged with those of the same task (arXiv 2404.15384).

A client keeps a *slot* for each of its local tasks and trains an adapter in each. Nobody tells the server which slots
are about the same thing: it clusters the adapters, and a slot goes on from the average of its cluster,

    W_c  =  W_0 + R_c + s B_c A_c,    (B_c, A_c, R_c) = a method's aggregate of the slots in cluster c.

With ``shared_rank``, which the paper does not have, one more pair stands beside that of every slot,

    W_c  =  W_0 + R + R_c + s (B A + B_c A_c),    (B, A, R) = the method's aggregate of all clients,

so that what the tasks have in common is learned from the examples of all. Each client trains it through its slots and
sends it once. Both sums are the means of what was trained, each with a residual of its own; clusters are found by what
is not shared. Class rows are then averaged over all slots too, each over those that hold the class.

Where the paper leaves a gap, and what is done here:

- The paper clusters the flattened (A, B), which depends on the gauge of the pair; here it is the product B A (see
  `signature`), and of that what sets adapters apart, in as many dimensions as there are clusters (see `directions`):
  early in training all products are small, alike, and mostly noise.
- The paper divides the sums of B and of A by the number of slots (its public code weighs by examples); here a method
  averages, weighted by examples. With Fed-TaLoRA's residual a cluster is exact: its weight is the mean of its slots'
  effective weights, also of slots that trained in another cluster.
- Clusters keep their ids (Hungarian matching on shared members), and take part in the clustering as one more point, so
  that a round with few clients does not tear up what is known, and a new slot finds the cluster that is like it.
- With N given, a slot that is not there this round goes where its cluster's own point goes: so two clusters of one task
  become one, and there are no more clusters than groups. A cluster of which no slot is there stays as it was; one to
  which no slot belongs any more is dropped.
- K-means must put every slot somewhere. A slot that is a stray in its cluster is not averaged: it goes on from its own
  adapter, and may find a cluster in a later round. A cluster whose own point is a stray keeps its absent slots.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fedtalora_flwr.aggregation.class_rows import average_class_rows
from fedtalora_flwr.aggregation.clustering import (
    Matrix,
    cosines,
    directions,
    embed,
    keep_ids,
    kmeans,
    kmeans_by_silhouette,
    on_a_plane,
    strays,
)
from fedtalora_flwr.aggregation.methods.fedtalora import FedTaLoRA, Residual
from fedtalora_flwr.aggregation.signature import OF_A_ROUND, SIGNATURES, Adapters
from fedtalora_flwr.aggregation.slots import ClusteredState, Slot, SlotAggregator, followed, weighted_residual
from fedtalora_flwr.aggregation.types import Aggregator, ClientUpdate, GlobalState, example_weights

Signature = Literal["product", "changes", "moments", "lora_B", "raw"]
_DIMENSIONS = 16  # that the silhouette sees: unit points of 50 tasks stand well apart in them, and noise is left out


@dataclass(frozen=True)
class FLTAC(SlotAggregator):
    """Cluster the slots' adapters and fold each cluster with a method.

    Parameters
    ----------
    method
        How a cluster's adapters are averaged: Fed-TaLoRA is exact; FedIT weighs by examples, as the paper's code does,
        where the paper divides by the number of slots.
    num_clusters
        N, the number of tasks; 0 lets the silhouette choose it in every round, up to one for each cluster there is
        and one more for every two slots that are there.
    signature
        What is clustered: ``product``, ``lora_B`` or ``raw`` (see `signature`), or what each slot changed itself, every
        round counting alike: the product (``changes``) or the second moments of each factor (``moments``). A product
        holds what its cluster broadcast, right or wrong; a change does not, and the noise of one round is not that of
        the next. Changes are alike where slots learn the same, moments where they learn from data of the same kind.
    stray_share
        A slot whose agreement with its cluster is below this share of the usual one goes its own way (see `strays`).
    seed
        Of K-means.
    shared_rank
        Rank of the pair that all slots share; 0: none, as in the paper.
    """

    method: Aggregator
    num_clusters: int = 0
    signature: str = "product"
    stray_share: float = 0.5
    seed: int = 0
    shared_rank: int = 0

    @property
    def trainable(self) -> frozenset[str]:  # type: ignore[override]
        """The factors that the method within a cluster trains."""
        return self.method.trainable

    @property
    def exact(self) -> bool:  # type: ignore[override]
        """Whether a cluster's weights equal the mean of its slots' weights."""
        return self.method.exact

    @property
    def compares_ranks(self) -> bool:  # type: ignore[override]
        """Whether the signature is that of the product, which has the same shape at any rank."""
        return self.signature in ("product", "changes")

    def __post_init__(self) -> None:
        if self.signature not in SIGNATURES:
            raise ValueError(f"signature must be one of {', '.join(SIGNATURES)}, got {self.signature!r}")
        if self.num_clusters < 0:
            raise ValueError(f"num_clusters must be at least 0, got {self.num_clusters}")
        if not 0 <= self.stray_share < 1:
            raise ValueError(f"stray_share must be in [0, 1), got {self.stray_share}")

    def aggregate(
        self, state: ClusteredState, updates: Mapping[Slot, ClientUpdate], shared: Sequence[ClientUpdate] = ()
    ) -> ClusteredState:
        """Cluster the slots and fold each cluster, and the shared part (see `SlotAggregator.aggregate`)."""
        if not updates:
            raise ValueError("nothing to average: no slot sent an update")
        updates = {slot: updates[slot] for slot in sorted(updates)}
        changes = self._changes(state, updates) if self.signature in OF_A_ROUND else None
        found, heirs = self._cluster(state, updates, changes)
        members: dict[int, list[Slot]] = {}
        for slot, cluster in found.items():
            if cluster is not None:
                members.setdefault(cluster, []).append(slot)
        # Old clusters whose ids all went with their slots can be a group without a state; absent slots stay then.
        heirs = {old: new for old, new in heirs.items() if new in members or new in state.clusters}
        assigned = {slot: heirs.get(old, old) for slot, old in state.assigned.items()}
        assigned |= {s: c for c, slots in members.items() for s in slots}
        own = {slot: one for slot, one in state.own.items() if slot not in found}
        for slot, cluster in found.items():
            if cluster is None:
                assigned.pop(slot, None)
                before = state.of(slot)
                folded_alone = self.method.aggregate(before, [updates[slot]])
                own[slot] = followed(folded_alone, before=before, same_place=slot in state.own)
        folded = {cluster: self._fold(state, cluster, slots, updates) for cluster, slots in members.items()}
        alive = set(assigned.values())
        clusters = {c: one for c, one in sorted({**state.clusters, **folded}.items()) if c in alive}
        common = None
        if state.shared is not None:
            pairs = self.method.aggregate(replace(state.shared, head={}), shared)
            common = replace(pairs, head=average_class_rows(state.shared.head, list(updates.values())))
        return ClusteredState(state.start, clusters, assigned, own, state.version + 1, common, changes)

    def _cluster(
        self, state: ClusteredState, updates: Mapping[Slot, ClientUpdate], changes: Tensor | None
    ) -> tuple[dict[Slot, int | None], dict[int, int]]:
        """Give each slot the id of its group, None if it is a stray there; and each cluster that of its own point."""
        old = list(state.clusters)
        if changes is None:
            adapters = [update.adapters for update in updates.values()]
            gram = self._gram([*adapters, *(state.clusters[cluster].adapters for cluster in old)])
        else:
            gram = cosines(_with_clusters(cosines(changes.numpy()), state, updates))
        points = self._points(gram)
        seed = int(np.random.default_rng([self.seed, state.version]).integers(2**32))
        if self.num_clusters:
            labels = kmeans(points, num_clusters=self.num_clusters, seed=seed)
        else:
            labels = kmeans_by_silhouette(points, largest=len(old) + len(updates) // 2, seed=seed)
        alone = strays(embed(gram), labels, share=self.stray_share)  # by all that sets a slot apart, its noise too
        absent = Counter(cluster for slot, cluster in state.assigned.items() if slot not in updates)
        known = [*(state.assigned.get(slot) for slot in updates), *old]
        votes = [1] * len(updates) + [1 + absent[cluster] for cluster in old]  # its absent slots are where its point is
        ids = keep_ids(labels, known, votes=[0 if stray else n for n, stray in zip(votes, alone, strict=True)])
        places = [None if stray else ids[label] for label, stray in zip(labels, alone, strict=True)]
        found = dict(zip(updates, places[: len(updates)], strict=True))
        heirs = dict(zip(old, places[len(updates) :], strict=True))
        # What the silhouette makes of the few slots of a round is no reason to join clusters of others.
        return found, {cluster: heir for cluster, heir in heirs.items() if heir is not None and self.num_clusters}

    def _fold(
        self, state: ClusteredState, cluster: int, slots: Sequence[Slot], updates: Mapping[Slot, ClientUpdate]
    ) -> GlobalState:
        """Average a cluster's slots; one that trained in another cluster brings the residual it trained on."""
        replies = [updates[slot] for slot in slots]
        bases = [state.of(slot) for slot in slots]
        # A new cluster has the head of its largest slot: the rows that nobody trained this round are from somewhere.
        before = state.clusters.get(cluster, bases[int(np.argmax([reply.num_examples for reply in replies]))])
        if all(base is before for base in bases):
            folded = self.method.aggregate(before, replies)
            return followed(folded, before=before, same_place=cluster in state.clusters)
        mixed = replace(before, residual=weighted_residual(bases, example_weights(replies)))
        return replace(self.method.aggregate(mixed, replies), step={})  # no step leads there from the old residual

    def _changes(self, state: ClusteredState, updates: Mapping[Slot, ClientUpdate]) -> Tensor:
        """Add the cosines of this round's changes to those of earlier rounds: (n, n), all slots heard of."""
        slots = sorted({*state.slots(), *updates})
        total = torch.zeros(len(slots), len(slots), dtype=torch.float64)
        if state.changes is not None:
            before = torch.tensor([slots.index(slot) for slot in state.slots()])
            total[before[:, None], before] = state.changes
        there = torch.tensor([slots.index(slot) for slot in updates])
        changed_by = OF_A_ROUND[self.signature]
        changed = [changed_by(state.of(slot).adapters, update.adapters) for slot, update in updates.items()]
        total[there[:, None], there] += torch.from_numpy(self._gram(changed))
        return total

    def picture(self, state: ClusteredState, updates: Mapping[Slot, ClientUpdate]) -> dict[Slot, tuple[float, float]]:
        """Lay the slots out on a plane by their signatures."""
        slots = sorted(updates)
        if state.changes is None:
            gram = self._gram([updates[slot].adapters for slot in slots])
        else:
            there = [state.slots().index(slot) for slot in slots]
            gram = state.changes.numpy()[np.ix_(there, there)]
        points = self._points(gram)
        places = on_a_plane(points, seed=self.seed % 2**32)  # scikit-learn's seeds are below 2^32
        return {slot: (float(x), float(y)) for slot, (x, y) in zip(slots, places, strict=True)}

    def _gram(self, adapters: Sequence[Adapters]) -> Matrix:
        """Give the inner products of signatures, (n, n), of unit length but for the paper's own."""
        gram: Matrix = SIGNATURES[self.signature](adapters).numpy()
        return gram if self.signature == "raw" else cosines(gram)

    def _points(self, gram: Matrix) -> Matrix:
        """Give the points (n, m) that are clustered; the paper's own signature as it is."""
        return embed(gram) if self.signature == "raw" else directions(gram, num_dims=self.num_clusters or _DIMENSIONS)


def _with_clusters(gram: Matrix, state: ClusteredState, updates: Mapping[Slot, ClientUpdate]) -> Matrix:
    """Give the inner products of the slots that are there, then of the clusters, each the mean of its slots' points."""
    slots = sorted({*state.slots(), *updates})
    points = np.zeros((len(updates) + len(state.clusters), len(slots)))
    for row, slot in enumerate(updates):
        points[row, slots.index(slot)] = 1
    for row, cluster in enumerate(state.clusters, len(updates)):
        members = [slots.index(slot) for slot, one in state.assigned.items() if one == cluster]
        points[row, members] = 1 / len(members)
    joined: Matrix = points @ gram @ points.T
    return joined


def create(
    *,
    residual: Residual = "accumulate",
    residual_energy: float = 1.0,
    clusters: int = 0,
    signature: Signature = "product",
    stray_share: float = 0.5,
    seed: int = 0,
    shared_rank: int = 0,
) -> FLTAC:
    """Build the method; ``residual`` is that of Fed-TaLoRA within a cluster, ``off`` the mean of factors by examples.

    Raises
    ------
    ValueError
        If ``residual_energy`` is below 1: what is owed to a slot would stay with the cluster that it leaves.
    """
    if residual_energy < 1:
        raise ValueError(f"residual-energy is {residual_energy}; with method fl-tac it must be 1")
    return FLTAC(
        FedTaLoRA(residual=residual),
        num_clusters=clusters,
        signature=signature,
        stray_share=stray_share,
        seed=seed,
        shared_rank=shared_rank,
    )
