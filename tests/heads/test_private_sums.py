"""Feature sums with noise: what is added, and that what is sent is what examples can have."""

import math

import pytest
import torch

from fedtalora_flwr.model.heads import FeatureRoot
from fedtalora_flwr.model.private_sums import _lowered, noisy_sums, possible_root, private_root

NUM_CLASSES, WIDTH, RADIUS = 5, 4, 3.0


def drawn(num_examples, seed=0):
    """Features of the length that those of a run have, some classes without an example."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(num_examples, WIDTH, generator=generator).double()
    labels = torch.tensor([0, 3, 4])[torch.randint(0, 3, (num_examples,), generator=generator)]
    return RADIUS * torch.nn.functional.normalize(features, dim=1), labels


@pytest.mark.parametrize("num_examples", [1, 3, 30])
def test_without_noise_the_sums_are_those_of_the_examples(num_examples):
    features, labels = drawn(num_examples)
    told = {"num_classes": NUM_CLASSES}
    got = private_root(features, labels, radius=RADIUS, noise_multiplier=0.0, **told)
    wanted = FeatureRoot.of(features, labels, **told)
    assert got.root.shape == wanted.root.shape
    torch.testing.assert_close(got.sums().gram, wanted.sums().gram)
    torch.testing.assert_close(got.moment, wanted.moment)


def test_a_longer_feature_is_taken_down_to_the_radius():
    features, labels = drawn(6)
    got = private_root(7 * features, labels, num_classes=NUM_CLASSES, radius=RADIUS, noise_multiplier=0.0)
    torch.testing.assert_close(got.sums().gram, FeatureRoot.of(features, labels, num_classes=NUM_CLASSES).sums().gram)


@pytest.mark.parametrize("num_examples", [1, 3, 30, 500])
@pytest.mark.parametrize("noise_multiplier", [0.1, 10.0])
def test_with_noise_they_are_what_examples_can_have(num_examples, noise_multiplier):
    features, labels = drawn(num_examples)
    root = private_root(features, labels, num_classes=NUM_CLASSES, radius=RADIUS, noise_multiplier=noise_multiplier)
    sums = root.sums()
    assert root.root.shape == (min(num_examples, WIDTH + 1), WIDTH + 1) and sums.possible()
    assert torch.equal(sums.moment[:, -1], torch.bincount(labels, minlength=NUM_CLASSES).double())
    assert sums.feature_norm() <= math.sqrt(RADIUS**2 + 1) * (1 + 1e-9)
    assert (sums.gram - FeatureRoot.of(features, labels, num_classes=NUM_CLASSES).sums().gram).abs().max() > 1e-3


def test_noise_is_a_multiple_of_what_one_example_changes():
    features, labels = drawn(20)
    told = {"num_classes": NUM_CLASSES, "radius": RADIUS}
    gram, moment = noisy_sums(features, labels, noise_multiplier=0.0, **told)
    noise = [noisy_sums(features, labels, noise_multiplier=2.0, **told) for _ in range(600)]
    upper = torch.triu_indices(WIDTH, WIDTH)
    change = math.sqrt(2) * RADIUS**2
    of_gram = torch.stack([(noisy - gram)[upper[0], upper[1]] for noisy, _ in noise])
    of_moment = torch.stack([RADIUS * (noisy - moment) for _, noisy in noise])
    assert float(of_gram.std()) == pytest.approx(2.0 * change, rel=0.06)
    assert float(of_moment.std()) == pytest.approx(2.0 * change, rel=0.06)
    assert all(torch.equal(noisy, noisy.T) for noisy, _ in noise)
    for row in range(20):
        kept = torch.arange(20) != row
        less = noisy_sums(features[kept], labels[kept], noise_multiplier=0.0, **told)
        moved = (gram - less[0])[upper[0], upper[1]].square().sum() + (RADIUS * (moment - less[1])).square().sum()
        assert float(moved.sqrt()) <= change * (1 + 1e-9)


def test_eigenvalues_are_lowered_alike_until_their_sum_is_what_can_be():
    values = torch.tensor([-2.0, 1.0, 3.0, 5.0]).double()
    assert _lowered(values, total=20.0).tolist() == [0, 1, 3, 5]
    assert _lowered(values, total=6.0).tolist() == [0, 0, 2, 4]
    assert _lowered(values, total=1.0).tolist() == [0, 0, 0, 1]
    assert _lowered(values, total=0.0).tolist() == [0, 0, 0, 0]
    assert float(_lowered(1e6 * values, total=1e-13).sum()) < 1e-9


def test_means_that_noise_has_made_too_long_are_taken_back():
    counts = torch.tensor([2.0, 0, 0, 3.0, 0]).double()
    root = possible_root(torch.zeros(WIDTH, WIDTH).double(), 100 * torch.ones(5, WIDTH).double(), counts, radius=RADIUS)
    assert root.sums().possible() and root.moment[1:3].abs().sum() == 0
    assert float((root.moment[3, :-1] / 3).norm()) == pytest.approx(RADIUS)
