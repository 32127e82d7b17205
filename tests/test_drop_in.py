"""FedTaLoRA in the place of FedAvg: Flower's own loop around PEFT models, measured by PEFT's own merge."""

import copy
import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fedtalora_flwr.launch.in_process import LocalGrid
from fedtalora_flwr.strategy import FedTaLoRA, NotExact, get_arrays, set_arrays

D_IN, D_HIDDEN, CLASSES = 7, 11, 3
NUM_CLIENTS, ROUNDS = 3, 4
LAYERS = ("first", "second")


class Net(nn.Module):
    """A Linear, a transposed Conv1D and a head; the same weights at every call."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, D_IN)
        self.first = nn.Linear(D_IN, D_HIDDEN)
        self.second = Conv1D(D_IN, D_HIDDEN)
        self.square = nn.Conv2d(1, 1, 3)
        self.head = nn.Linear(D_IN, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))


def build(**changes: Any) -> PeftModel:
    torch.manual_seed(5)
    options = {"r": 2, "lora_alpha": 6, "target_modules": list(LAYERS), "modules_to_save": ["head"]} | changes
    return get_peft_model(Net(), LoraConfig(**options))


def merged(model: PeftModel) -> dict[str, Tensor]:
    """The effective weights as PEFT itself makes them, in float64."""
    plain = copy.deepcopy(model).double().merge_and_unload()
    return {name: plain.get_submodule(name).weight.detach() for name in LAYERS}


def trained(model: PeftModel, partition: int) -> None:
    generator = torch.Generator().manual_seed(partition)
    x = torch.randn(20, D_IN, generator=generator)
    y = torch.randint(CLASSES, (20,), generator=generator)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(10):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()


class Federation:
    """Clients that train, with a note of the effective weights that each ends with."""

    def __init__(self, model_of: Callable[[int], PeftModel], *, spoil: Callable[[RecordDict], None] | None = None):
        self.model_of, self.spoil = model_of, spoil
        self.weights: list[tuple[int, dict[str, Tensor]]] = []
        self.errors: list[float] = []
        self.records: list[ArrayRecord] = []

    def client(self, message: Message, context: Context) -> Message:
        partition = int(context.node_config["partition-id"])
        model, num_examples = self.model_of(partition), 10 + 7 * partition
        set_arrays(model, message.content["arrays"])
        trained(model, partition)
        metrics = MetricRecord({"num-examples": num_examples, "loss": 0.5})
        content = RecordDict({"arrays": get_arrays(model), "metrics": metrics})
        if self.spoil is not None and partition == 1:
            self.spoil(content)
        else:
            self.weights.append((num_examples, merged(model)))
        return Message(content, reply_to=message)

    def evaluate(self, server_round: int, arrays: ArrayRecord) -> None:
        """Compare the aggregate with the weighted mean of the clients' effective weights."""
        if server_round:
            self.records.append(arrays)
            model, total = self.model_of(0), sum(n for n, _ in self.weights)
            set_arrays(model, arrays)
            got = merged(model)
            mean = {name: sum(n / total * weights[name] for n, weights in self.weights) for name in got}
            self.errors.append(max(float((got[name] - mean[name]).norm() / mean[name].norm()) for name in got))
        self.weights.clear()

    def run(self, strategy: FedAvg, *, rounds: int = ROUNDS, initial: ArrayRecord | None = None) -> Sequence[float]:
        grid = LocalGrid(self.client, {}, NUM_CLIENTS)
        strategy.start(grid, initial or get_arrays(self.model_of(0)), rounds, evaluate_fn=self.evaluate)
        assert len(self.errors) >= rounds
        return self.errors


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"first": 3}, "alpha_pattern": {"second": 5}},
        {"r": 1},
        {"r": 7},
        {"bias": "lora_only"},
    ],
    ids=str,
)
def test_model_is_the_weighted_mean_of_the_clients_models_in_every_round(options):
    assert max(Federation(lambda _: build(**options)).run(FedTaLoRA(fraction_evaluate=0.0))) < 1e-6


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("alphas", [(6, 6, 6), (6, 3, 2)], ids=["one-alpha", "one-scaling"])
def test_clients_of_lower_rank_take_part_exactly(alphas, rslora):
    ranks = (3, 2, 1)
    federation = Federation(lambda k: build(r=ranks[k], lora_alpha=alphas[k], use_rslora=rslora))
    assert max(federation.run(FedTaLoRA(fraction_evaluate=0.0))) < 1e-6


def test_fedavg_and_the_residual_off_are_far_from_it():
    for strategy in (FedAvg(fraction_evaluate=0.0), FedTaLoRA(residual="off", fraction_evaluate=0.0)):
        assert min(Federation(lambda _: build()).run(strategy)) > 1e-3


def test_a_second_start_goes_on_from_the_arrays_of_the_first():
    federation = Federation(lambda _: build())
    federation.run(FedTaLoRA(fraction_evaluate=0.0), rounds=2)
    errors = federation.run(FedTaLoRA(fraction_evaluate=0.0), rounds=2, initial=federation.records.pop())
    assert len(errors) == 4 and max(errors) < 1e-6


def test_residual_travels_in_factors_until_the_dense_one_is_smaller():
    federation = Federation(lambda _: build(r=1))
    federation.run(FedTaLoRA(fraction_evaluate=0.0))
    name = "base_model.model.first"
    shapes = [
        {key: array.shape for key, array in record.items() if key.endswith(f".{name}")} for record in federation.records
    ]
    left, right, dense = f"fedtalora.left.{name}", f"fedtalora.right.{name}", f"fedtalora.residual.{name}"
    assert shapes[0] == {left: (D_HIDDEN, 2), right: (2, D_IN)}  # (K-1) r = 2
    assert shapes[1] == {left: (D_HIDDEN, 4), right: (4, D_IN)}
    assert shapes[2] == shapes[3] == {dense: (D_HIDDEN, D_IN)}  # 6 (11 + 7) > 77


def test_loading_sets_the_weights_and_never_adds():
    federation = Federation(lambda _: build())
    federation.run(FedTaLoRA(fraction_evaluate=0.0), rounds=2)
    once, twice, untouched = build(), build(), build()
    for record in federation.records:
        set_arrays(twice, record)
        set_arrays(twice, record)
    set_arrays(once, federation.records[-1])
    assert all(torch.equal(value, merged(once)[name]) for name, value in merged(twice).items())
    set_arrays(twice, get_arrays(untouched))  # without a residual the weight is W_0 again
    assert all(torch.equal(value, merged(untouched)[name]) for name, value in merged(twice).items())


def test_the_weight_kept_apart_is_not_saved_with_the_model():
    federation, model = Federation(lambda _: build()), build()
    keys = model.state_dict().keys()
    federation.run(FedTaLoRA(fraction_evaluate=0.0), rounds=1)
    set_arrays(model, federation.records[0])
    assert model.state_dict().keys() == keys


def test_other_parameters_are_averaged_as_fedavg_does():
    records = []
    for strategy in (FedAvg(fraction_evaluate=0.0), FedTaLoRA(fraction_evaluate=0.0)):
        federation = Federation(lambda _: build())
        federation.run(strategy, rounds=1)
        records.append(federation.records[0])
    heads = [key for key in records[0] if "head" in key]
    assert sorted(heads) == ["base_model.model.head.bias", "base_model.model.head.weight"]
    for key in heads:  # FedAvg sums in the order of arrival, which Flower draws
        np.testing.assert_allclose(records[0][key].numpy(), records[1][key].numpy(), rtol=1e-5, atol=1e-7)


def test_keys_are_those_of_peft():
    model = build()
    keys = {key for key in get_arrays(model) if not key.startswith("fedtalora.")}
    assert keys == get_peft_model_state_dict(model).keys()


def replaced(content: RecordDict, key: str, value: np.ndarray) -> None:
    arrays = content["arrays"]
    assert key in arrays
    arrays[key] = Array(value)


A = "base_model.model.first.lora_A.weight"
SPOILED: dict[str, tuple[Callable[[RecordDict], Any], str]] = {
    "nan": (
        lambda c: replaced(c, A, np.full((2, D_IN), np.nan, np.float32)),
        "first.lora_A holds a number that is not",
    ),
    "nan in a head": (
        lambda c: replaced(c, "base_model.model.head.bias", np.full(CLASSES, np.nan, np.float32)),
        "head.bias holds a number that is not finite",
    ),
    "shape": (lambda c: replaced(c, A, np.zeros((2, D_IN + 1), np.float32)), "do not fit (11, rank) @ (rank, 7)"),
    "larger rank": (
        lambda c: (
            replaced(c, A, np.zeros((3, D_IN), np.float32)),
            replaced(c, A.replace("_A", "_B"), np.zeros((D_HIDDEN, 3), np.float32)),
        ),
        "rank 3 is more than the run's 2",
    ),
    "missing key": (lambda c: c["arrays"].pop(A), "not a pair and a scaling a module"),
    "other keys": (lambda c: c["arrays"].pop("base_model.model.head.bias"), "missing ['base_model.model.head.bias']"),
    "no scaling": (lambda c: c["arrays"].pop("fedtalora.scaling"), "make them by fedtalora_flwr.strategy.get_arrays"),
    "another version": (lambda c: replaced(c, "fedtalora.version", np.array(4)), "set_arrays(model, arrays)"),
    "infinite version": (lambda c: replaced(c, "fedtalora.version", np.array(np.inf)), "is not finite"),
    "two versions": (lambda c: replaced(c, "fedtalora.version", np.array([0, 0])), "too many values"),
    "bytes": (lambda c: c["arrays"].update({A: Array("float32", (2, 7), "numpy.ndarray", b"?")}), "cannot be read"),
    "no metrics": (lambda c: c.pop("metrics"), "has 1 ArrayRecords and 0 MetricRecords"),
    "other metrics": (lambda c: c["metrics"].pop("loss"), "most replies have loss, num-examples"),
    "no weight": (lambda c: c["metrics"].update({"num-examples": float("nan")}), "expected a positive number"),
}


@pytest.mark.parametrize("case", SPOILED)
def test_broken_reply_is_refused_by_name_and_the_others_are_averaged(case, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("flwr"), "propagate", True)
    spoil, reason = SPOILED[case]
    federation = Federation(lambda _: build(), spoil=spoil)
    assert max(federation.run(FedTaLoRA(fraction_evaluate=0.0), rounds=1)) < 1e-6
    (refusal,) = [record.getMessage() for record in caplog.records if "Refused" in record.getMessage()]
    assert "the reply of node 101: " in refusal and reason in refusal


def test_a_round_of_which_every_reply_is_refused_changes_nothing():
    def client(message: Message, _: Context) -> Message:
        return Message(RecordDict(), reply_to=message)

    initial = get_arrays(build())
    result = FedTaLoRA(fraction_evaluate=0.0).start(LocalGrid(client, {}, 2), initial, 1)
    assert not result.arrays and not result.train_metrics_clientapp


def two_adapters() -> PeftModel:
    model = build()
    model.add_adapter("more", LoraConfig(r=2, target_modules=["first"]))
    model.base_model.set_adapter(["default", "more"])
    return model


def with_int8_base() -> PeftModel:
    model = build()
    base = model.base_model.model.first.get_base_layer()
    base.weight = nn.Parameter(base.weight.to(torch.int8), requires_grad=False)
    return model


def tied() -> PeftModel:
    torch.manual_seed(5)
    net = Net()
    net.other = nn.Linear(D_IN, D_HIDDEN)
    net.other.weight = net.first.weight
    return get_peft_model(net, LoraConfig(r=2, target_modules=["first"]))


def in_bfloat16() -> PeftModel:
    return get_peft_model(Net().bfloat16(), LoraConfig(r=2, target_modules=["first"]))


def with_merged_pair() -> PeftModel:
    model = build()
    model.merge_adapter()
    return model


CANNOT: dict[str, tuple[Callable[[], Any], str]] = {
    "DoRA": (lambda: build(use_dora=True), r"model\.first uses DoraLinearVariant"),
    "quantised": (with_int8_base, r"model\.first holds int8"),
    "half precision": (in_bfloat16, r"model\.first holds bfloat16"),
    "lora_bias": (lambda: build(lora_bias=True), r"model\.first has lora_bias"),
    "embedding": (lambda: build(target_modules=["table"]), r"model\.table is LoRA on .* Embedding"),
    "convolution": (lambda: build(target_modules=["square"]), r"model\.square is LoRA on .* Conv2d"),
    "two adapters": (two_adapters, "default, more are active"),
    "merged": (with_merged_pair, r"model\.first is merged"),
    "tied": (tied, r"model\.first shares its weight"),
    "no PEFT": (Net, "Net is no PeftModel"),
}


@pytest.mark.parametrize("case", CANNOT)
def test_what_cannot_be_averaged_exactly_is_refused_by_name(case):
    make, reason = CANNOT[case]
    model, arrays = make(), get_arrays(build())
    with pytest.raises(NotExact, match=reason):
        get_arrays(model)
    with pytest.raises(NotExact, match=reason):
        set_arrays(model, arrays)


def test_a_model_of_another_shape_than_the_servers_is_refused():
    arrays = get_arrays(build())
    with pytest.raises(ValueError, match=r"not of this model: missing \[\], unknown .*second"):
        set_arrays(build(target_modules=["first"]), arrays)
    with pytest.raises(ValueError, match=r"first has rank 3, the server's is 2"):
        set_arrays(build(r=3), arrays)


def test_residual_is_accumulate_or_off():
    with pytest.raises(ValueError, match="accumulate or off, got 'replace'"):
        FedTaLoRA(residual="replace")


def test_arrays_of_peft_alone_are_refused_before_the_first_round():
    initial = ArrayRecord(get_peft_model_state_dict(build()))
    with pytest.raises(ValueError, match="get_arrays"):
        FedTaLoRA(fraction_evaluate=0.0).start(LocalGrid(Federation(lambda _: build()).client, {}, 2), initial, 1)
