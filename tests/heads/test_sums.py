"""Sums over features: their roots, and how they follow features that move."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from fedtalora_flwr import heads
from fedtalora_flwr.heads import FeatureRoot, FeatureSums, logits, rows_at_means

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


def moved(features: torch.Tensor, seed: int) -> torch.Tensor:
    """Features after a linear move, the same for all of a seed."""
    generator = torch.Generator().manual_seed(seed)
    turn = torch.eye(DIM, dtype=torch.float64) + 0.3 * torch.randn(DIM, DIM, generator=generator, dtype=torch.float64)
    return features @ turn.T + torch.randn(DIM, generator=generator, dtype=torch.float64)


@given(seed=st.integers(0, 2**32), num_clients=st.integers(1, 4))
@settings(max_examples=50, deadline=None)
def test_old_sums_follow_a_linear_move_exactly_whoever_holds_the_new_examples(seed, num_clients):
    old, old_labels = drawn(seed, 9)  # nobody has these any more
    new, labels = drawn(seed + 1, 40)
    holders = torch.randint(0, num_clients, (40,), generator=torch.Generator().manual_seed(seed))
    drift = FeatureSums.zero(num_classes=NUM_CLASSES, feature_dim=2 * DIM)
    for client in range(num_clients):
        mine = holders == client
        both = torch.cat([new[mine], moved(new[mine], seed)], 1)
        drift = drift + FeatureRoot.of(both, labels[mine], num_classes=NUM_CLASSES).sums()
    before = FeatureSums.of(old, old_labels, num_classes=NUM_CLASSES)
    wanted = FeatureSums.of(moved(old, seed), old_labels, num_classes=NUM_CLASSES)
    wanted = wanted + FeatureSums.of(moved(new, seed), labels, num_classes=NUM_CLASSES)
    assert_same(before.followed(drift, shrinkage=1e-12), wanted, 1e-7)


def test_sums_stay_as_they_are_where_no_feature_has_moved():
    (old, old_labels), (new, labels) = drawn(0, 9), drawn(1, 3)
    drift = FeatureSums.of(torch.cat([new, new], 1), labels, num_classes=NUM_CLASSES)
    before = FeatureSums.of(old, old_labels, num_classes=NUM_CLASSES)
    assert_same(before.followed(drift), before + FeatureSums.of(new, labels, num_classes=NUM_CLASSES), 1e-12)


def test_directions_that_the_new_examples_do_not_show_are_left_alone():
    old, old_labels = drawn(0, 9)
    new, labels = drawn(1, 40)
    new[:, 0] = 0
    after = new.clone()
    after[:, 1] *= 3
    drift = FeatureSums.of(torch.cat([new, after], 1), labels, num_classes=NUM_CLASSES)
    before = FeatureSums.of(old, old_labels, num_classes=NUM_CLASSES)
    found = before.followed(drift, shrinkage=1e-9) + FeatureSums.of(after, labels, num_classes=NUM_CLASSES)
    change = found.moment - before.moment - 2 * FeatureSums.of(after, labels, num_classes=NUM_CLASSES).moment
    assert change[:, 0].abs().max() < 1e-6
    torch.testing.assert_close(change[:, 1], 2 * before.moment[:, 1], rtol=1e-4, atol=1e-4)


def test_lda_is_that_of_scikit_learn_where_classes_are_of_one_size():
    labels = torch.arange(NUM_CLASSES).repeat(15)
    features = drawn(0, len(labels))[0] @ drawn(1, DIM)[0] + torch.nn.functional.one_hot(labels, DIM)
    shrinkage = 0.25
    head = heads.resolve("lda", {"lda_shrinkage": shrinkage})
    sums = FeatureSums.of(features, labels, num_classes=NUM_CLASSES + 1)  # one class has no example
    rows = head.classifier({}, sums).rows
    theirs = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=shrinkage / (1 + shrinkage))
    wanted = theirs.fit(features.numpy(), labels.numpy()).decision_function(features.numpy())
    found = logits(rows, features.float(), torch.arange(NUM_CLASSES)).double().numpy() * (1 + shrinkage)
    centred = [scores - scores.mean(1, keepdims=True) for scores in (found, wanted)]
    np.testing.assert_allclose(*centred, rtol=1e-4, atol=1e-4)
    assert not any(rows[name][NUM_CLASSES].any() for name in rows)


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
