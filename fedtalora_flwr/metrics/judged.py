"""What a model said of labelled examples, kept as counts until the last division: by class, mixed up, how sure.

With n_cd examples of class c that were taken for class d, and n_b examples in bin b of the confidence:

    accuracy of c     = recall_c = n_cc / sum_d n_cd
    precision_c       = n_cc / sum_d n_dc
    F1_c              = 2 precision_c recall_c / (precision_c + recall_c)
    balanced accuracy = mean_c recall_c,   macro F1 = mean_c F1_c
    ECE               = sum_b (n_b / n) |hits_b / n_b - mean confidence in b|     (0 is perfect)

The means are over the classes that have examples; one that has none is named, and counts as nothing. The confidence is
the probability of the class that was said, its bins are 15 of equal width, ((b - 1) / 15, b / 15].

References
----------
Guo et al., ICML 2017, arXiv 1706.04599, equation 3 (ECE).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

NUM_BINS = 15
_LARGEST_MATRIX = 50  # classes, beyond which the largest cells are told alone
_MOST_CONFUSIONS = 50


@dataclass(frozen=True, eq=False)
class Judged:
    """Counts over examples whose class is known.

    Parameters
    ----------
    confusion
        (C, C) int64; row c, column d: examples of class c that were taken for d.
    bins
        (15, 3) float64; examples, hits and summed confidence of each bin of the confidence.
    """

    confusion: NDArray[np.int64]  # (C, C)
    bins: NDArray[np.float64]  # (15, 3)

    @classmethod
    def of(cls, labels: ArrayLike, said: ArrayLike, confidence: ArrayLike, *, num_classes: int) -> "Judged":
        """Count.

        Parameters
        ----------
        labels, said
            (N,) class ids in [0, num_classes): the true ones, and the model's.
        confidence
            (N,) the model's probability of the class that it says, in [0, 1]; NaN, where it has none, is 0.
        num_classes
            C.
        """
        true, found = np.asarray(labels, dtype=np.int64), np.asarray(said, dtype=np.int64)
        sure = np.nan_to_num(np.asarray(confidence, dtype=np.float64))
        confusion = np.zeros((num_classes, num_classes), dtype=np.int64)
        np.add.at(confusion, (true, found), 1)
        bins = np.zeros((NUM_BINS, 3))
        row = np.clip(np.ceil(sure * NUM_BINS).astype(np.int64) - 1, 0, NUM_BINS - 1)
        np.add.at(bins, row, np.stack([np.ones(len(sure)), true == found, sure], axis=1))
        return cls(confusion, bins)

    def __add__(self, other: "Judged") -> "Judged":
        return Judged(self.confusion + other.confusion, self.bins + other.bins)

    def cells(self) -> NDArray[np.int64]:
        """Return the cells of the confusion matrix that are not 0, (n, 3): true class, said class, examples."""
        places = np.argwhere(self.confusion)
        return np.concatenate([places, self.confusion[tuple(places.T)][:, None]], axis=1)

    @classmethod
    def from_cells(cls, cells: ArrayLike, bins: ArrayLike, *, num_classes: int) -> "Judged":
        """Read back what `cells` and `bins` say of `num_classes` classes."""
        confusion = np.zeros((num_classes, num_classes), dtype=np.int64)
        true, said, count = np.asarray(cells, dtype=np.int64).T
        confusion[true, said] = count
        return cls(confusion, np.asarray(bins, dtype=np.float64))

    def recall(self) -> NDArray[np.float64]:
        """Return the accuracy on each class in [0, 1], (C,), NaN for a class without an example."""
        return _shares(self.confusion.diagonal(), self.confusion.sum(axis=1))

    def accuracy_on(self, class_counts: ArrayLike) -> NDArray[np.float64]:
        """Return the accuracy in [0, 1] that is to be expected on other mixes of the classes.

        Parameters
        ----------
        class_counts
            (K, C) examples of each class in each mix; classes that were not tested are left out of it.

        Returns
        -------
        (K,), NaN for a mix of which no class was tested.
        """
        recall = self.recall()
        counts = np.where(np.isnan(recall), 0, np.asarray(class_counts))  # (K, C)
        return _shares((counts * np.nan_to_num(recall)).sum(axis=1), counts.sum(axis=1))

    def ece(self) -> float:
        """Return the expected calibration error, in [0, 1]; NaN without examples."""
        examples, hits, confidence = self.bins.T
        return float(np.abs(hits - confidence).sum() / examples.sum()) if examples.any() else float("nan")

    def summary(self, names: Sequence[str], *, classes: Sequence[int]) -> dict[str, Any]:
        """Return what ``metrics.json`` says of it.

        Parameters
        ----------
        names
            (C,) names of the classes.
        classes
            Those that the model could say, each of which gets an entry; the confusion matrix is in their order.
        """
        true, said, count = self.cells().T
        hits, num_examples, num_said = self.confusion.diagonal(), self.confusion.sum(axis=1), self.confusion.sum(axis=0)
        recall, f1 = self.recall(), _shares(2 * hits, num_examples + num_said)
        precision = np.nan_to_num(_shares(hits, num_said))  # 0 of a class that was never said
        tested = ~np.isnan(recall)
        wrong = sorted(
            ((int(n), int(c), int(d)) for c, d, n in zip(true, said, count, strict=True) if c != d),
            key=lambda one: (-one[0], one[1:]),
        )
        in_bin, right, confidence = self.bins.T
        found: dict[str, Any] = {
            "num_examples": int(num_examples.sum()),
            "accuracy": _mean(_shares(self.confusion.trace(), num_examples.sum())),
            "balanced_accuracy": _mean(recall[tested]),
            "macro_f1": _mean(f1[tested]),
            "ece": None if np.isnan(ece := self.ece()) else ece,
            "classes": [
                {
                    "class": names[c],
                    "num_examples": int(num_examples[c]),
                    **(
                        {"accuracy": float(recall[c]), "precision": float(precision[c]), "f1": float(f1[c])}
                        if tested[c]
                        else {}
                    ),
                }
                for c in classes
            ],
            "confusions": [
                {"class": names[c], "taken_for": names[d], "num_examples": n} for n, c, d in wrong[:_MOST_CONFUSIONS]
            ],
            "calibration": [
                {
                    "up_to": (b + 1) / NUM_BINS,
                    "num_examples": int(in_bin[b]),
                    "confidence": float(confidence[b] / in_bin[b]),
                    "accuracy": float(right[b] / in_bin[b]),
                }
                for b in np.flatnonzero(in_bin)
            ],
        }
        if len(classes) <= _LARGEST_MATRIX:
            found["confusion"] = self.confusion[np.ix_(classes, classes)].tolist()
        return found


def of_clients(hits: Mapping[int, tuple[int, int]]) -> dict[str, Any]:
    """Return what ``metrics.json`` says where each client judges its own examples, and tells hits and examples alone.

    Parameters
    ----------
    hits
        Partition id -> both. Empty: nothing was judged.
    """
    if not hits:
        return {}
    correct, total = (sum(column) for column in zip(*hits.values(), strict=True))
    return {
        "num_examples": total,
        "accuracy": _mean(_shares(correct, total)),
        "clients": [
            {"partition_id": partition, "num_examples": n, "accuracy": _mean(_shares(c, n))}
            for partition, (c, n) in sorted(hits.items())
        ],
        "remark": "The data stay on the nodes, which tell hits and examples: what was said of each class, and how "
        "sure the model was, is not known here. On a node: fedtalora evaluate",
    }


def _shares(part: ArrayLike, whole: ArrayLike) -> NDArray[np.float64]:
    """Divide, NaN where there is nothing to divide by."""
    of = np.asarray(whole, dtype=np.float64)
    shares: NDArray[np.float64] = np.divide(part, of, out=np.full(of.shape, np.nan), where=of > 0)
    return shares


def _mean(values: NDArray[np.float64]) -> float | None:
    """Return the mean, None where there is none: JSON has no word for NaN."""
    return float(np.mean(values)) if np.isfinite(values).any() else None
