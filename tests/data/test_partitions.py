import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtalora_flwr.config import registry
from fedtalora_flwr.data import PARTITIONS

SCHEMES = registry.available(PARTITIONS)
SETTINGS = {"classes_per_client": 2, "dirichlet_beta": 0.05}

tasks = st.lists(st.integers(0, 6).map(lambda c: 3 * c), min_size=1, max_size=120).filter(
    lambda labels: len(set(labels)) > 1
)


def split(scheme: str, labels, *, num_partitions: int, seed: int = 0, **settings):
    partitioner = registry.build(PARTITIONS, scheme, {**SETTINGS, **settings})
    return partitioner.split(
        np.array(labels, dtype=np.int64), num_partitions=num_partitions, rng=np.random.default_rng(seed)
    )


@pytest.mark.parametrize("scheme", SCHEMES)
@given(labels=tasks, num_partitions=st.integers(4, 31), seed=st.integers(0, 9))
def test_every_example_is_in_exactly_one_partition(scheme, labels, num_partitions, seed):
    parts = split(scheme, labels, num_partitions=num_partitions, seed=seed)
    assert len(parts) == num_partitions
    assert all((np.diff(part) > 0).all() for part in parts)
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(labels)))


@pytest.mark.parametrize("scheme", SCHEMES)
@given(labels=tasks, num_partitions=st.integers(4, 31), seed=st.integers(0, 9))
def test_the_same_seed_gives_the_same_partitions(scheme, labels, num_partitions, seed):
    once = split(scheme, labels, num_partitions=num_partitions, seed=seed)
    again = split(scheme, labels, num_partitions=num_partitions, seed=seed)
    assert all(np.array_equal(a, b) for a, b in zip(once, again, strict=True))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_another_seed_gives_other_partitions(scheme):
    labels = np.arange(200) % 4
    first, second = (split(scheme, labels, num_partitions=5, seed=seed) for seed in (0, 1))
    assert any(not np.array_equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_single_client_holds_everything(scheme):
    (part,) = split(scheme, [4, 2, 4, 2, 2], num_partitions=1)
    assert part.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_task_of_no_examples_gives_empty_partitions_or_says_why(scheme):
    if scheme == "quantity":
        with pytest.raises(ValueError, match="classes-per-client"):
            split(scheme, [], num_partitions=3)
    else:
        assert [len(part) for part in split(scheme, [], num_partitions=3)] == [0, 0, 0]


def test_iid_partitions_differ_by_at_most_one_example():
    assert sorted(len(part) for part in split("iid", np.arange(17) % 3, num_partitions=5)) == [3, 3, 3, 4, 4]


@given(
    num_classes=st.integers(2, 9),
    alpha=st.integers(1, 9),
    num_partitions=st.integers(1, 30),
    seed=st.integers(0, 9),
)
def test_quantity_gives_each_client_alpha_classes_and_balances_holders(num_classes, alpha, num_partitions, seed):
    labels = np.repeat(np.arange(num_classes), 40)
    if alpha > num_classes or num_partitions * alpha < num_classes:
        with pytest.raises(ValueError, match="classes-per-client"):
            split("quantity", labels, num_partitions=num_partitions, classes_per_client=alpha)
        return
    parts = split("quantity", labels, num_partitions=num_partitions, classes_per_client=alpha, seed=seed)
    counts = np.stack([np.bincount(labels[part], minlength=num_classes) for part in parts])
    assert ((counts > 0).sum(axis=1) == alpha).all()
    holders = (counts > 0).sum(axis=0)
    assert holders.min() >= 1 and holders.max() - holders.min() <= 1
    for column in counts.T:
        held = column[column > 0]
        assert held.max() - held.min() <= 1


def test_quantity_refuses_more_classes_a_client_than_the_task_has():
    with pytest.raises(ValueError, match=r"classes-per-client must be in \[1, 2\].*got 3"):
        split("quantity", [0, 1, 0], num_partitions=4, classes_per_client=3)


def test_quantity_refuses_too_few_clients_for_all_classes():
    with pytest.raises(ValueError, match=r"2 clients with 2 classes each cannot hold the 5 classes"):
        split("quantity", [0, 1, 2, 3, 4], num_partitions=2, classes_per_client=2)


@pytest.mark.parametrize("beta", [1e-6, 0.05, 1.0, 1e6])
def test_dirichlet_splits_at_any_beta_for_thirty_clients(beta):
    labels = np.arange(3000) % 11
    parts = split("dirichlet", labels, num_partitions=30, dirichlet_beta=beta)
    assert sum(len(part) for part in parts) == 3000


def test_dirichlet_is_more_skewed_at_smaller_beta():
    labels = np.zeros(1000, dtype=np.int64)

    def largest_share(beta: float) -> float:
        return float(
            np.mean(
                [
                    max(map(len, split("dirichlet", labels, num_partitions=8, dirichlet_beta=beta, seed=seed)))
                    for seed in range(20)
                ]
            )
        )

    assert largest_share(0.05) > largest_share(0.5) > largest_share(50)


def test_dirichlet_shares_follow_the_draw_for_each_class():
    labels = np.repeat([0, 1], [400, 100])
    rng = np.random.default_rng(4)
    expected = []
    for size in (400, 100):
        rng.permutation(size)
        expected.append(rng.dirichlet([0.5] * 6) * size)
    parts = split("dirichlet", labels, num_partitions=6, dirichlet_beta=0.5, seed=4)
    counts = np.stack([np.bincount(labels[part], minlength=2) for part in parts], axis=1)  # (classes, 6)
    np.testing.assert_allclose(counts, expected, atol=1.0)


def test_dirichlet_sizes_draws_one_share_for_all_classes_of_a_task():
    labels = np.tile([0, 1, 1], 2000)
    parts = split("dirichlet-sizes", labels, num_partitions=6, dirichlet_beta=0.5, seed=4)
    rng = np.random.default_rng(4)
    rng.permutation(6000)
    np.testing.assert_allclose([len(part) for part in parts], rng.dirichlet([0.5] * 6) * 6000, atol=1.0)
    large = [part for part in parts if len(part) > 300]
    assert len(large) >= 3
    assert all(abs(labels[part].mean() - 2 / 3) < 0.1 for part in large)  # each has both classes, as the task has them


@pytest.mark.parametrize("beta", [0.0, -1.0, float("nan"), float("inf")])
def test_dirichlet_refuses_a_beta_that_is_not_positive(beta):
    with pytest.raises(ValueError, match="dirichlet-beta must be positive"):
        registry.build(PARTITIONS, "dirichlet", {"dirichlet_beta": beta})


def test_a_hundred_thousand_examples_are_split_in_well_under_a_second():
    labels = np.random.default_rng(0).integers(0, 100, 100_000)
    start = time.perf_counter()
    split("dirichlet", labels, num_partitions=30, dirichlet_beta=0.05)
    assert time.perf_counter() - start < 0.5
