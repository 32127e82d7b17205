"""Figures by class and by client, against numbers worked out by hand."""

import numpy as np
import pytest

from fedtalora_flwr.metrics import Judged
from fedtalora_flwr.metrics.judged import of_clients

NAMES = ("ant", "bee", "cat", "dog")  # nobody has tested a dog
LABELS = [0, 0, 0, 0, 1, 1, 2]
SAID = [0, 0, 0, 1, 1, 0, 0]
CONFIDENCE = [0.99, 0.95, 0.6, 0.95, 0.5, 0.5, 0.3]


@pytest.fixture
def judged() -> Judged:
    return Judged.of(LABELS, SAID, CONFIDENCE, num_classes=4)


@pytest.fixture
def summary(judged):
    return judged.summary(NAMES, classes=[3, 1, 0, 2])


def test_confusion_has_a_row_for_each_true_class(judged):
    assert judged.confusion.tolist() == [[3, 1, 0, 0], [1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]


def test_means_are_over_the_classes_that_have_examples(summary):
    assert summary["num_examples"] == 7
    assert summary["accuracy"] == pytest.approx(4 / 7)
    assert summary["balanced_accuracy"] == pytest.approx((3 / 4 + 1 / 2 + 0) / 3)
    assert summary["macro_f1"] == pytest.approx((2 / 3 + 1 / 2 + 0) / 3)


def test_a_class_without_an_example_is_named_and_not_counted_as_wrong(summary):
    dog, bee, ant, cat = summary["classes"]
    assert dog == {"class": "dog", "num_examples": 0}
    assert bee == {"class": "bee", "num_examples": 2, "accuracy": 0.5, "precision": 0.5, "f1": 0.5}
    assert ant["precision"] == pytest.approx(3 / 5) and ant["f1"] == pytest.approx(2 / 3)
    assert cat == {"class": "cat", "num_examples": 1, "accuracy": 0.0, "precision": 0.0, "f1": 0.0}


def test_calibration_error_is_the_gap_of_each_bin_by_its_examples(judged, summary):
    # (14/15, 1]: 3 examples, 2 hits, confidence 2.89; around 0.5: 2, 1, 1.0; up to 0.6: 1, 1, 0.6; up to 1/3: 1, 0, 0.3
    assert judged.ece() == pytest.approx((0.89 + 0 + 0.4 + 0.3) / 7)
    assert [(one["num_examples"], one["accuracy"]) for one in summary["calibration"]] == [
        (1, 0.0),
        (2, 0.5),
        (1, 1.0),
        (3, pytest.approx(2 / 3)),
    ]
    assert summary["calibration"][-1]["confidence"] == pytest.approx(2.89 / 3)


def test_confusions_are_the_cells_beside_the_diagonal_the_largest_first():
    judged = Judged.of([0, 0, 1, 1, 1], [1, 0, 0, 0, 1], [0.5] * 5, num_classes=2)
    assert judged.summary(["a", "b"], classes=[0, 1])["confusions"] == [
        {"class": "b", "taken_for": "a", "num_examples": 2},
        {"class": "a", "taken_for": "b", "num_examples": 1},
    ]


def test_confusion_matrix_is_in_the_order_of_the_classes_and_left_out_of_many(summary):
    assert summary["confusion"] == [[0, 0, 0, 0], [0, 1, 1, 0], [0, 1, 3, 0], [0, 0, 1, 0]]
    many = Judged.of([0], [0], [1.0], num_classes=51)
    assert "confusion" not in many.summary([str(c) for c in range(51)], classes=range(51))


def test_accuracy_on_a_mix_weighs_each_class_and_leaves_out_what_was_not_tested(judged):
    expected = judged.accuracy_on([[2, 2, 0, 5], [0, 0, 3, 0], [0, 0, 0, 4]])
    np.testing.assert_allclose(expected, [(2 * 3 / 4 + 2 * 1 / 2) / 4, 0.0, np.nan])


def test_counts_add_up_and_survive_being_written_down(judged):
    halves = [Judged.of(LABELS[i::2], SAID[i::2], CONFIDENCE[i::2], num_classes=4) for i in (0, 1)]
    whole = halves[0] + halves[1]
    read = Judged.from_cells(whole.cells(), whole.bins, num_classes=4)
    np.testing.assert_array_equal(read.confusion, judged.confusion)
    np.testing.assert_allclose(read.bins, judged.bins)


def test_nothing_judged_gives_no_number_and_a_confidence_that_is_none_counts_as_zero():
    nothing = Judged.of([], [], [], num_classes=2)
    assert np.isnan(nothing.ece()) and nothing.summary("ab", classes=[0, 1])["macro_f1"] is None
    assert Judged.of([0], [0], [np.nan], num_classes=2).bins[0].tolist() == [1, 1, 0]


def test_clients_that_tell_hits_alone_get_their_accuracy_and_a_word_on_the_rest():
    found = of_clients({2: (1, 4), 0: (3, 3), 1: (0, 0)})
    assert found["num_examples"] == 7 and found["accuracy"] == pytest.approx(4 / 7)
    first, second, third = found["clients"]
    assert first == {"partition_id": 0, "num_examples": 3, "accuracy": 1.0}
    assert second["accuracy"] is None and third["accuracy"] == 0.25
    assert "not known here" in found["remark"] and "macro_f1" not in found
    assert of_clients({}) == {}
