import numpy as np
import pytest

from fedtalora_flwr.data import DataError
from fedtalora_flwr.data.source import join_classes, take, tidy

# Classes a..e with 5, 1, 0, 3, 2 training rows, in mixed order.
TRAIN = [0, 3, 0, 4, 1, 0, 3, 0, 4, 0, 3]
TEST = [2, 0, 3, 2, 4]
AS_IS = {"test_fraction": 0.0, "max_per_class": 0, "seed": 0}


def test_take_reads_the_chosen_rows_in_the_order_given(make_source):
    source = make_source(TRAIN, TEST, names="abcde")
    part = take(take(source.train, [6, 4, 9, 0]), [2, 0])
    assert part.labels.tolist() == [0, 3]
    assert part.read(np.array([1, 0])) == ["train 6", "train 9"]
    assert part.read(np.array([], dtype=np.int64)) == []


def test_classes_without_training_rows_are_dropped_and_the_rest_renumbered_in_order(make_source):
    source = tidy(make_source(TRAIN, TEST, names="abcde", groups=((2,), (4, 0), (1, 2, 3))), **AS_IS)
    assert source.class_names == ("a", "b", "d", "e")
    assert source.train.labels.tolist() == [0, 2, 0, 3, 1, 0, 2, 0, 3, 0, 2]
    assert source.test.labels.tolist() == [0, 2, 3]
    assert source.test.read(np.arange(3)) == ["test 1", "test 2", "test 4"]
    assert source.groups == ((3, 0), (1, 2))


def test_hold_out_takes_the_share_of_each_class_and_leaves_one_example_in_training(make_source):
    source = tidy(
        make_source(TRAIN, [], names="abcde"), test_fraction=0.4, max_per_class=0, seed=3
    )  # a: 2 of 5, b: 0 of 1, d: 1 of 3, e: 1 of 2
    assert np.bincount(source.test.labels, minlength=4).tolist() == [2, 0, 1, 1]
    assert np.bincount(source.train.labels, minlength=4).tolist() == [3, 1, 2, 1]
    everything = [*source.train.read(np.arange(7)), *source.test.read(np.arange(4))]
    assert sorted(everything) == sorted(f"train {row}" for row in range(len(TRAIN)))


def test_a_source_with_a_test_split_keeps_all_its_training_rows(make_source):
    source = tidy(make_source(TRAIN, TEST, names="abcde"), test_fraction=0.4, max_per_class=0, seed=3)
    assert len(source.train) == len(TRAIN)


def test_max_test_per_class_limits_test_but_not_training(make_source):
    source = tidy(
        make_source(TRAIN, [0, 3, 0, 0, 4, 3], names="abcde"),
        test_fraction=0.0,
        max_per_class=0,
        max_test_per_class=2,
        seed=1,
    )
    assert len(source.train) == len(TRAIN)
    assert np.bincount(source.test.labels).tolist() == [2, 0, 2, 1]  # a, b, d, e


def test_max_per_class_limits_training_but_not_test(make_source):
    source = tidy(make_source(TRAIN, TEST, names="abcde"), test_fraction=0.0, max_per_class=2, seed=1)
    assert np.bincount(source.train.labels).tolist() == [2, 1, 2, 2]
    assert len(source.test) == 3


def test_the_seed_decides_which_examples_are_drawn(make_source):
    def drawn(seed: int) -> list[str]:
        source = make_source([0] * 40 + [1] * 30, [], names="ab")
        source = tidy(source, test_fraction=0.5, max_per_class=7, seed=seed)
        return [*source.train.read(np.arange(14)), *source.test.read(np.arange(35))]

    assert drawn(5) == drawn(5)
    assert drawn(5) != drawn(6)


def test_a_test_split_of_other_classes_only_is_an_error_that_names_both(make_source):
    with pytest.raises(DataError, match=r"no test row of made .*\['b'\].*\['a', 'c'\]"):
        tidy(make_source([0, 2], [1, 1], names="abc"), **AS_IS)


@pytest.mark.parametrize("label", [-1, 3])
def test_a_label_outside_the_classes_is_an_error_that_names_the_row(make_source, label):
    with pytest.raises(DataError, match=rf"must be in \[0, 2\], got {label} in row 1"):
        make_source([0, label, 2], [], names="abc")


def test_a_source_without_training_rows_is_an_error(make_source):
    with pytest.raises(DataError, match="made has no training examples"):
        make_source([], [0], names="a")


@pytest.mark.parametrize(("key", "value"), [("test_fraction", 1.0), ("max_per_class", -1)])
def test_settings_out_of_range_are_errors_that_name_the_key(make_source, key, value):
    with pytest.raises(ValueError, match=key.replace("_", "-")):
        tidy(make_source(TRAIN, TEST, names="abcde"), **{**AS_IS, key: value})


def test_test_classes_are_matched_to_training_classes_by_name(make_source):
    test = make_source([0], [0, 1, 2, 1], names="abc").test
    class_names, joined = join_classes(["cat", "ant", "dog"], test, ["ant", "bee", "cat"])
    assert class_names == ("cat", "ant", "dog", "bee")
    assert joined.labels.tolist() == [1, 3, 0, 3]
