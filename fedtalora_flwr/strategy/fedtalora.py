"""Fed-TaLoRA as a Flower strategy: FedAvg whose mean of LoRA pairs loses nothing.

With p_k = n_k / sum n, the server sends the means Bbar, Abar of the clients' pairs, and for each layer what they lose,
which accumulates:

    R_{t+1} = R_t + s * sum_k p_k (B_k - Bbar)(A_k - Abar)

A client sets ``W = W_0 + R``. So the model ``W_0 + R_{t+1} + s Bbar Abar`` is the weighted mean of the clients' models
(see `fedtalora_flwr.aggregation.methods.fedtalora`, which does the sum). All other trainable parameters are averaged by
Flower's own code.
"""

import logging
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg
from flwr.serverapp.strategy.strategy_utils import aggregate_arrayrecords
from torch import Tensor

from fedtalora_flwr.aggregation import (
    Aggregator,
    BadUpdate,
    ClientUpdate,
    GlobalState,
    Step,
    check_update,
    completed,
    resolve,
)
from fedtalora_flwr.aggregation.factors import added, pays
from fedtalora_flwr.strategy.arrays import PeftArrays, tensor_of

Layout = tuple[tuple[str, int], ...]
log = logging.getLogger("flwr")  # the lines stand between Flower's own


class FedTaLoRA(FedAvg):
    """FedAvg for LoRA models of PEFT's, exact in the effective weights.

    Arrays are what `get_arrays` gives and `set_arrays` takes. A reply that cannot be right is refused with the node's
    id and the reason in the log, and the round is averaged over the others.

    Parameters
    ----------
    *options, **named_options
        Those of ``flwr.serverapp.strategy.FedAvg``: fractions, minimum nodes, keys, functions over metrics.
    residual
        ``accumulate``: exact. ``off``: plain means of the pairs, as FedAvg.

    Raises
    ------
    ValueError
        If `residual` is neither.
    """

    def __init__(self, *options: Any, residual: str = "accumulate", **named_options: Any) -> None:
        super().__init__(*options, **named_options)
        if residual not in ("accumulate", "off"):
            raise ValueError(f"residual must be accumulate or off, got {residual!r}")
        self.residual = residual
        aggregator = resolve("fedtalora", {"residual": residual})
        assert isinstance(aggregator, Aggregator)
        self._aggregator = aggregator

    def summary(self) -> None:
        """Log the settings."""
        super().summary()
        log.info("\t└──> Residual: %s", self.residual)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Configure the next round of training, and remember what it starts from.

        Raises
        ------
        ValueError
            If `arrays` were not made by `get_arrays`.
        """
        self._sent = PeftArrays.read(arrays)
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Aggregate the replies that can be right; without any the arrays stay as they are."""
        messages, _ = self._check_and_log_replies(replies, is_train=True, validate=False)
        sent = self._sent
        state = GlobalState(
            adapters=sent.adapters,
            residual={name: added(change, to=None) for name, change in sent.residual.items()},
            version=sent.version,
        )
        usual = _usual_metrics(messages)
        taken: list[tuple[ClientUpdate, Mapping[str, Array], RecordDict]] = []
        for message in sorted(messages, key=lambda message: message.metadata.src_node_id):
            node_id = message.metadata.src_node_id
            try:
                arrays, weight = self._read(message.content, usual=usual)
                _check_others(sent.others, arrays.others)
                taken.append((_update(state, arrays, weight=weight, node_id=node_id), arrays.others, message.content))
            except ValueError as error:
                log.warning("\t> Refused the reply of node %d: %s", node_id, error)
        if not taken:
            return None, None
        new_state = self._aggregator.aggregate(state, [update for update, _, _ in taken])
        residual = {
            name: _grown(sent.residual.get(name), new_state.step.get(name), dense=dense)
            for name, dense in new_state.residual.items()
        }
        others = _mean([(update.num_examples, others) for update, others, _ in taken])
        metrics = self.train_metrics_aggr_fn([content for _, _, content in taken], self.weighted_by_key)
        return PeftArrays(new_state.adapters, others, new_state.version, residual).record(), metrics

    def _read(self, content: RecordDict, *, usual: Layout) -> tuple[PeftArrays, float]:
        """Read the arrays of a reply and its weight, as FedAvg finds them: the only record of their kind."""
        if len(content.array_records) != 1 or len(content.metric_records) != 1:
            kinds = f"{len(content.array_records)} ArrayRecords and {len(content.metric_records)} MetricRecords"
            raise BadUpdate(f"has {kinds}, expected one of each")
        (record,), (metrics,) = content.array_records.values(), content.metric_records.values()
        weight = metrics.get(self.weighted_by_key)
        if not isinstance(weight, (int, float)) or not 0 < weight < math.inf:
            raise BadUpdate(f"metric {self.weighted_by_key} is {weight}, expected a positive number")
        if _layout(metrics) != usual:
            raise BadUpdate(f"has the metrics {', '.join(metrics)}; most replies have {', '.join(dict(usual))}")
        return PeftArrays.read(record), weight


def _layout(metrics: MetricRecord) -> Layout:
    """Give the metrics' names, each with its length where it is a list."""
    return tuple(sorted((key, len(value) if isinstance(value, list) else 0) for key, value in metrics.items()))


def _usual_metrics(messages: Sequence[Message]) -> Layout:
    """Give the metrics that most replies have: a mean over replies that differ in them would be wrong."""
    found = Counter(_layout(record) for message in messages for record in message.content.metric_records.values())
    return max(found, key=lambda layout: found[layout], default=())


def _update(state: GlobalState, arrays: PeftArrays, *, weight: float, node_id: int) -> ClientUpdate:
    """Check a reply's pairs, and complete those of a lower rank by the directions that their client kept frozen."""
    if arrays.version != state.version:
        raise BadUpdate(
            f"trained on version {arrays.version}, version {state.version} was sent: load it by "
            "fedtalora_flwr.strategy.set_arrays(model, arrays)"
        )
    update = ClientUpdate(
        partition_id=node_id,
        num_examples=1,  # the weight, which need not be a count, is put in below
        adapters=arrays.adapters,
        head={},
        class_counts=torch.ones(1, dtype=torch.int64),
        base_version=arrays.version,
    )
    check_update(state, update)
    adapters = {name: completed(pair, state.adapters[name]) for name, pair in arrays.adapters.items()}
    return replace(update, num_examples=weight, adapters=adapters)


def _check_others(sent: Mapping[str, Array], theirs: Mapping[str, Array]) -> None:
    if sent.keys() != theirs.keys():
        missing, unknown = sorted(sent.keys() - theirs.keys())[:3], sorted(theirs.keys() - sent.keys())[:3]
        raise BadUpdate(f"arrays: missing {missing}, unknown {unknown}")
    for key, array in theirs.items():
        value, shape = tensor_of(key, array), tensor_of(key, sent[key]).shape
        if value.shape != shape:
            raise BadUpdate(f"{key} has shape {tuple(value.shape)}, expected {tuple(shape)}")
        if not torch.isfinite(value).all():
            raise BadUpdate(f"{key} holds a number that is not finite")


def _mean(others: Sequence[tuple[float, Mapping[str, Array]]]) -> Mapping[str, Array]:
    """Average all arrays but the pairs as FedAvg does, by its own code."""
    records = [
        RecordDict({"arrays": ArrayRecord(dict(arrays)), "metrics": MetricRecord({"weight": weight})})
        for weight, arrays in others
    ]
    return aggregate_arrayrecords(records, "weight")


def _grown(before: Step | Tensor | None, step: Step | None, *, dense: Tensor) -> Step | Tensor:
    """Give a layer's new residual as it is sent: the steps side by side while they hold fewer numbers than `dense`."""
    if step is None or isinstance(before, Tensor):
        return dense
    if before is not None:
        step = Step(torch.cat([before.left, step.left], 1), torch.cat([before.right, step.right], 0))
    return step if pays(step.left.shape[1], step.shape) else dense
