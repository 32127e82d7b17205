"""The seam between a penalty and local training: what a client starts from, and a term of each step's loss.

Shape names: N examples of the client, b of a batch, d features, n classes of earlier tasks. Trained LoRA factors go by
``lora_A/<module>`` and ``lora_B/<module>``.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

Term = Callable[[Tensor, Tensor], Tensor]  # row numbers of the batch (b,), its features (b, d) -> a scalar


@dataclass(frozen=True)
class Memory:
    """What the server keeps of finished tasks for a penalty that remembers.

    Parameters
    ----------
    anchor
        The trained factors at the end of the last finished task.
    fisher
        For each of their numbers, the mean squared gradient of the log-likelihood (the diagonal of the Fisher
        information), summed over the finished tasks.
    """

    anchor: Mapping[str, Tensor] = field(default_factory=dict)
    fisher: Mapping[str, Tensor] = field(default_factory=dict)

    def with_task(self, anchor: Mapping[str, Tensor], fisher: Mapping[str, Tensor]) -> "Memory":
        """Give the memory with one more finished task: the anchor moves, the Fisher adds up."""
        return Memory(anchor, {key: value + self.fisher.get(key, 0) for key, value in fisher.items()})


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
    factors
        The LoRA factors that are trained, as they change.
    memory
        Of finished tasks, on the device; empty unless the penalty remembers, and in the first task.
    """

    features: Callable[[], Tensor]
    rows: Mapping[str, Tensor]
    old_classes: Tensor  # (n,)
    factors: Mapping[str, Tensor] = field(default_factory=dict)
    memory: Memory = field(default_factory=Memory)


class Penalty(ABC):
    """A term of the local loss.

    Attributes
    ----------
    uses_old_rows
        Whether clients need the class rows of earlier tasks, which otherwise stay on the server.
    remembers
        Whether the server gathers a `Memory` at the end of each task, and sends it with every later order to train.
    """

    uses_old_rows: bool
    remembers: bool = False

    @abstractmethod
    def begin(self, start: Start) -> Term | None:
        """Give the term for a round of local training, or None where there is nothing to add, as in the first task."""
