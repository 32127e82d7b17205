"""A step has the same bits however its product is taken, and changes the residual as the dense one would."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedtalora_flwr.aggregation.factors import Step, by_strength, kept_energy, on_grid, pays, strongest

D_OUT, D_IN = 23, 17


def made(m: int, *, seed: int, spread: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    columns = torch.logspace(0, math.log10(spread), m, dtype=torch.float64)
    left = torch.randn(D_OUT, m, generator=generator, dtype=torch.float64) * columns
    return left, torch.randn(m, D_IN, generator=generator, dtype=torch.float64)


@given(st.integers(1, 600), st.integers(0, 99), st.sampled_from([1.0, 1e-3, 1e4]))
def test_product_has_the_same_bits_in_any_order_of_summation(m, seed, spread):
    step = on_grid(*made(m, seed=seed, spread=spread))
    order = torch.randperm(m, generator=torch.Generator().manual_seed(seed))
    one_by_one = torch.zeros(D_OUT, D_IN, dtype=torch.float64)
    for j in order:
        one_by_one += torch.outer(step.left[:, j].double(), step.right[j].double())
    assert torch.equal(step.added_to(None), one_by_one.float())
    assert torch.equal(step.added_to(None), Step(step.left[:, order], step.right[order]).added_to(None))


@given(st.integers(1, 600), st.integers(0, 99))
def test_grid_changes_the_product_by_less_than_a_millionth(m, seed):
    left, right = made(m, seed=seed)
    wanted = left @ right
    assert (on_grid(left, right).added_to(None) - wanted).norm() < 1e-6 * wanted.norm()


@pytest.mark.parametrize("size", [1e-30, 1e-22, 1e22, 1e30])
def test_numbers_whose_squares_are_beyond_float32_keep_their_digits(size):
    left, right = (factor.float() for factor in made(4, seed=0))
    wanted = (size * left).double()
    step = on_grid(size * left, right / size)
    assert (step.left - wanted).norm() < 1e-6 * wanted.norm()
    assert step.left.norm(dim=1, dtype=torch.float64).max() <= 2**26 * step.left[step.left != 0].abs().min()


def test_numbers_that_float32_can_hardly_hold_make_a_step():
    step = on_grid(torch.full((D_OUT, 3), 1e-44), torch.full((3, D_IN), 1e-44))
    assert torch.equal(step.left, torch.full((D_OUT, 3), 1e-44)) and not step.added_to(None).any()


@pytest.mark.parametrize("m", [0, 3])
def test_step_of_nothing_adds_nothing(m):
    step = on_grid(torch.zeros(D_OUT, m, dtype=torch.float64), torch.zeros(m, D_IN, dtype=torch.float64))
    before = torch.randn(D_OUT, D_IN)
    assert torch.equal(step.added_to(before), before)
    assert not step.added_to(None).any()
    assert step.energy() == 0.0


def test_adding_a_step_leaves_the_residual_it_is_added_to_alone():
    before = torch.ones(D_OUT, D_IN)
    on_grid(*made(3, seed=0)).added_to(before)
    assert torch.equal(before, torch.ones(D_OUT, D_IN))


def test_factors_pay_until_they_hold_as_many_numbers_as_the_matrix():
    assert pays(9, (D_OUT, D_IN)) and 9 * (D_OUT + D_IN) == 360 < 391
    assert not pays(10, (D_OUT, D_IN))


def test_energy_is_the_squared_norm_of_the_product():
    step = on_grid(*made(5, seed=3))
    assert step.energy() == pytest.approx(float(step.added_to(None).double().square().sum()), rel=1e-6)


def test_by_strength_keeps_the_product_and_sorts_it():
    left, right = made(6, seed=1, spread=1e-2)
    sorted_left, sorted_right = by_strength(left, right)
    torch.testing.assert_close(sorted_left @ sorted_right, left @ right)
    norms = sorted_left.norm(dim=0)
    assert (norms.diff() <= 0).all()


@given(st.integers(2, 9), st.integers(0, 50), st.floats(0.05, 0.99))
def test_what_is_sent_holds_the_energy_asked_for_and_the_rest_is_owed(m, seed, energy):
    lost = on_grid(*made(m, seed=seed, spread=0.05))
    sent, owed = strongest(lost, owed=None, energy=energy)
    assert isinstance(sent, Step)
    assert kept_energy({"fc": sent}, {"fc": owed}) >= energy - 1e-6
    assert sent.left.shape[1] + owed.left.shape[1] == m
    whole = lost.added_to(None)
    assert (owed.added_to(sent.added_to(None)) - whole).norm() < 1e-5 * whole.norm()


def test_no_direction_is_sent_that_the_energy_does_not_ask_for():
    left = torch.diag(torch.tensor([2.0, 1.0, 0.5], dtype=torch.float64))
    sent, owed = strongest(Step(left.float(), torch.eye(3, 9)), owed=None, energy=0.7)
    assert isinstance(sent, Step)
    assert sent.left.shape[1] == 1  # energies 4, 1, 0.25 of 5.25: the first alone has .76
    assert kept_energy({"fc": sent}, {"fc": owed}) == pytest.approx(4 / 5.25)


def test_what_is_owed_joins_the_next_step():
    first, second = on_grid(*made(4, seed=1, spread=0.1)), on_grid(*made(4, seed=2, spread=0.1))
    sent, owed = strongest(first, owed=None, energy=0.5)
    again, rest = strongest(second, owed=owed, energy=0.9)
    assert isinstance(sent, Step) and isinstance(again, Step)
    total = rest.added_to(again.added_to(sent.added_to(None)))
    wanted = second.added_to(first.added_to(None))
    assert (total - wanted).norm() < 1e-5 * wanted.norm()


def test_a_dense_change_takes_all_that_is_owed_with_it():
    lost, owed = torch.randn(D_OUT, D_IN), on_grid(*made(2, seed=1))
    sent, rest = strongest(lost, owed=owed, energy=0.5)
    assert isinstance(sent, torch.Tensor)
    assert torch.equal(sent, owed.added_to(lost))
    assert rest.numel == 0
