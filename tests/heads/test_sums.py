"""Sums over features: their roots, and how they follow features that move."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from fedtalora_flwr.model import heads
from fedtalora_flwr.model.heads import FeatureRoot, FeatureSums, logits, rows_at_means
from fedtalora_flwr.model.train import sum_drift

NUM_CLASSES, DIM = 4, 5


def drawn(seed: int, num_examples: int, dim: int = DIM) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(num_examples, dim, generator=generator, dtype=torch.float64)
    return features, torch.randint(0, NUM_CLASSES, (num_examples,), generator=generator)


def assert_same(found: FeatureSums, wanted: FeatureSums, tolerance: float) -> None:
    for a, b in ((found.gram, wanted.gram), (found.moment, wanted.moment)):
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance * float(wanted.gram.abs().max()))


@given(sizes=st.lists(st.integers(0, 12), min_size=1, max_size=4), seed=st.integers(0, 2**32))
@settings(max_examples=50, deadline=None)
def test_roots_add_up_to_the_sums_of_all_examples_and_never_have_more_rows_than_columns(sizes, seed):
    features, labels = drawn(seed, sum(sizes))
    total = FeatureRoot.zero(num_classes=NUM_CLASSES, feature_dim=DIM)
    for part, of in zip(features.split(sizes), labels.split(sizes), strict=True):
        total = total + FeatureRoot.of(part, of, num_classes=NUM_CLASSES)
    assert total.root.shape == (min(sum(sizes), DIM + 1), DIM + 1)
    assert torch.equal(total.root, total.root.triu())
    assert_same(total.sums(), FeatureSums.of(features, labels, num_classes=NUM_CLASSES), 1e-13)


def gram_of(before: torch.Tensor, now: torch.Tensor) -> torch.Tensor:
    root = sum_drift(before, now)
    return root.T @ root


def moved(features: torch.Tensor, seed: int) -> torch.Tensor:
    """Features after a linear move, the same for all of a seed."""
    generator = torch.Generator().manual_seed(seed)
    turn = torch.eye(DIM, dtype=torch.float64) + 0.3 * torch.randn(DIM, DIM, generator=generator, dtype=torch.float64)
    return features @ turn.T + torch.randn(DIM, generator=generator, dtype=torch.float64)


@given(seed=st.integers(0, 2**32), num_clients=st.integers(1, 4))
@settings(max_examples=50, deadline=None)
def test_old_sums_follow_a_linear_move_exactly_whoever_holds_the_new_examples(seed, num_clients):
    old, old_labels = drawn(seed, 9)  # nobody has these any more
    new, _ = drawn(seed + 1, 40)
    holders = torch.randint(0, num_clients, (40,), generator=torch.Generator().manual_seed(seed))
    drift = torch.zeros(2 * DIM + 1, 2 * DIM + 1, dtype=torch.float64)
    for client in range(num_clients):
        mine = holders == client
        drift = drift + gram_of(new[mine], moved(new[mine], seed))
    before = FeatureSums.of(old, old_labels, num_classes=NUM_CLASSES)
    wanted = FeatureSums.of(moved(old, seed), old_labels, num_classes=NUM_CLASSES)
    assert_same(before.followed(drift, shrinkage=1e-12), wanted, 1e-7)


def test_sums_stay_as_they_are_where_no_feature_has_moved():
    (old, old_labels), (new, _) = drawn(0, 9), drawn(1, 3)
    before = FeatureSums.of(old, old_labels, num_classes=NUM_CLASSES)
    assert_same(before.followed(gram_of(new, new)), before, 1e-12)


def test_directions_that_the_new_examples_do_not_show_are_left_alone():
    old, old_labels = drawn(0, 9)
    new, _ = drawn(1, 40)
    new[:, 0] = 0
    after = new.clone()
    after[:, 1] *= 3
    before = FeatureSums.of(old, old_labels, num_classes=NUM_CLASSES)
    change = before.followed(gram_of(new, after), shrinkage=1e-9).moment - before.moment
    assert change[:, 0].abs().max() < 1e-6
    torch.testing.assert_close(change[:, 1], 2 * before.moment[:, 1], rtol=1e-4, atol=1e-4)


def test_lda_is_that_of_scikit_learn_where_class_means_are_equally_far_from_their_middle():
    labels = torch.arange(NUM_CLASSES).repeat(15)
    noise = drawn(0, len(labels))[0] @ drawn(1, DIM)[0]
    for c in range(NUM_CLASSES):
        noise[labels == c] -= noise[labels == c].mean(0)
    shrinkage = 1e6  # the metric is then that of space itself, and the corners of a simplex are equally far
    features = noise + torch.nn.functional.one_hot(labels, DIM)
    head = heads.resolve("lda", {"lda_shrinkage": shrinkage})
    sums = FeatureSums.of(features, labels, num_classes=NUM_CLASSES + 1)  # one class has no example
    rows = head.classifier({}, sums).rows
    theirs = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=shrinkage / (1 + shrinkage))
    wanted = theirs.fit(features.numpy(), labels.numpy()).decision_function(features.numpy())
    found = logits(rows, features.float(), torch.arange(NUM_CLASSES)).double().numpy() * (1 + shrinkage)
    centred = [scores - scores.mean(1, keepdims=True) for scores in (found, wanted)]
    np.testing.assert_allclose(*centred, rtol=1e-3, atol=1e-3)
    assert not any(rows[name][NUM_CLASSES].any() for name in rows)


@given(seed=st.integers(0, 2**32), factor=st.floats(0.1, 1.0))
@settings(max_examples=50, deadline=None)
def test_lda_tells_a_class_by_its_direction_however_near_its_mean_is_to_the_middle(seed, factor):
    generator = torch.Generator().manual_seed(seed)
    means = torch.nn.functional.one_hot(torch.arange(DIM)).double() * 4  # one class an axis
    labels = torch.arange(DIM).repeat(2)
    apart = torch.ones(DIM, DIM, dtype=torch.float64) / DIM + torch.eye(DIM)
    features = means[labels] + torch.cat([apart, -apart])
    head = heads.resolve("lda", {"lda_shrinkage": 0.3})
    sums = FeatureSums.of(features, labels, num_classes=DIM)
    near = sums.moment.clone()  # a class that a map has drawn to the middle of all
    middle = near[:, :-1].sum(0) / near[:, -1].sum()
    near[0, :-1] = near[0, -1] * (middle + factor * (near[0, :-1] / near[0, -1] - middle))
    rows = head.classifier({}, FeatureSums(sums.gram, near)).rows
    tests = means + 0.1 * torch.randn(DIM, DIM, generator=generator, dtype=torch.float64)
    assert logits(rows, tests.float(), torch.arange(DIM)).argmax(1).tolist() == list(range(DIM))


@pytest.mark.parametrize("scale", [0.01, 1.0, 100.0])
def test_rows_at_means_prefer_the_nearest_mean_by_a_margin_that_no_scale_changes(scale):
    means = scale * drawn(0, NUM_CLASSES)[0] + 3 * scale
    features = scale * drawn(1, 50)[0] + 3 * scale
    rows = rows_at_means(means)
    scores = logits(rows, features.float(), torch.arange(NUM_CLASSES))
    assert torch.equal(scores.argmax(1), torch.cdist(features, means).argmin(1))
    middle = logits(rows, means.mean(0, keepdim=True).float(), torch.arange(NUM_CLASSES)).double()
    own = logits(rows, means.float(), torch.arange(NUM_CLASSES)).diagonal().double()
    assert float((own - middle[0]).mean()) == pytest.approx(6.0, rel=1e-3)
