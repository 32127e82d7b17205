import numpy as np
import pytest

from fedtalora_flwr.config import registry
from fedtalora_flwr.data import PARTITIONS, build_stream

SETTINGS = {"classes_per_client": 2, "dirichlet_beta": 0.3}
TRAIN = [row * row % 7 if row % 3 else row % 7 for row in range(210)]  # 7 classes of unequal sizes
TEST = [0, 6, 3, 1, 5, 2, 4, 0, 3]


@pytest.fixture
def stream_of(make_source):
    def build(**changes):
        groups = changes.pop("groups", ())
        source = make_source(TRAIN, TEST, names="abcdefg", groups=groups)
        options = {
            "num_tasks": 3,
            "task_order": "seeded",
            "partition": "dirichlet",
            "num_partitions": 5,
            "seed": 0,
            "settings": SETTINGS,
        }
        return source, build_stream(source, **{**options, **changes})

    return build


@pytest.mark.parametrize("partition", registry.available(PARTITIONS))
def test_every_training_row_is_held_once_in_the_task_of_its_class(stream_of, partition):
    source, stream = stream_of(partition=partition)
    held = [np.concatenate(parts) for parts in stream.partitions]
    assert sorted(np.concatenate(held).tolist()) == list(range(len(TRAIN)))
    for classes, rows in zip(stream.tasks, held, strict=True):
        assert set(source.train.labels[rows].tolist()) == set(classes)


def test_task_sizes_differ_by_at_most_one_class(stream_of):
    _, stream = stream_of(num_tasks=3)
    assert [len(classes) for classes in stream.tasks] == [3, 2, 2]
    assert stream.class_order == tuple(c for classes in stream.tasks for c in classes)
    assert sorted(stream.class_order) == list(range(7))


def test_given_order_keeps_the_numbers_of_the_classes(stream_of):
    _, stream = stream_of(task_order="given")
    assert stream.tasks == ((0, 1, 2), (3, 4), (5, 6))


def test_seeded_order_follows_the_seed_and_not_the_number_of_tasks(stream_of):
    orders = [stream_of(seed=seed)[1].class_order for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    assert stream_of(num_tasks=6)[1].class_order == orders[0]


def test_domain_order_keeps_each_group_in_one_task(stream_of):
    groups = ((4, 1), (0,), (6, 2, 3), (5,))
    _, one_each = stream_of(task_order="domain", num_tasks=4, groups=groups)
    assert sorted(one_each.tasks) == sorted(groups)
    _, joined = stream_of(task_order="domain", num_tasks=2, groups=groups)
    assert all(any(set(group) <= set(classes) for classes in joined.tasks) for group in groups)


def test_domain_order_without_groups_is_an_error_with_a_way_out(stream_of):
    with pytest.raises(ValueError, match=r"made has none; set task-order to seeded or given"):
        stream_of(task_order="domain")


def test_domain_order_with_groups_that_miss_a_class_is_an_error(stream_of):
    with pytest.raises(ValueError, match="each of its 7 classes once"):
        stream_of(task_order="domain", num_tasks=1, groups=((0, 1, 2), (3, 4, 5)))


@pytest.mark.parametrize("num_tasks", [0, 8])
def test_more_tasks_than_classes_is_an_error_that_names_both(stream_of, num_tasks):
    with pytest.raises(ValueError, match=rf"num-tasks must be in \[1, 7\].*got {num_tasks}"):
        stream_of(num_tasks=num_tasks)


def test_more_tasks_than_groups_is_an_error_that_names_both(stream_of):
    with pytest.raises(ValueError, match=r"num-tasks must be in \[1, 2\], the groups of classes.*got 3"):
        stream_of(task_order="domain", groups=((0, 1, 2), (3, 4, 5, 6)))


def test_unknown_names_are_errors_that_list_the_choices(stream_of):
    with pytest.raises(ValueError, match="seeded, given, domain"):
        stream_of(task_order="random")
    with pytest.raises(ValueError, match="dirichlet, dirichlet-sizes, iid, quantity"):
        stream_of(partition="pathological")


def test_no_clients_is_an_error(stream_of):
    with pytest.raises(ValueError, match="num-clients must be at least 1, got 0"):
        stream_of(num_partitions=0)


def test_class_counts_say_how_many_of_each_class_a_partition_holds(stream_of):
    source, stream = stream_of()
    counts = stream.class_counts(source.train.labels)
    assert counts.shape == (5, 7)
    assert counts.sum(axis=0).tolist() == np.bincount(TRAIN).tolist()
    rows = np.concatenate([parts[3] for parts in stream.partitions])
    assert counts[3].tolist() == np.bincount(source.train.labels[rows], minlength=7).tolist()


def test_test_rows_are_those_of_the_classes_of_the_task(stream_of):
    source, stream = stream_of(task_order="given")
    assert stream.test_rows(source.test.labels, 0).tolist() == [0, 3, 5, 7]
    assert stream.test_rows(source.test.labels, 2).tolist() == [1, 4]


def test_partition_hash_changes_with_rows_and_with_labels_only(stream_of):
    source, stream = stream_of()
    labels = source.train.labels
    hashes = [stream.partition_hash(labels, partition_id) for partition_id in range(5)]
    assert hashes == [stream_of()[1].partition_hash(labels, partition_id) for partition_id in range(5)]
    assert len(set(hashes)) == 5
    row = next(part[0] for part in (parts[2] for parts in stream.partitions) if len(part))
    relabelled = labels.copy()
    relabelled[row] = (labels[row] + 1) % 7
    changed = [stream.partition_hash(relabelled, partition_id) != hashes[partition_id] for partition_id in range(5)]
    assert changed == [False, False, True, False, False]
