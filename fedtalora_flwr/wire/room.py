"""The sizes that a client's own model and data have: an order that speaks of others is refused before it is followed.

A few bytes can declare a great deal: a number of classes, a tensor without an element whose product with another is
huge, a shape that broadcasts. None of it is made here unless the client itself would come to that size.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NoReturn

from torch import Tensor

from fedtalora_flwr.aggregation import LoraFactors
from fedtalora_flwr.residual import Patch
from fedtalora_flwr.wire.errors import WireError
from fedtalora_flwr.wire.records import pack_factors


@dataclass(frozen=True)
class Room:
    """What a client knows of its own.

    Parameters
    ----------
    num_classes
        Classes of its data, or those that it was told by name.
    num_tasks
        Tasks of the run.
    widths
        Features that class rows may be on: the backbone's, and those that the head makes of them.
    factors
        Shape of each factor of its model, by ``lora_A/<module>`` and ``lora_B/<module>``.
    fixed
        Shapes of what the base of its model holds in place of residuals (see `aggregation.core`).
    """

    num_classes: int
    num_tasks: int
    widths: frozenset[int]
    factors: Mapping[str, tuple[int, ...]]
    fixed: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def require_head(self, head: Mapping[str, Tensor], num_classes: int) -> None:
        """Refuse class rows of another kind, or more classes than there are.

        Raises
        ------
        WireError
            If there is no room for it; so too below.
        """
        if not 0 <= num_classes <= self.num_classes:
            raise WireError(f"num-classes is {num_classes}, this node knows {self.num_classes} classes")
        wanted: dict[str, set[tuple[int, ...]]] = {"weight": {(width,) for width in self.widths}, "bias": {()}}
        for name, rows in head.items():
            if tuple(rows.shape[1:]) not in wanted.get(name, set()):
                raise WireError(
                    f"head {name[:40]} has rows of shape {tuple(rows.shape[1:])}, this node's are a weight of "
                    f"{' or '.join(map(str, sorted(self.widths)))} numbers and a bias of one"
                )

    def require_task(self, task_id: int) -> None:
        """Refuse a task that the run does not have."""
        if not 0 <= task_id < self.num_tasks:
            raise WireError(f"task-id is {task_id}, the run has {self.num_tasks} tasks")

    def require_factors(self, what: str, tensors: Mapping[str, Tensor]) -> None:
        """Refuse what is no factor of the model, or has another shape than the factor of its name."""
        for key, value in tensors.items():
            if tuple(value.shape) != self.factors.get(key):
                factor, _, module = key.partition("/")
                self._refuse(f"{what} {factor} of {module}", value, self.factors.get(key))

    def require_pairs(self, adapters: Mapping[str, LoraFactors]) -> None:
        """Refuse pairs that are not the model's."""
        self.require_factors("the pair's factor", pack_factors(adapters))

    def require_patch(self, patch: Patch) -> None:
        """Refuse steps and residuals of layers that the model does not adapt, or of another shape than theirs."""
        for name, value in patch.dense.items():
            if tuple(value.shape) != (wanted := self.fixed.get(name, self._layer(name))):
                self._refuse(f"the residual of {name}", value, wanted)
        for step in patch.steps:
            for name, change in step.items():
                layer, inner = self._layer(name), change.left.shape[-1]
                if layer is None or tuple(change.left.shape) != (layer[0], inner):
                    self._refuse(f"a step's left factor of {name}", change.left, (layer[0], inner) if layer else None)
                if tuple(change.right.shape) != (inner, layer[1]):
                    self._refuse(f"a step's right factor of {name}", change.right, (inner, layer[1]))

    def _layer(self, name: str) -> tuple[int, int] | None:
        """Give an adapted layer's (d_out, d_in), where it can have a residual."""
        if self.fixed:
            return None
        lora_B, lora_A = self.factors.get(f"lora_B/{name}"), self.factors.get(f"lora_A/{name}")
        return (lora_B[0], lora_A[1]) if lora_B and lora_A else None

    @staticmethod
    def _refuse(what: str, value: Tensor, wanted: tuple[int, ...] | None) -> NoReturn:
        room = f"this node's is {wanted}" if wanted else "this node's model has none"
        raise WireError(f"{what[:120]} has shape {tuple(value.shape)}, {room}")
