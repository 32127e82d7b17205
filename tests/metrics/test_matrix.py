import json
from dataclasses import FrozenInstanceError

import numpy as np
import pytest

from fedtalora_flwr.metrics import TaskMatrix

SIZES = (10, 40, 50)  # unequal, so that a mean of ratios is not a ratio of sums


@pytest.fixture
def matrix() -> TaskMatrix:
    return (
        TaskMatrix.empty(3).with_row(0, [9], SIZES[:1]).with_row(1, [10, 20], SIZES[:2]).with_row(2, [5, 24, 40], SIZES)
    )


def test_accuracy_is_the_ratio_of_counts_and_nan_above_the_diagonal(matrix):
    expected = np.array([[0.9, np.nan, np.nan], [1.0, 0.5, np.nan], [0.5, 0.6, 0.8]])
    np.testing.assert_array_equal(matrix.accuracy(), expected)


def test_accuracy_seen_weighs_tasks_by_their_examples(matrix):
    assert matrix.accuracy_seen() == (0.9, 30 / 50, 69 / 100)


def test_faa_is_the_last_and_aia_the_mean_of_accuracy_seen(matrix):
    assert matrix.faa() == 0.69
    assert matrix.aia() == pytest.approx((0.9 + 0.6 + 0.69) / 3)


def test_forgetting_compares_the_end_with_the_best_before_it(matrix):
    # task 0: best is 1.0 after task 1, not 0.9 after task 0; task 1 gained 0.1; task 2 does not count.
    assert matrix.forgetting() == pytest.approx(((1.0 - 0.5) + (0.5 - 0.6)) / 2)


def test_a_run_that_stops_early_is_measured_at_its_last_task():
    matrix = TaskMatrix.empty(5).with_row(0, [8], [10]).with_row(1, [4, 15], [10, 20])
    assert matrix.last_task() == 1
    assert matrix.accuracy_seen() == (0.8, 19 / 30, None, None, None)
    assert matrix.faa() == 19 / 30
    assert matrix.forgetting() == pytest.approx(0.4)


def test_one_task_forgets_nothing_and_no_task_has_no_number():
    assert TaskMatrix.empty(3).with_row(0, [1], [2]).forgetting() == 0.0
    nothing = TaskMatrix.empty(3)
    assert (nothing.faa(), nothing.aia(), nothing.forgetting(), nothing.last_task()) == (None,) * 4


def test_forgetting_is_undefined_where_no_earlier_task_was_measured_twice():
    assert TaskMatrix.empty(3).with_row(2, [1, 2, 3], SIZES).forgetting() is None


def test_forgetting_leaves_out_a_task_without_test_data():
    matrix = TaskMatrix.empty(3).with_row(0, [0], [0]).with_row(1, [0, 8], [0, 10])
    assert matrix.with_row(2, [0, 6, 1], [0, 10, 4]).forgetting() == pytest.approx(0.2)


def test_with_row_leaves_the_matrix_it_was_called_on_alone(matrix):
    again = matrix.with_row(1, [0, 0], SIZES[:2])
    assert matrix.correct[1].tolist() == [10, 20, 0]
    assert again.correct[1].tolist() == [0, 0, 0]
    with pytest.raises(ValueError, match="read-only"):
        matrix.correct[0, 0] = 1
    with pytest.raises(FrozenInstanceError):
        matrix.total = matrix.correct


def test_counts_survive_json(matrix):
    again = TaskMatrix.from_json(json.loads(json.dumps(matrix.to_json())))
    np.testing.assert_array_equal(again.correct, matrix.correct)
    np.testing.assert_array_equal(again.total, matrix.total)


def test_summary_is_json_with_null_where_nothing_was_measured(matrix):
    summary = json.loads(json.dumps(matrix.summary(), allow_nan=False))
    assert summary["accuracy_matrix"][0] == [0.9, None, None]
    assert summary["faa"] == 0.69


@pytest.mark.parametrize(
    ("task_id", "correct", "total", "message"),
    [
        (3, [1], [2], r"task_id must be in \[0, 2\], got 3"),
        (1, [1], [2], "must hold 2 counts"),
        (0, [3], [2], "3 correct of 2"),
        (0, [-1], [2], "-1 correct"),
        (0, [0, 0, 0], [2, 2, 0], "task 1 was not seen yet after task 0"),
    ],
)
def test_impossible_counts_are_refused(task_id, correct, total, message):
    with pytest.raises(ValueError, match=message):
        TaskMatrix.empty(3).with_row(task_id, correct, total)


def test_counts_of_unequal_shapes_are_refused():
    with pytest.raises(ValueError, match=r"\(T, T\)"):
        TaskMatrix(np.zeros((2, 3)), np.zeros((2, 3)))
    with pytest.raises(ValueError, match="no 'total'"):
        TaskMatrix.from_json({"correct": [[1]]})
