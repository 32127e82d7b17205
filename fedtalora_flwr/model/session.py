"""What a process builds from the settings once and keeps: data, model, decoded examples.

The virtual clients of a simulation actor share these; the model is set from the server's state before each use.
"""

from collections.abc import Hashable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from cachetools import LRUCache

from fedtalora_flwr import aggregation
from fedtalora_flwr.config import ConfigError, RunConfig
from fedtalora_flwr.data import DataError, OwnReader, Source, TaskStream, build_stream, open_data
from fedtalora_flwr.data.source import Split
from fedtalora_flwr.model import backbones
from fedtalora_flwr.model.backbones import Backbone
from fedtalora_flwr.model.lora import AdaptedModel
from fedtalora_flwr.model.train import Examples, precision_of


@dataclass(frozen=True)
class FederatedData:
    """A data set and who holds which of it in which task."""

    source: Source
    stream: TaskStream


@lru_cache(maxsize=1)
def _opened(config: RunConfig) -> Source | OwnReader:
    return open_data(config.dataset, config.settings)


def own_reader(config: RunConfig) -> OwnReader | None:
    """Give what reads a node's own folder; None where all processes read one data set."""
    opened = _opened(config)
    return opened if isinstance(opened, OwnReader) else None


@lru_cache(maxsize=1)
def data_of(config: RunConfig) -> FederatedData:
    """Open the data and cut it into tasks and partitions; the same on every process for the same settings.

    Raises
    ------
    ValueError
        If the data cannot be read, or cannot be cut as the settings say, or every node has its own.
    """
    settings = config.settings
    source = _opened(config)
    if isinstance(source, OwnReader):
        raise DataError(f"dataset {config.dataset}: every node reads its own data, which only it can show")
    stream = build_stream(
        source,
        num_tasks=config.num_tasks,
        task_order=config.task_order,
        partition=config.partition,
        num_partitions=config.num_clients,
        seed=config.seed,
        settings=settings,
    )
    return FederatedData(source, stream)


@lru_cache(maxsize=1)
def model_of(config: RunConfig) -> AdaptedModel:
    """Build the backbone with its LoRA layers on the device of the settings.

    Raises
    ------
    ValueError
        If the weights cannot be had, the LoRA settings match nothing, or the backbone reads other data.
    """
    model = build_model(config)
    source = _opened(config)
    if isinstance(source, Source) and model.backbone.modality != source.modality:
        raise ConfigError(
            f"backbone {config.backbone} reads {model.backbone.modality}s, dataset {source.name} holds "
            f"{source.modality}s" + ("; set answer-column" if model.backbone.modality == "instruction" else "")
        )
    return model


def build_model(config: RunConfig, *, in_float32: bool = False) -> AdaptedModel:
    """Build the backbone with its LoRA layers on the device of the settings; no data are needed.

    Parameters
    ----------
    config
        The settings.
    in_float32
        Widen a backbone of fewer bits, so that what is computed is exact.

    Raises
    ------
    ValueError
        If the weights cannot be had, or the LoRA settings match nothing.
    """
    backbone = backbones.resolve(config.backbone, config.settings)
    if (backbone.modality == "instruction") != (config.head == "lm"):
        wanted = "set head=lm" if backbone.modality == "instruction" else "which is for a language model (lm:, smollm2)"
        raise ConfigError(f"backbone {config.backbone} reads {backbone.modality}s, head is {config.head}: {wanted}")
    backbone.feature_norm = config.feature_norm
    method = aggregation.resolve(config.method, config.settings)
    return AdaptedModel(
        placed(backbone.float() if in_float32 else backbone, config),
        rank=config.largest_rank,
        shared_rank=config.shared_rank,
        alpha=config.alpha,
        blocks=config.lora_blocks,
        targets=config.lora_targets,
        dense=method.dense,
        core=method.core,
    )


def placed(backbone: Backbone, config: RunConfig) -> Backbone:
    """Move a backbone to the device of the settings, and let it compute attention as is fast there.

    Raises
    ------
    ConfigError
        If the device is unknown or not there.
    """
    device = device_of(config)
    if device.type == "cpu" and precision_of(device, config.precision) == "bf16":
        backbone.unfuse_attention()
    return backbone.to(device)


def device_of(config: RunConfig) -> torch.device:
    """Resolve ``device``; ``auto`` is a GPU where there is one.

    Raises
    ------
    ConfigError
        If the device is unknown or not there.
    """
    gpu = torch.cuda.is_available()
    name = ("cuda" if gpu else "cpu") if config.device == "auto" else config.device
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"device must be auto, cpu, cuda or cuda:N, got {config.device!r}") from None
    if device.type == "cuda" and not gpu:
        raise ConfigError(f"device {config.device!r}: no GPU is visible here; use device = auto or cpu")
    return device


def training_examples(config: RunConfig, *, partition_id: int, task_id: int) -> Examples:
    """Decode what a partition holds of a task, or take it from memory."""
    data = data_of(config)
    rows = data.stream.partitions[task_id][partition_id]
    return decoded(config, data.source.train, rows, source=data.source, key=("train", partition_id, task_id))


def test_examples(config: RunConfig, *, task_id: int) -> Examples:
    """Decode the test data of a task, or take it from memory."""
    data = data_of(config)
    rows = data.stream.test_rows(data.source.test.labels, task_id)
    return decoded(config, data.source.test, rows, source=data.source, key=("test", task_id))


def slots_of(config: RunConfig, *, partition_id: int) -> tuple[int, ...]:
    """List the tasks of a partition that are trained at once, by the number of their slot."""
    return data_of(config).stream.slots_of(
        partition_id, num_tasks=config.last_task, min_share=config.min_slot_share, seed=config.seed
    )


def decoded(config: RunConfig, split: Split, rows: np.ndarray, *, source: Source, key: Hashable) -> Examples:
    """Decode rows of a split, or take them from memory, where they are under `key`."""
    cache = _decoded_of(config)
    if key not in cache:
        inputs = model_of(config).backbone.encode(split, rows, source=source)
        examples = Examples(inputs, torch.from_numpy(split.labels[rows]).long())
        if _size(examples) > cache.maxsize:
            return examples
        cache[key] = examples
    return cache[key]


@lru_cache(maxsize=1)
def _decoded_of(config: RunConfig) -> LRUCache[Hashable, Examples]:
    return LRUCache(maxsize=int(config.cache_gb * 2**30), getsizeof=_size)


def _size(examples: Examples) -> int:
    return examples.inputs.nbytes + examples.labels.nbytes
