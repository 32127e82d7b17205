"""A node's folder: layouts, what is held out, and the list of class names that only grows."""

import json
import os

import numpy as np
import pytest
from PIL import Image

from fedtalora_flwr.data import ClassList, DataError, HeldClass, OwnReader
from fedtalora_flwr.data.classes import MOST_CLASSES, require_distinct

READER = OwnReader(input_column="", label_column="", test_fraction=0.3, max_per_class=0)
EMPTY = ClassList(tasks=((), ()))


def held(*names, task=""):
    return [HeldClass(task, name, 3, 1) for name in names]


def write_images(folder, *numbers):
    folder.mkdir(parents=True, exist_ok=True)
    for number in numbers:
        Image.new("RGB", (3, 2), (number, 0, 0)).save(folder / f"{number}.png")


def examples(data):
    return {(f.task, f.name): (f.train, f.test) for f in data.folders}


def test_texts_come_from_files_of_lines_and_tables_in_task_folders(tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    (tmp_path / "one" / "door.txt").write_text("open it\n\n shut it \n")
    rows = [{"text": f"sentence {number}", "label": "lamp" if number % 3 else "oven"} for number in range(9)]
    (tmp_path / "two" / "train.json").write_text(json.dumps(rows))
    data = READER.read(str(tmp_path))
    assert data.modality == "text"
    found = {place: sorted(train + test) for place, (train, test) in examples(data).items()}
    assert found[("one", "door")] == ["open it", "shut it"]
    assert found[("two", "oven")] == ["sentence 0", "sentence 3", "sentence 6"]
    assert len(found[("two", "lamp")]) == 6


@pytest.mark.parametrize("inside", ["\u2028", "\u2029", "\x85"])
def test_a_text_goes_on_after_a_separator_that_ends_no_line_of_a_file(tmp_path, inside):
    (tmp_path / "door.txt").write_bytes(f"open{inside}it\r\nshut it\r\n".encode())
    ((train, test),) = examples(READER.read(str(tmp_path))).values()
    assert sorted(train + test) == [f"open{inside}it", "shut it"]


def test_an_image_may_have_a_name_that_is_not_utf8_and_a_class_may_not(tmp_path):
    write_images(tmp_path / "cat", 1, 2)
    (tmp_path / "cat" / "1.png").rename(tmp_path / "cat" / os.fsdecode(b"b\xff.png"))
    data = READER.read(str(tmp_path))
    assert len(data.digest) == 64 and sum(one.num_train + one.num_test for one in data.held) == 2
    write_images(tmp_path / os.fsdecode(b"d\xffg"), 3)
    with pytest.raises(DataError, match=r"holds 'd\\udcffg', a name that is not UTF-8; rename it"):
        READER.read(str(tmp_path))


def test_examples_that_come_later_move_none_from_training_to_the_held_out_ones(tmp_path):
    write_images(tmp_path / "cat", *range(30))
    ((train, test),) = examples(READER.read(str(tmp_path))).values()
    write_images(tmp_path / "cat", *range(30, 60))
    ((more_train, more_test),) = examples(READER.read(str(tmp_path))).values()
    assert set(train) < set(more_train) and set(test) < set(more_test)
    assert 10 <= len(more_test) <= 26 and not set(more_train) & set(more_test)


def test_a_single_example_is_trained_on(tmp_path):
    for number in range(20):
        write_images(tmp_path / f"class {number}", number)
    assert all((one.num_train, one.num_test) == (1, 0) for one in READER.read(str(tmp_path)).held)


def test_at_most_so_many_examples_of_a_class_are_trained_on(tmp_path):
    write_images(tmp_path / "cat", *range(30))
    few = OwnReader(input_column="", label_column="", test_fraction=0.3, max_per_class=4).read(str(tmp_path))
    assert few.held[0].num_train == 4 and few.held[0].num_test == READER.read(str(tmp_path)).held[0].num_test


def test_split_gives_the_examples_of_a_task_under_the_rows_of_their_names(tmp_path):
    write_images(tmp_path / "later" / "cat", 10, 11, 12)
    write_images(tmp_path / "later" / "ant", 20, 21, 22)
    write_images(tmp_path / "first" / "ant", 30, 31, 32)
    classes = ClassList(names=("ant", "", "cat"), tasks=((0, 1), (0, 2)), task_names=("first", "later"))
    split = OwnReader(input_column="", label_column="", test_fraction=1e-9, max_per_class=0).read(str(tmp_path)).split
    later = split("train", 1, classes)
    assert later.labels.tolist() == [0, 0, 0, 2, 2, 2]
    assert [image.getpixel((0, 0))[0] for image in later.read(np.array([0, 5]))] == [20, 12]
    assert split("train", 0, classes).labels.tolist() == [0, 0, 0]
    assert len(split("test", 0, classes)) == 0


def test_rows_never_move_and_new_names_stand_behind():
    first = EMPTY.grown(held("dog", "bee", "elk"), next_task=0, num_tasks=2, seed=None)
    assert (first.names, first.tasks) == (("bee", "dog", "elk"), ((0, 1), (2,)))
    second = first.grown(held("ant", "dog"), next_task=1, num_tasks=2, seed=None)
    assert (second.names, second.tasks) == (("bee", "dog", "elk", "ant"), ((0, 1), (2, 3)))
    assert second.grown(held("yak"), next_task=2, num_tasks=2, seed=None) == second


def test_task_folders_are_in_order_of_the_numbers_in_their_names():
    both = held("cat", task="task-10") + held("dog", "ant", task="task-9")
    classes = EMPTY.grown(both, next_task=0, num_tasks=2, seed=7)
    assert classes == ClassList(("ant", "dog", "cat"), ((0, 1), (2,)), ("task-9", "task-10"))


@pytest.mark.parametrize(
    "in_order", [["9", "10", "²"], ["a1²", "a2", "a10"], ["task-0", "task-08", "task-9", "task-" + 9999 * "1"]]
)
def test_task_folders_of_any_name_have_an_order(in_order):
    tasks = [one for name in reversed(in_order) for one in held(f"class {name}", task=name)]
    assert EMPTY.grown(tasks, next_task=0, num_tasks=4, seed=None).task_names == tuple(in_order)


def test_class_that_comes_back_in_a_later_task_keeps_its_row():
    both = held("ant", task="a") + held("ant", "bee", task="b")
    classes = EMPTY.grown(both, next_task=0, num_tasks=2, seed=None)
    assert classes.tasks == ((0,), (0, 1))
    assert classes.place("a", "ant") == (0, 0) and classes.place("b", "ant") == (1, 0)
    assert classes.seen(1) == [0, 1]


def test_class_that_comes_into_the_folder_of_a_finished_task_gets_no_row():
    classes = EMPTY.grown(held("ant", task="a"), next_task=0, num_tasks=2, seed=None)
    late = classes.grown(held("ant", "bee", task="a") + held("cat", task="b"), next_task=1, num_tasks=2, seed=None)
    assert late.names == ("ant", "cat") and late.place("a", "bee") is None


def test_too_few_classes_for_the_tasks_are_refused():
    with pytest.raises(DataError, match="the nodes hold 1 classes, too few for num-tasks 2; lower num-tasks"):
        EMPTY.grown(held("ant"), next_task=0, num_tasks=2, seed=None)


@pytest.mark.parametrize(
    ("name", "other"),
    [
        *(("cat", other) for other in ("Cat", "cat ", " cat", "CAT", "c\ufe0fat", "cat\u3164", "\uff43at")),
        ("caf\u00e9", "cafe\u0301"),
        ("STRASSE", "stra\u00dfe"),
        ("\u1fb3", "\u0391\u0345"),
    ],
)
def test_names_that_look_the_same_are_refused(name, other):
    with pytest.raises(DataError, match="differ only by case, space or spelling in Unicode; give both the same name"):
        require_distinct(["dog", name, other])


def test_task_folders_that_look_the_same_are_refused():
    with pytest.raises(DataError, match="name a task 'Task-1' and a task 'task-1', which differ only by case"):
        EMPTY.grown(held("ant", task="Task-1") + held("bee", task="task-1"), next_task=0, num_tasks=4, seed=None)


def test_more_classes_than_a_run_has_room_for_are_refused():
    known = EMPTY.grown(held(*map(str, range(MOST_CLASSES))), next_task=0, num_tasks=2, seed=None)
    with pytest.raises(DataError, match="the nodes name 50001 classes, a run has at most 50000"):
        known.grown(held("one more"), next_task=1, num_tasks=2, seed=None)
