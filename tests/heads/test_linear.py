import pytest
import torch

from fedtalora_flwr.model import heads
from fedtalora_flwr.model.heads import FeatureSums, init_rows, logits

NUM_CLASSES, FEATURE_DIM = 4, 6


def test_linear_head_classifies_with_the_trained_rows_as_they_are_and_asks_for_no_sums():
    head = heads.resolve("linear", {})
    trained = {"weight": torch.randn(NUM_CLASSES, FEATURE_DIM), "bias": torch.randn(NUM_CLASSES)}
    rows = head.classifier(trained, FeatureSums.zero(num_classes=NUM_CLASSES, feature_dim=FEATURE_DIM)).rows
    assert not head.collects_sums
    assert rows == trained


def test_rows_begin_at_zero_so_that_no_class_is_preferred():
    rows = init_rows(num_classes=NUM_CLASSES, feature_dim=FEATURE_DIM)
    assert rows["weight"].shape == (NUM_CLASSES, FEATURE_DIM) and rows["bias"].shape == (NUM_CLASSES,)
    assert all(torch.count_nonzero(value) == 0 for value in rows.values())


def test_logits_are_those_of_the_chosen_classes_in_their_order():
    rows = {"weight": torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 2.0]]), "bias": torch.tensor([0.0, 10.0, 0.5])}
    features = torch.tensor([[3.0, 4.0]])
    assert logits(rows, features, torch.tensor([2, 0])).tolist() == [[14.5, 3.0]]


def test_unknown_head_is_refused_with_the_choices():
    with pytest.raises(ValueError, match="there is no head 'forest'; choose one of: lda, linear, lm, prototype, ridge"):
        heads.resolve("forest", {})
