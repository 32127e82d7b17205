"""What a penalty adds to a step's loss."""

import math

import pytest
import torch

from fedtalora_flwr.model.penalties import Memory, Start, available, resolve

ROWS = {"weight": torch.tensor([[2.0, 0.0], [0.0, 2.0], [5.0, 5.0]]), "bias": torch.zeros(3)}  # (3, 2)
BEFORE = torch.tensor([[0.0, 0.0], [1.0, 0.0]])  # (N, d)


def start(old_classes=(0, 1)) -> Start:
    return Start(features=lambda: BEFORE, rows=ROWS, old_classes=torch.tensor(old_classes, dtype=torch.int64))


def test_none_adds_nothing_and_asks_for_no_old_rows():
    none = resolve("none", {})
    assert none.begin(start()) is None and not none.uses_old_rows


@pytest.mark.parametrize("old_classes", [(), (2,)])
def test_lwf_adds_nothing_where_old_classes_cannot_be_confused(old_classes):
    assert resolve("lwf", {}).begin(start(old_classes)) is None


def test_lwf_is_zero_where_features_have_not_moved():
    term = resolve("lwf", {}).begin(start())
    assert float(term(torch.tensor([1, 0]), BEFORE[[1, 0]])) == pytest.approx(0.0, abs=1e-7)


def test_lwf_is_the_divergence_from_what_was_said_before_softened_by_the_temperature():
    term = resolve("lwf", {"penalty_weight": 3.0}).begin(start())
    moved = torch.tensor([[math.log(3.0), 0.0]])  # row 0 said (1/2, 1/2); at T = 2 it now says (3/4, 1/4)
    wanted = 3 * 2**2 * (0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25))
    assert float(term(torch.tensor([0]), moved)) == pytest.approx(wanted, rel=1e-5)


def test_lwf_pulls_the_features_back_and_leaves_the_rows_alone():
    term = resolve("lwf", {}).begin(start())
    features = torch.tensor([[1.0, 0.0]], requires_grad=True)
    term(torch.tensor([0]), features).backward()
    assert features.grad[0, 0] > 0 > features.grad[0, 1]
    assert not ROWS["weight"].requires_grad


def test_unknown_penalty_is_refused_with_the_choices():
    assert {"lwf", "none"} <= set(available())
    with pytest.raises(ValueError, match=f"choose one of: {', '.join(available())}"):
        resolve("ewc-and-more", {})


def remembering(moved: float, *, weight: float = 1.0):
    fisher = {"lora_A/m": torch.tensor([[2.0, 0.0]]), "lora_B/m": torch.tensor([[0.5]])}
    anchor = {"lora_A/m": torch.tensor([[1.0, 1.0]]), "lora_B/m": torch.tensor([[-1.0]])}
    factors = {key: (value + moved).requires_grad_() for key, value in anchor.items()}
    start = Start(lambda: BEFORE, ROWS, torch.tensor([0, 1]), factors, Memory(anchor, fisher))
    return factors, resolve("ewc", {"penalty_weight": weight}).begin(start)


def test_ewc_adds_nothing_before_a_task_is_finished():
    ewc = resolve("ewc", {})
    assert ewc.begin(start()) is None and ewc.remembers and not ewc.uses_old_rows


def test_ewc_is_half_the_weighted_squares_of_what_moved_each_by_its_fisher():
    _, term = remembering(3.0, weight=4.0)
    assert term(torch.tensor([0]), BEFORE[:1]).item() == pytest.approx(4 / 2 * (2 * 9 + 0 * 9 + 0.5 * 9))


def test_ewc_pulls_only_what_earlier_tasks_depended_on():
    factors, term = remembering(3.0)
    term(torch.tensor([0]), BEFORE[:1]).backward()
    assert factors["lora_A/m"].grad.tolist() == [[6.0, 0.0]]


def test_a_memory_adds_the_fisher_of_tasks_up_and_keeps_the_last_anchor():
    first = Memory().with_task({"k": torch.tensor([1.0])}, {"k": torch.tensor([0.5])})
    second = first.with_task({"k": torch.tensor([9.0])}, {"k": torch.tensor([0.25])})
    assert (second.anchor["k"].tolist(), second.fisher["k"].tolist()) == ([9.0], [0.75])
