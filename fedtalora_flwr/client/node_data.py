"""What a node holds: its share of a data set that all processes read, or data of its own.

`SharedPartition` and `LocalFolder` answer the same questions; of a folder a node can also give what it has held out.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from fedtalora_flwr.client.versions import version_store
from fedtalora_flwr.config import ConfigError, RunConfig
from fedtalora_flwr.data import ClassList, DataError, OwnData, Source, Split
from fedtalora_flwr.data.faults import refusal
from fedtalora_flwr.data.source import NO_ROWS, Modality
from fedtalora_flwr.model.session import data_of, decoded, model_of, own_reader, training_examples
from fedtalora_flwr.model.train import Examples
from fedtalora_flwr.wire import Hello, WireError


@dataclass(frozen=True)
class SharedPartition:
    """A partition of a data set that all processes read."""

    config: RunConfig
    partition_id: int

    @property
    def tasks(self) -> Sequence[Sequence[int]]:
        """Class ids by task id."""
        return data_of(self.config).stream.tasks

    @property
    def num_classes(self) -> int:
        """Classes of the data set."""
        return data_of(self.config).source.num_classes

    def hello(self, *, num_partitions: int) -> Hello:
        """Say what of the data set is held."""
        data = data_of(self.config)
        share = data.stream.shares(data.source.train.labels)[self.partition_id]
        return Hello(
            partition_id=self.partition_id,
            num_partitions=num_partitions,
            partition_hash=share.partition_hash,
            class_counts=torch.from_numpy(share.class_counts),
            held=tuple(version_store(self.config).digests()),
        )

    def check(self) -> None:
        """Decode the training examples of all tasks that will be run."""
        for task_id in range(self.config.last_task):
            self.training(task_id)

    def training(self, task_id: int) -> Examples:
        """Give the training examples of a task."""
        return training_examples(self.config, partition_id=self.partition_id, task_id=task_id)


@dataclass(frozen=True)
class LocalFolder:
    """Data that the node brings, under the rows that the server has given to their names.

    Parameters
    ----------
    data
        What is in the node's folder now.
    classes
        What the server has told; a class that is not among them waits for the next task.
    """

    config: RunConfig
    partition_id: int
    data: OwnData
    classes: ClassList

    @property
    def tasks(self) -> Sequence[Sequence[int]]:
        """Class rows by task id."""
        return self.classes.tasks

    @property
    def num_classes(self) -> int:
        """Classes that the server has told."""
        return len(self.classes.names)

    def hello(self, *, num_partitions: int) -> Hello:
        """Say which classes are held, by name."""
        return Hello(
            partition_id=self.partition_id,
            num_partitions=num_partitions,
            partition_hash=self.data.digest,
            class_counts=torch.zeros(0, dtype=torch.int64),
            held=tuple(version_store(self.config).digests()),
            own=self.data.held,
            remarks=self.data.remarks,
        )

    def check(self) -> None:
        """Decode the examples of the classes that the server does not know yet.

        Raises
        ------
        DataError
            If files cannot be used; the message names them all.
        """
        try:
            self._decode(self.data.unknown(self.classes))
        except DataError:
            if faults := self.data.image_faults():
                raise DataError(refusal(faults)) from None
            raise

    def training(self, task_id: int) -> Examples:
        """Give the training examples of a task."""
        return self._examples("train", task_id)

    def held_out(self, task_id: int) -> Examples:
        """Give the held-out examples of a task."""
        return self._examples("test", task_id)

    def _examples(self, which: Literal["train", "test"], task_id: int) -> Examples:
        return self._decode(self.data.split(which, task_id, self.classes), which, task_id)

    def _decode(self, split: Split, *what: object) -> Examples:
        backbone = model_of(self.config).backbone
        if self.data.modality not in (None, backbone.modality):
            raise ConfigError(
                f"backbone {self.config.backbone} reads {backbone.modality}s, data-path holds {self.data.modality}s"
            )
        key = (*what, str(self.data.root), self.data.digest, split.labels.tobytes())
        return decoded(self.config, split, np.arange(len(split)), source=_described(split, backbone.modality), key=key)


def _described(split: Split, modality: Modality) -> Source:
    """Describe examples to a backbone; images are stored at the size that it takes, the same on every node."""
    one = Split(labels=np.zeros(1, dtype=np.int64), read=split.read)
    return Source("data-path", modality, ("",), train=one, test=NO_ROWS, image_side=float("inf"))


def node_data_of(
    config: RunConfig, node_config: Mapping[str, Any], *, partition_id: int, classes: ClassList
) -> SharedPartition | LocalFolder:
    """Open what this node holds.

    Parameters
    ----------
    config
        The run's settings.
    node_config
        The node's own: ``data-path`` where the data are the node's.
    partition_id
        Its partition.
    classes
        The names that the server has told, where the data are the node's.

    Raises
    ------
    WireError
        If the node should bring data and says not where they are.
    DataError
        If its folder cannot be read.
    """
    reader = own_reader(config)
    if reader is None:
        return SharedPartition(config, partition_id)
    # In simulation all nodes have one config: the run's own path may then name the node's folder.
    path = str(node_config.get("data-path", "")) or config.data_path.replace("{partition-id}", str(partition_id))
    if not path:
        raise WireError(
            "this node has no data-path; start it with fedtalora supernode --data-path, or put data-path into its "
            "--node-config"
        )
    return LocalFolder(config, partition_id, reader.read(path), classes)
