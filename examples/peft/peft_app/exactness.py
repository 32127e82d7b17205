"""How far a strategy's weights are from the weighted mean of the clients' weights, by PEFT's own merge."""

from collections.abc import Iterable

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from torch import Tensor

from fedtalora_flwr.strategy import set_arrays
from peft_app.models import build


def effective_weights(model: PeftModel) -> dict[str, Tensor]:
    """Merge the pairs into the weights, in float64; the model is of no further use."""
    names = [name for name, module in model.base_model.model.named_modules() if isinstance(module, LoraLayer)]
    merged = model.double().merge_and_unload()
    return {name: merged.get_submodule(name).weight.detach() for name in names}


class Measured(FedAvg):
    """A strategy with one metric more: ``exactness-error``, the largest relative Frobenius error over the layers."""

    kind: str  # of model

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Remember what is sent."""
        self._start = arrays
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Aggregate, and compare with the mean of the weights."""
        replies = list(replies)
        arrays, metrics = super().aggregate_train(server_round, replies)
        if arrays is not None and metrics is not None:
            metrics["exactness-error"] = self._error(replies, arrays)
        return arrays, metrics

    def _error(self, replies: list[Message], arrays: ArrayRecord) -> float:
        total = sum(reply.content["metrics"]["num-examples"] for reply in replies)
        mean: dict[str, Tensor] = {}
        for reply in replies:
            share = reply.content["metrics"]["num-examples"] / total
            for name, weight in self._weights_of_client(reply.content["arrays"]).items():
                mean[name] = mean.get(name, 0) + share * weight
        model = build(self.kind)
        set_arrays(model, arrays)
        got = effective_weights(model)
        return max(float((got[name] - mean[name]).norm() / mean[name].norm()) for name in mean)

    def _weights_of_client(self, reply: ArrayRecord) -> dict[str, Tensor]:
        model = build(self.kind)
        set_arrays(model, self._start)
        trained = reply.to_torch_state_dict()
        set_peft_model_state_dict(model, {key: trained[key] for key in get_peft_model_state_dict(model)})
        return effective_weights(model)
