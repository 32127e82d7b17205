"""A language model's own head, which is frozen with the rest: no class rows, what is trained are the pairs alone."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from fedtalora_flwr.model.heads.base import Classifier, FeatureSums, Head


@dataclass(frozen=True)
class LanguageHead(Head):
    """Leave the next token to the backbone."""

    collects_sums: bool = False

    def row_dim(self, feature_dim: int) -> int:
        """Give 0: a class has a row only in name."""
        return 0

    def lifted_dim(self, feature_dim: int) -> int:
        """Give 0: no feature is summed."""
        return 0

    def classifier(self, trained: Mapping[str, Tensor], sums: FeatureSums) -> Classifier:
        """Give the rows, which are empty."""
        return Classifier(trained)


def create() -> LanguageHead:
    """Build the head; it has no settings."""
    return LanguageHead()
