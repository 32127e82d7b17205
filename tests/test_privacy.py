"""Whole runs with privacy for each example: what is spent, written down, refused, and that the mean stays exact."""

import json
import math
from copy import deepcopy

import pytest
from flwr.app import Message
from local_grid import tiny_run

from fedtalora_flwr import wire
from fedtalora_flwr.client import budget as budgets
from fedtalora_flwr.client import handlers
from fedtalora_flwr.client.budget import Budget, BudgetSpent, LedgerError, sealed
from fedtalora_flwr.config import ConfigError
from fedtalora_flwr.inference.export import export
from fedtalora_flwr.model.accountant import Spending, epsilon_of, noise_multiplier
from fedtalora_flwr.model.backbones import vit_mini

PRIVATE = {"head": "linear", "dp_epsilon": 8.0, "verify": True}


@pytest.fixture(autouse=True, scope="module")
def _backbone_is_built_once():
    built = vit_mini.create()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vit_mini, "create", lambda: deepcopy(built))
        yield


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDTALORA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def read(folder, name):
    return json.loads((folder / name).read_text())


def rounds(folder):
    return [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]


def ledgers(cache):
    return {path.name.partition("-")[2]: json.loads(path.read_text()) for path in (cache / "privacy").glob("*.json")}


class Killed(BaseException):
    pass


def killed_in(server_round):
    """Flower's client app, until the last reply of a round was computed but never arrives."""
    from client_app.app import app

    def call(message: Message, context):
        reply = app(message, context)
        order = message.content.config_records.get(wire.ORDER)
        if order is not None and order["server-round"] == server_round and context.node_config["partition-id"] == 2:
            raise Killed
        return reply

    return call


def test_a_private_run_is_exact_spends_its_budget_and_tells_it(tmp_path, cache):
    """Aggregation is post-processing of what clients have made private."""
    out = tiny_run(tmp_path / "run", **PRIVATE)
    lines = rounds(out)
    assert max(line["exactness_error"] for line in lines) < 1e-6
    assert all(line["mean_loss"] is None and not line["failures"] for line in lines)
    for task_id in (0, 1):
        first, last = (line["epsilon_spent"] for line in lines if line["task_id"] == task_id)
        assert all(0 < first[client] < last[client] <= 8 for client in ("0", "1", "2"))
        assert all(epsilon > 7.9 for epsilon in last.values())
        assert read(out, "metrics.json")["epsilon_spent"][str(task_id)] == last
    assert "epsilon 8 at most, delta 1e-05" in read(out, "manifest.json")["privacy"]
    card = (export(out, to="merged").folder / "README.md").read_text()
    assert "epsilon 8 at most" in card and "Most that a client has spent on a task: task 1 epsilon" in card
    of_first = [Spending(*row[1:]) for row in ledgers(cache)["0-train-0.json"]]
    assert len(of_first) == 2 and epsilon_of(of_first, delta=1e-5) == lines[1]["epsilon_spent"]["0"]
    assert {(each.sample_rate, each.num_steps) for each in of_first} == {(0.8, 2)}  # 10 examples in batches of 8


def test_a_run_without_it_says_none(tmp_path, cache):
    out = tiny_run(tmp_path / "run", num_tasks=1, rounds_per_task=1, head="linear")
    assert read(out, "manifest.json")["privacy"] == "none" and "epsilon_spent" not in read(out, "metrics.json")
    assert "epsilon_spent" not in rounds(out)[0] and not (cache / "privacy").exists()


@pytest.mark.parametrize(("head", "rounds_per_task"), [("ridge", 2), ("lda", 2), ("ridge", 0)])
def test_sums_and_training_share_one_budget(tmp_path, cache, head, rounds_per_task):
    settings = PRIVATE | {"head": head, "rounds_per_task": rounds_per_task, "num_tasks": 1, "verify": False}
    out = tiny_run(tmp_path / "run", **settings, follow_drift=False)
    line = rounds(out)[-1]
    assert not line["failures"] and line["accuracy_seen"] is not None
    assert line["epsilon_spent"].keys() == {"0", "1", "2"}
    assert all(7.9 < epsilon <= 8 for epsilon in line["epsilon_spent"].values())
    rows = ledgers(cache)["0-train-0.json"]
    assert [what for what, *_ in rows] == ["training"] * rounds_per_task + ["sums"]
    alone = epsilon_of([Spending(*rows[-1][1:])], delta=1e-5)
    assert alone == pytest.approx(4 if rounds_per_task else 8, abs=0.05)


def test_a_round_that_a_kill_repeats_is_answered_as_before_and_spends_nothing(tmp_path, cache):
    out = tmp_path / "run"
    with pytest.raises(Killed):
        tiny_run(out, killed_in(2), **PRIVATE, num_tasks=1)
    before = ledgers(cache)
    assert len(before["2-train-0.json"]) == 2  # the round that never arrived
    tiny_run(out, **PRIVATE, num_tasks=1, resume=True)
    after = ledgers(cache)
    assert {name: after[name] for name in before} == before
    assert all(max(line["epsilon_spent"].values()) <= 8 for line in rounds(out)) and len(rounds(out)) == 2


def test_training_that_a_kill_cuts_off_has_cost_nothing(tmp_path, cache, monkeypatch):
    out, train, times = tmp_path / "run", handlers.fit_privately, []

    def cut(*arguments, **told):
        times.append(told["round_in_task"])
        if len(times) == 6:  # the last client of the second round
            raise Killed
        return train(*arguments, **told)

    monkeypatch.setattr(handlers, "fit_privately", cut)
    with pytest.raises(Killed):
        tiny_run(out, **PRIVATE, num_tasks=1)
    assert [len(ledgers(cache)[f"{client}-train-0.json"]) for client in range(3)] == [2, 2, 1]
    tiny_run(out, **PRIVATE, num_tasks=1, resume=True)
    assert times == [0, 0, 0, 1, 1, 1, 1] and not any(line["failures"] for line in rounds(out))


def test_a_client_whose_budget_is_spent_trains_the_task_no_more_and_says_so(tmp_path, cache):
    """Its answers are lost with the cache's other files, so that a repeated round costs again."""
    out = tmp_path / "run"
    with pytest.raises(Killed):
        tiny_run(out, killed_in(2), **PRIVATE)
    for path in (cache / "privacy").glob("*-2-train.answer"):
        path.unlink()
    tiny_run(out, **PRIVATE, resume=True)
    (failure,) = rounds(out)[1]["failures"]
    assert failure["partition_id"] == 2
    assert "the privacy budget of these examples is spent" in failure["reason"]
    assert not rounds(out)[2]["failures"]  # the next task has a budget of its own


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"head": "ridge"}, "follow-drift sends sums over how features have moved"),
        ({"method": "full"}, "method=full trains more than pairs"),
    ],
)
def test_a_run_that_would_send_more_is_refused_before_it_begins(tmp_path, changes, reason):
    with pytest.raises(ConfigError, match=reason):
        tiny_run(tmp_path / "run", **PRIVATE | changes)


@pytest.mark.parametrize("handler", ["means", "fisher", "slots", "slot_sums"])
def test_a_node_answers_nothing_without_noise_whatever_the_server_asks(handler):
    from flwr.app import RecordDict
    from local_grid import TINY, defaults

    from fedtalora_flwr.client.redact import ClientError

    message = Message(RecordDict(), dst_node_id=1, message_type=f"train.{handler}")
    settings = defaults() | TINY | {"head": "linear", "dp-epsilon": 8.0}
    with pytest.raises(ClientError, match=f"what train.{handler} asks for would leave without noise"):
        getattr(handlers, handler)(message, settings, {"partition-id": 0, "num-partitions": 3})


def test_a_budget_is_kept_over_restarts_and_never_exceeded():
    noise = noise_multiplier(epsilon=4.0, delta=1e-5, sample_rate=1.0, num_steps=3)
    asked: list[float] = []
    taken = {"sample_rate": 1.0, "num_steps": 1, "noise": lambda: asked.append(noise) or noise}
    first = Budget("run-0-train-0", 4.0, 1e-5)
    parts = [Budget("run-0-train-0", 4.0, 1e-5).spend("training", **taken) for _ in range(3)]
    assert asked == [noise]
    assert len({part.noise_multiplier for part in parts}) == 1
    assert parts[0].epsilon < parts[1].epsilon < parts[2].epsilon <= 4.0
    with pytest.raises(BudgetSpent, match=r"epsilon (4|3\.99) of dp-epsilon 4 at dp-delta 1e-05, with this answer"):
        first.spend("training", **taken)
    with pytest.raises(BudgetSpent):  # the refusal has spent nothing, and opened nothing
        first.spend("training", **taken)
    assert Budget("run-1-train-0", 4.0, 1e-5).spend("training", **taken).epsilon == parts[0].epsilon


def test_a_ledger_that_cannot_be_read_or_written_stops_the_node(cache):
    taken = {"sample_rate": 1.0, "num_steps": 1, "noise": lambda: 5.0}
    Budget("run-0-train-0", 4.0, 1e-5).spend("sums", **taken)
    (cache / "privacy" / "run-0-train-0.json").write_text("[[1.0")
    with pytest.raises(LedgerError, match="cannot be read, so that nobody knows what is left"):
        Budget("run-0-train-0", 4.0, 1e-5).spend("sums", **taken)
    for path in (cache / "privacy").iterdir():
        path.unlink()
    (cache / "privacy").rmdir()
    (cache / "privacy").write_text("a file in the way")
    with pytest.raises(LedgerError, match="nothing may be answered"):
        Budget("run-0-train-0", 4.0, 1e-5).spend("sums", **taken)


def test_the_digest_of_own_data_is_sealed_by_a_key_that_stays(cache):
    first = sealed("ab")
    assert first == sealed("ab") != sealed("ac") and first != "ab" and len(first) == 64
    (cache / "privacy" / "key").unlink()
    assert sealed("ab") != first
    assert (cache / "privacy" / "key").stat().st_mode & 0o077 == 0


def test_an_answer_is_given_again_to_the_same_order_alone():
    from flwr.app import MetricRecord, RecordDict

    budget = Budget("run-0-train-0", 4.0, 1e-5)
    assert budget.kept("a" * 64) is None
    budget.keep(RecordDict({"metrics": MetricRecord({"epsilon-spent": 1.5})}), to="a" * 64)
    kept = budgets.Budget("run-0-train-0", 4.0, 1e-5).kept("a" * 64)
    assert kept is not None and math.isclose(kept.metric_records["metrics"]["epsilon-spent"], 1.5)
    assert budget.kept("b" * 64) is None
