"""States and updates from a seed, and the oracle: effective weights in float64, written without the library."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor

from fedtalora_flwr.aggregation import ClientUpdate, GlobalState, LoraFactors, Method, resolve
from fedtalora_flwr.config import RunConfig
from fedtalora_flwr.config.sources import defaults

LAYERS = {"blocks.0.attn.qkv": (7, 5), "blocks.1.mlp.fc2": (3, 11)}  # (d_out, d_in), unequal on purpose
NUM_CLASSES, FEATURE_DIM = 4, 6
BOTH = frozenset({"lora_A", "lora_B"})
SETTINGS = asdict(RunConfig.parse(defaults(Path(__file__).parents[2])))


def build(name: str) -> Method:
    """A method as a run with the defaults has it."""
    return resolve(name, SETTINGS)


def draw(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_state(
    generator: torch.Generator, *, rank: int = 2, scaling: float = 2.0, dense: bool = False, version: int = 0
) -> GlobalState:
    """A state in the midst of a run; `dense` pairs have their own rank and scaling."""

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def pair(d_out: int, d_in: int) -> LoraFactors:
        if dense:
            return replace(LoraFactors.dense(d_in=d_in, d_out=d_out), lora_B=randn(d_out, d_in))
        return LoraFactors(randn(rank, d_in), randn(d_out, rank), scaling)

    return GlobalState(
        adapters={name: pair(*shape) for name, shape in LAYERS.items()},
        head={"weight": randn(NUM_CLASSES, FEATURE_DIM), "bias": randn(NUM_CLASSES)},
        version=version,
    )


def make_update(
    state: GlobalState,
    partition_id: int,
    *,
    generator: torch.Generator,
    spread: float = 1.0,
    trainable: frozenset[str] = BOTH,
    class_counts: Sequence[int] | None = None,
) -> ClientUpdate:
    """A client that moved the trainable factors and its head by `spread` from the broadcast."""

    def moved(value: Tensor, moves: bool = True) -> Tensor:
        return value + spread * torch.randn(value.shape, generator=generator) * moves

    counts = (
        torch.randint(0, 40, (NUM_CLASSES,), generator=generator) + torch.tensor([1, 0, 0, 0])
        if class_counts is None
        else torch.tensor(class_counts)
    )
    return ClientUpdate(
        partition_id=partition_id,
        num_examples=int(counts.sum()),
        adapters={
            name: LoraFactors(
                moved(pair.lora_A, "lora_A" in trainable), moved(pair.lora_B, "lora_B" in trainable), pair.scaling
            )
            for name, pair in state.adapters.items()
        },
        head={name: moved(value) for name, value in state.head.items()},
        class_counts=counts,
        base_version=state.version,
    )


def make_updates(
    state: GlobalState,
    partitions: Sequence[int],
    *,
    generator: torch.Generator,
    spread: float = 1.0,
    trainable: frozenset[str] = BOTH,
) -> list[ClientUpdate]:
    return [make_update(state, p, generator=generator, spread=spread, trainable=trainable) for p in partitions]


def pristine_weights(generator: torch.Generator) -> dict[str, Tensor]:
    return {name: torch.randn(*shape, generator=generator) for name, shape in LAYERS.items()}


def effective(
    pristine: Mapping[str, Tensor], residual: Mapping[str, Tensor], adapters: Mapping[str, LoraFactors]
) -> dict[str, Tensor]:
    """W_0 + R + s B A of every layer, float64."""
    weights = {}
    for name, pair in adapters.items():
        weight = pristine[name].double() + pair.scaling * (pair.lora_B.double() @ pair.lora_A.double())
        weights[name] = weight + residual[name].double() if name in residual else weight
    return weights


def mean_of_clients(
    pristine: Mapping[str, Tensor], state: GlobalState, updates: Sequence[ClientUpdate]
) -> dict[str, Tensor]:
    """The clients' effective weights, averaged by their numbers of examples."""
    total = sum(update.num_examples for update in updates)
    mean = {name: torch.zeros_like(weight, dtype=torch.float64) for name, weight in pristine.items()}
    for update in updates:
        for name, weight in effective(pristine, state.residual, update.adapters).items():
            mean[name] += update.num_examples / total * weight
    return mean


def relative_error(got: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> float:
    """The largest over the layers of |got - wanted| / |wanted|."""
    assert got.keys() == wanted.keys()
    return max(float((got[name] - wanted[name]).norm() / wanted[name].norm()) for name in wanted)


def tensors_of(parts: GlobalState | ClientUpdate) -> dict[str, Tensor]:
    found = {f"head/{name}": value for name, value in parts.head.items()}
    for name, pair in parts.adapters.items():
        found |= {f"lora_A/{name}": pair.lora_A, f"lora_B/{name}": pair.lora_B}
    if isinstance(parts, GlobalState):
        found |= {f"residual/{name}": value for name, value in parts.residual.items()}
        found |= {f"extra/{name}": value for name, value in parts.extra.items()}
    return found
