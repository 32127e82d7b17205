"""What clients sum may be as large as it usually is in the round, and of few examples it may say nothing."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Context, Message
from local_grid import defaults, tiny_run
from tensors import opened

from client_app.app import app as run_client
from fedtalora_flwr.aggregation import BadUpdate
from fedtalora_flwr.config import RunConfig
from fedtalora_flwr.data import ClassList
from fedtalora_flwr.run_folder import checkpoint
from fedtalora_flwr.server.failures import RunFailed, Tally
from fedtalora_flwr.server.holdings import Holdings
from fedtalora_flwr.server.intake import Intake
from fedtalora_flwr.server.roster import Roster

QUICK = {"dataset": "digits", "head": "lda", "rounds_per_task": 1, "stop_after_task": 1}


def failures(out: Path) -> dict[int, str]:
    (line,) = [json.loads(text) for text in (out / "rounds.jsonl").read_text().splitlines()]
    return {failure["partition_id"]: failure["reason"] for failure in line["failures"]}


@pytest.mark.parametrize(
    ("kind", "key", "settings", "what"),
    [
        ("train.fisher", "fisher/lora_B/blocks.5.attn.proj", {"penalty": "ewc"}, "gradients"),
        ("train.means", "means/moment", {"rows_start": "means", "feature_norm": "none"}, "class means"),
        ("train.sums", "sums/", {"feature_norm": "none"}, "features"),
    ],
)
def test_what_is_fifty_times_as_large_as_usual_is_refused_though_norm_limit_lets_it_through(
    tmp_path, kind, key, settings, what
):
    def shouts(message: Message, context: Context) -> Message:
        reply = run_client(message, context)
        if message.metadata.message_type == kind and context.node_config["partition-id"] == 1:
            with opened(reply.content) as tensors:
                for name in [name for name in tensors if name.startswith(key)]:
                    if name.startswith("fisher/"):  # squares of which one factor holds nearly all
                        tensors[name] = tensors[name] + 1e4
                    elif name.endswith("/moment"):
                        tensors[name] = tensors[name].copy()
                        tensors[name][:, :-1] *= 50
                    elif name == "sums/root":
                        tensors[name] = _longer(tensors[name], width=tensors["sums/moment"].shape[1], by=50)
        return reply

    changes: dict[str, Any] = {**QUICK, "norm_limit": 1e9, **settings}
    if kind == "train.fisher":
        del changes["stop_after_task"]  # nothing is remembered of the last task
    tiny_run(tmp_path, shouts, **changes)
    first = json.loads((tmp_path / "rounds.jsonl").read_text().splitlines()[0])
    (failure,) = first["failures"]
    assert failure["partition_id"] == 1
    assert failure["reason"].startswith(f"refused: {what} are ") and failure["reason"].endswith("outlier-limit is 10")


def _longer(upper: Any, *, width: int, by: float) -> Any:
    """Make all features of a root longer, given as its rows from the diagonal on; its last column is the constant."""
    rows = next(k for k in range(width + 1) if k * width - k * (k - 1) // 2 == len(upper))
    columns = torch.triu_indices(rows, width)[1].numpy()
    longer = upper.copy()
    longer[columns < width - 1] *= by
    return longer


def test_a_class_with_few_examples_is_left_out_of_what_a_client_sums(tmp_path):
    asked = []

    def notes(message: Message, context: Context) -> Message:
        reply = run_client(message, context)
        if message.metadata.message_type in ("train.sums", "train.means"):
            with opened(reply.content) as tensors:
                moment = next(value for name, value in tensors.items() if name.endswith("/moment"))
                asked.append((context.node_config["partition-id"], moment[:, -1].min()))
        return reply

    skewed = QUICK | {"partition": "dirichlet", "dirichlet_beta": 0.5, "max_per_class": 20, "rows_start": "means"}
    tiny_run(tmp_path / "all", notes, **skewed)
    fewest = min(count for _, count in asked)
    asked.clear()
    tiny_run(tmp_path / "some", notes, **skewed, min_class_examples=int(fewest) + 1)
    assert asked and min(count for _, count in asked) > fewest
    assert not failures(tmp_path / "some")
    counted = [checkpoint.load(tmp_path / run / "checkpoint").sums.gram[-1, -1] for run in ("all", "some")]
    assert counted[1] < counted[0]


def test_a_client_that_tells_of_a_class_it_should_not_is_refused(tmp_path):
    def tells_all(message: Message, context: Context) -> Message:
        if message.metadata.message_type == "train.sums" and context.node_config["partition-id"] == 0:
            context.run_config["min-class-examples"] = 1
        return run_client(message, context)

    skewed = QUICK | {"partition": "dirichlet", "dirichlet_beta": 0.5, "max_per_class": 20, "min_class_examples": 5}
    tiny_run(tmp_path, tells_all, **skewed)
    assert "speaks of other examples" in failures(tmp_path)[0]


def test_a_minimum_that_nobody_has_is_an_error_that_names_it(tmp_path):
    with pytest.raises(RunFailed, match=r"of task 0, 0 partitions hold 100 examples of a class \(min-class-examples\)"):
        tiny_run(tmp_path, **QUICK, min_class_examples=100)


def test_data_of_a_nodes_own_may_grow_to_the_minimum():
    config = RunConfig.parse(defaults() | {"dataset": "nodes", "data-path": "x", "min-class-examples": 5})
    tally = Tally()
    intake = Intake(config, roster := Roster(config, tally), tally)
    held = torch.tensor([4, 9, 0])
    roster.holdings = Holdings(counts={(0, 1): held}, told={1: ClassList()})
    for counts in ([6, 9, 0], [0, 9, 0]):
        intake._check_counts(0, 1, torch.tensor(counts), least=5)
    for counts in ([9, 9, 0], [6, 9, 1]):
        with pytest.raises(BadUpdate, match="other examples"):
            intake._check_counts(0, 1, torch.tensor(counts), least=5)
