"""Whole runs of what keeps old tasks: sums that follow features, means over tasks, rows that start at means."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Context, Message
from local_grid import defaults, tiny_run
from tensors import opened

from client_app.app import app as run_client
from fedtalora_flwr import aggregation, wire
from fedtalora_flwr.aggregation import ClientUpdate, GlobalState, LoraFactors
from fedtalora_flwr.client.versions import _version_store
from fedtalora_flwr.config import RunConfig
from fedtalora_flwr.model.heads import rows_at_means
from fedtalora_flwr.run_folder import checkpoint
from fedtalora_flwr.server.failures import Tally
from fedtalora_flwr.server.intake import Intake
from fedtalora_flwr.server.one_adapter import update_of_server
from fedtalora_flwr.server.roster import Roster

QUICK = {"dataset": "digits", "head": "lda", "rounds_per_task": 1, "local_epochs": 2, "drift_views": 1}


def rounds(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "rounds.jsonl").read_text().splitlines()]


def sums_of(out: Path) -> torch.Tensor:
    return checkpoint.load(out / "checkpoint").sums.moment


class Witness:
    """A client that notes what it is asked, and may lose the bases in a folder before it is asked for sums."""

    def __init__(self, *, loses: Path | None = None) -> None:
        self.asked: list[tuple[str, bool]] = []
        self.loses = loses

    def __call__(self, message: Message, context: Context) -> Message:
        kind = message.metadata.message_type
        self.asked.append((kind, wire.tells_before(message.content)))
        if self.loses is not None and kind == "train.sums":
            shutil.rmtree(self.loses, ignore_errors=True)
            _version_store.cache_clear()  # as in a new process
        return run_client(message, context)


def test_clients_compare_with_the_tasks_first_state_from_the_second_task_on(tmp_path):
    witness = Witness()
    tiny_run(tmp_path / "on", witness, **QUICK)
    assert [tells for kind, tells in witness.asked if kind == "train.sums"] == [False] * 3 + [True] * 3
    tiny_run(tmp_path / "off", follow_drift=False, **QUICK)
    first = [row for task in json.loads((tmp_path / "on" / "manifest.json").read_text())["tasks"][:1] for row in task]
    on, off = sums_of(tmp_path / "on"), sums_of(tmp_path / "off")
    assert (on[first] - off[first]).norm() > 1e-4 * off[first].norm()
    later = [row for row in range(len(on)) if on[row, -1] and row not in first]
    assert torch.equal(on[later], off[later]) and torch.equal(on[:, -1].round(), off[:, -1])


def test_a_client_that_has_lost_its_bases_is_sent_both_and_sums_the_same(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDTALORA_CACHE", str(tmp_path / "cache"))
    settings = QUICK | {"task_average": False}
    tiny_run(tmp_path / "whole", **settings)
    tiny_run(tmp_path / "lost", Witness(loses=tmp_path / "cache"), **settings)
    assert rounds(tmp_path / "lost")[1]["resent"] == [0, 1, 2] and not rounds(tmp_path / "lost")[1]["failures"]
    assert torch.equal(sums_of(tmp_path / "whole"), sums_of(tmp_path / "lost"))


def test_a_run_that_goes_on_in_the_middle_of_a_task_still_knows_how_the_task_began(tmp_path):
    settings = QUICK | {"rounds_per_task": 2}
    tiny_run(tmp_path / "whole", **settings)

    def dies(message: Message, context: Context) -> Message:
        if message.metadata.group_id == "4":
            raise KeyboardInterrupt
        return run_client(message, context)

    with pytest.raises(KeyboardInterrupt):
        tiny_run(tmp_path / "stopped", dies, **settings)
    tiny_run(tmp_path / "stopped", resume=True, **settings)
    assert torch.equal(sums_of(tmp_path / "whole"), sums_of(tmp_path / "stopped"))


@pytest.mark.parametrize("head", ["linear", "ridge", "lda", "prototype"])
def test_rows_that_start_at_class_means_know_the_classes_before_the_first_step(tmp_path, head):
    frozen = {"learning_rate": 0.0, "head_learning_rate": 0.0, "stop_after_task": 1, "max_per_class": 30}
    losses = {}
    for start in ("zero", "means"):
        tiny_run(tmp_path / start, **QUICK | frozen | {"head": head, "rows_start": start})
        losses[start] = rounds(tmp_path / start)[0]["mean_loss"]
    assert losses["zero"] == pytest.approx(np.log(5), rel=1e-3)
    assert losses["means"] < 0.5 * losses["zero"]


def test_means_that_cannot_be_are_refused_and_the_others_start_the_rows(tmp_path):
    def lies(message: Message, context: Context) -> Message:
        reply = run_client(message, context)
        if message.metadata.message_type == "train.means" and context.node_config["partition-id"] == 1:
            with opened(reply.content) as tensors:
                tensors["means/moment"] = np.full_like(tensors["means/moment"], np.nan)
        return reply

    tiny_run(tmp_path, lies, **QUICK | {"rows_start": "means", "stop_after_task": 1})
    (line,) = rounds(tmp_path)
    reasons = [failure["reason"] for failure in line["failures"]]
    assert reasons == ["refused: means hold a number that is not finite"]


def test_class_means_longer_than_the_features_are_refused(tmp_path):
    def lies(message: Message, context: Context) -> Message:
        reply = run_client(message, context)
        if message.metadata.message_type == "train.means" and context.node_config["partition-id"] == 1:
            with opened(reply.content) as tensors:
                tensors["means/moment"] = tensors["means/moment"] * np.array([-1.5] * 192 + [1.0])
        return reply

    tiny_run(tmp_path, lies, **QUICK | {"rows_start": "means", "stop_after_task": 1})
    (line,) = rounds(tmp_path)
    (failure,) = line["failures"]
    assert re.match("refused: a class mean has a norm of .*, features of this run at most 13.9", failure["reason"])


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda content: content.pop("drift"), "the drift cannot be read"),
        (lambda content: lengthen(content, "drift", 55.0), r"features have a norm of .*, those of this run about 13.9"),
        (lambda content: lengthen(content, "drift", 1.5), r"features have a norm of .*, those of this run about 13.9"),
        (lambda content: lengthen(content, "arrays", 55.0), "sums contradict each other"),
        (lambda content: move_away(content), "the moves of features are .* times as large as is usual, outlier-limit"),
    ],
    ids=["none", "too long", "somewhat too long", "sums too long", "elsewhere"],
)
def test_a_drift_that_cannot_be_is_refused_and_that_of_the_others_taken(tmp_path, spoil, reason):
    def lies(message: Message, context: Context) -> Message:
        reply = run_client(message, context)
        if wire.tells_before(message.content) and context.node_config["partition-id"] == 1:
            spoil(reply.content)
        return reply

    tiny_run(tmp_path, lies, **QUICK)
    first, second = rounds(tmp_path)
    assert not first["failures"]
    (failure,) = second["failures"]
    assert failure["partition_id"] == 1 and re.match(f"refused: {reason}", failure["reason"])


def move_away(content) -> None:
    """Say that every feature has become its opposite, in z = (f', f, 1)."""
    with opened(content, record="drift") as tensors:
        upper = tensors["drift/root"]
        width = 2 * 192 + 1
        num_rows = next(k for k in range(width + 1) if k * width - k * (k - 1) // 2 == len(upper))
        root = np.zeros((num_rows, width))
        root[np.triu_indices(num_rows, m=width)] = upper
        root[:, 192:-1] = -root[:, :192]
        tensors["drift/root"] = np.linalg.qr(root, mode="r")[np.triu_indices(num_rows, m=width)]


def test_a_drift_of_more_than_max_change_times_the_usual_length_counts_as_if_it_were_of_that():
    config, tally = RunConfig.parse(defaults()), Tally()  # max-change is 3
    intake = Intake(config, Roster(config, tally), tally)
    root = torch.randn(4, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))  # (f', f, 1) of 3
    gram, moved = root.T @ root, {0: 0.5, 1: 1.0, 2: 1.5, 3: 6.0}
    total = intake._total_drift({partition: (root, distance) for partition, distance in moved.items()}, 0)
    assert torch.allclose(total, (3 + 3 * 1.0 / 6.0) * gram)


def lengthen(content, record: str, factor: float) -> None:
    with opened(content, record) as tensors:
        key = next(key for key in tensors if key.endswith("root"))
        tensors[key] = factor * tensors[key]


def test_rows_end_a_task_at_the_means_of_all_classes_so_far(tmp_path):
    tiny_run(tmp_path, **QUICK | {"rows_start": "means"})
    point = checkpoint.load(tmp_path / "checkpoint")
    means = point.sums.moment[:, :-1] / point.sums.moment[:, -1:]
    for name, rows in rows_at_means(means).items():
        torch.testing.assert_close(point.state.head[name], rows)


def test_a_client_that_counts_less_counts_as_much_less_in_the_sums(tmp_path):
    def loud(message: Message, context: Context) -> Message:
        reply = run_client(message, context)
        if message.metadata.message_type == "train" and context.node_config["partition-id"] == 2:
            with opened(message.content) as sent, opened(reply.content) as tensors:
                for key in tensors:
                    if key.startswith("lora_B"):
                        tensors[key] = sent[key] + 8 * (tensors[key] - sent[key])
        return reply

    settings = QUICK | {"stop_after_task": 1, "follow_drift": False}
    tiny_run(tmp_path / "loud", loud, **settings)
    (line,) = rounds(tmp_path / "loud")
    assert not line["failures"] and line["weights"].keys() == {"2"}
    tiny_run(tmp_path / "fair", **settings)
    counts, fair = sums_of(tmp_path / "loud")[:, -1], sums_of(tmp_path / "fair")[:, -1]
    share = line["weights"]["2"]
    held = json.loads((tmp_path / "fair" / "manifest.json").read_text())["class_counts"][2]
    seen = fair > 0
    wanted = fair - (1 - share) * torch.tensor(held, dtype=torch.float64) * seen
    torch.testing.assert_close(counts, wanted, rtol=1e-4, atol=1e-4)


def test_every_task_moves_the_model_by_its_share_exactly():
    torch.manual_seed(0)
    pairs = [LoraFactors(torch.randn(2, 5), torch.randn(7, 2), 1.5) for _ in range(4)]
    state = GlobalState({"layer": pairs[0]}, {"layer": torch.randn(7, 5)}, {"bias": torch.zeros(3)}, version=4)
    sizes = [3, 4, 9]
    updates = [
        ClientUpdate(k, n, {"layer": pair}, {"bias": torch.ones(3)}, torch.tensor([n, 0, 0]), 4)
        for k, (n, pair) in enumerate(zip(sizes, pairs[1:], strict=True))
    ]
    for num_tasks in (1, 4):
        everyone = [*updates, update_of_server(state, updates, num_tasks=num_tasks)]
        new = aggregation.resolve("fedtalora").aggregate(state, everyone)
        before = state.residual["layer"] + pairs[0].delta()
        mean = sum(n * (state.residual["layer"] + pair.delta()) for n, pair in zip(sizes, pairs[1:], strict=True)) / 16
        wanted = (num_tasks * before + mean) / (num_tasks + 1)
        torch.testing.assert_close(new.residual["layer"] + new.adapters["layer"].delta(), wanted, rtol=1e-5, atol=1e-5)
        assert new.head["bias"].tolist() == [1.0, 0.0, 0.0]  # rows are averaged over those that trained them


@pytest.mark.parametrize("method", ["fedtalora", "flora", "full", "ffa-lora"])
def test_the_mean_over_tasks_is_exact_in_whole_runs(tmp_path, method):
    tiny_run(tmp_path, **QUICK | {"method": method, "verify": True, "learning_rate": 1e-3})
    assert all(line["exactness_error"] < 1e-5 for line in rounds(tmp_path))
