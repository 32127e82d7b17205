"""The seam between a penalty and local training: what a client starts from, and a term of each step's loss.

Shape names: N examples of the client, b of a batch, d features, n classes of earlier tasks.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

Term = Callable[[Tensor, Tensor], Tensor]  # row numbers of the batch (b,), its features (b, d) -> a scalar


@dataclass(frozen=True)
class Start:
    """What a client begins a round with.

    Parameters
    ----------
    features
        Gives the client's features (N, d) under the broadcast model; computed when it is called.
    rows
        The broadcast class rows, on the device.
    old_classes
        (n,) int64, the classes of earlier tasks; none in the first.
    """

    features: Callable[[], Tensor]
    rows: Mapping[str, Tensor]
    old_classes: Tensor  # (n,)


class Penalty(ABC):
    """A term of the local loss.

    Attributes
    ----------
    uses_old_rows
        Whether clients need the class rows of earlier tasks, which otherwise stay on the server.
    """

    uses_old_rows: bool

    @abstractmethod
    def begin(self, start: Start) -> Term | None:
        """Give the term for a round of local training, or None where there is nothing to add."""
