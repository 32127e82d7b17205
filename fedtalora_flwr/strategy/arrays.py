"""What travels, as one ArrayRecord: PEFT's own keys, and beside them the few that exactness needs.

| key | what |
|---|---|
| ``<module>.lora_A.weight`` | (rank, d_in) float32, as PEFT names it |
| ``<module>.lora_B.weight`` | (d_out, rank) float32 |
| ``fedtalora.scaling`` | float64, the scaling of every module, in order of name |
| ``fedtalora.version`` | int64, the number of aggregations behind what was sent; a reply echoes it |
| ``fedtalora.residual.<module>`` | (d_out, d_in) float32, down only, where it is dense |
| ``fedtalora.left.<module>``, ``fedtalora.right.<module>`` | its factors, down only, where they hold fewer numbers |
| any other | another trainable parameter: a head, ``modules_to_save``, biases |

FedAvg can average a record of these keys too.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from flwr.app import Array, ArrayRecord
from torch import Tensor

from fedtalora_flwr.aggregation import LoraFactors, Step

LORA_A, LORA_B = ".lora_A.weight", ".lora_B.weight"
_SCALING, _VERSION = "fedtalora.scaling", "fedtalora.version"
_DENSE, _LEFT, _RIGHT = "fedtalora.residual.", "fedtalora.left.", "fedtalora.right."


@dataclass(frozen=True)
class PeftArrays:
    """The content of a record.

    Parameters
    ----------
    adapters
        The pair of every adapted module, by the module's name in the PEFT model.
    others
        All other arrays, untouched, by PEFT's keys.
    version
        Number of aggregations behind the state that was sent.
    residual
        What is added to the frozen weight of each module, in factors or (d_out, d_in) float32; none in a reply.
    """

    adapters: Mapping[str, LoraFactors]
    others: Mapping[str, Array]
    version: int
    residual: Mapping[str, Step | Tensor] = field(default_factory=dict)

    @classmethod
    def read(cls, record: ArrayRecord) -> "PeftArrays":
        """Read a record; shapes and numbers are not checked.

        Raises
        ------
        ValueError
            If a key is missing, or an array cannot be read.
        """
        arrays = dict(record)
        if not {_SCALING, _VERSION} <= arrays.keys():
            raise ValueError(
                f"the arrays have no {_SCALING} and {_VERSION}: make them by fedtalora_flwr.strategy.get_arrays(model)"
            )
        scaling, (version,) = _numbers(arrays, _SCALING), _numbers(arrays, _VERSION)
        names = _names(arrays, LORA_A)
        if names != _names(arrays, LORA_B) or len(names) != len(scaling):
            raise ValueError(f"{len(names)} of {LORA_A}, {len(scaling)} scalings: not a pair and a scaling a module")
        adapters = {
            name: LoraFactors(_tensor(arrays, name + LORA_A), _tensor(arrays, name + LORA_B), value)
            for name, value in zip(names, scaling, strict=True)
        }
        residual: dict[str, Step | Tensor] = {}
        for name in names:
            if _DENSE + name in arrays:
                residual[name] = _tensor(arrays, _DENSE + name)
            elif _LEFT + name in arrays:
                residual[name] = Step(_tensor(arrays, _LEFT + name), _tensor(arrays, _RIGHT + name))
        return cls(adapters, arrays, int(version), residual)

    def record(self) -> ArrayRecord:
        """Put all of it into one record."""
        names = sorted(self.adapters)
        tensors: dict[str, Tensor] = {}
        for name in names:
            tensors |= {name + LORA_A: self.adapters[name].lora_A, name + LORA_B: self.adapters[name].lora_B}
        for name, change in self.residual.items():
            if isinstance(change, Step):
                tensors |= {_LEFT + name: change.left, _RIGHT + name: change.right}
            else:
                tensors[_DENSE + name] = change
        tensors[_SCALING] = torch.tensor([self.adapters[name].scaling for name in names], dtype=torch.float64)
        tensors[_VERSION] = torch.tensor(self.version)
        return ArrayRecord({**{key: Array(value.contiguous()) for key, value in tensors.items()}, **self.others})


def _names(arrays: Mapping[str, Array], suffix: str) -> list[str]:
    return sorted(key.removesuffix(suffix) for key in arrays if key.endswith(suffix))


def _tensor(arrays: dict[str, Array], key: str) -> Tensor:
    """Take an array out, as a tensor that owns its memory."""
    if key not in arrays:
        raise ValueError(f"the arrays have no {key}")
    return tensor_of(key, arrays.pop(key))


def _numbers(arrays: dict[str, Array], key: str) -> list[float]:
    """Take an array out, as finite numbers."""
    values = _tensor(arrays, key).double().flatten()
    if not torch.isfinite(values).all():
        raise ValueError(f"{key} holds a number that is not finite")
    return [float(value) for value in values]


def tensor_of(key: str, array: Array) -> Tensor:
    """Read one array.

    Raises
    ------
    ValueError
        If its bytes are not what they declare, or of a type that torch does not have.
    """
    try:
        return torch.from_numpy(array.numpy())
    except (TypeError, ValueError, EOFError) as error:
        raise ValueError(f"{key} cannot be read: {error}") from None
