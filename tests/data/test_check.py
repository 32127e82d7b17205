"""Data looked through before a run: a folder with everything in it that people have in their folders."""

import os
import re

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from fedtalora_flwr.cli.app import cli
from fedtalora_flwr.config import RunConfig
from fedtalora_flwr.data import ClassList, DataError, HeldClass, OwnReader, build_stream, load_source, open_data
from fedtalora_flwr.data.check import OUTSIDE, check_data
from fedtalora_flwr.data.remarks import on_shared


def draw(folder, *names, mode="RGB", **options):
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names):
        image = Image.new(mode, (4, 3), number)
        image.save(folder / name, **options)


@pytest.fixture
def messy(tmp_path):
    """Two tasks, of which four files cannot be used, others are passed over, and two hold several frames."""
    root = tmp_path / "scans"
    draw(root / "one" / "cat", *(f"{number}.png" for number in range(20)))
    draw(root / "one" / "dog", *(f"{number}.jpg" for number in range(10)))
    draw(root / "two" / "elk", "alone.png")
    draw(root / "two" / "cat", "deep.tif", mode="I;16")
    draw(root / "two" / "cat" / "2024", "a.png", "b.png", "c.png")
    (root / "one" / "cat" / "broken.png").write_bytes((root / "one" / "cat" / "0.png").read_bytes()[:30])
    (root / "one" / "cat" / "empty.png").touch()
    (root / "one" / "dog" / "phone.jpg").write_bytes(b"\0\0\0\x18ftypheic")
    frames = [Image.new("L", (4, 3), value) for value in (9, 90, 200)]
    for name in ("turn.gif", "stack.tif"):
        frames[0].save(root / "one" / "dog" / name, save_all=True, append_images=frames[1:])
    for name in ("one/cat/1.heic", "one/cat/2.HEIC", "one/dog/ct.dcm", "two/elk/README", "one/cat/.hidden.png"):
        (root / name).write_bytes(b"x")
    (root / "two" / "fox").mkdir()
    return root


def test_a_folder_is_told_as_it_is_understood_with_all_that_is_wrong_in_it(settings, messy):
    found = check_data(str(messy), settings)
    assert (found.dataset, found.modality) == ("nodes", "image")
    counts = {(one.task, one.name): one.num_train + one.num_test for one in found.classes}
    assert counts == {("one", "cat"): 20, ("one", "dog"): 12, ("two", "cat"): 3, ("two", "elk"): 1}
    assert {str(fault.file): fault.reason.partition(" (")[0] for fault in found.faults} == {
        "one/cat/broken.png": "cannot be decoded as an image",
        "one/cat/empty.png": "holds no byte; replace or remove it",
        "one/dog/phone.jpg": "cannot be decoded as an image",
        "two/cat/deep.tif": found.faults[-1].reason,
    }
    assert found.faults[-1].reason.startswith("has image mode I;16, which 8-bit RGB cannot hold")
    assert found.passed_over == {".heic": 2, ".dcm": 1, "no ending": 1}
    assert found.frames == {".gif": [3], ".tif": [3]}
    assert found.remarks == ("two/fox is empty",)


def test_what_cannot_be_read_is_left_out_counted_and_named(settings, messy):
    found = check_data(str(messy), {**settings, "bad_files": "skip"})
    assert found.classes == check_data(str(messy), settings).classes and len(found.faults) == 4
    left_out = "broken.png (one, cat); empty.png (one, cat); phone.jpg (one, dog); deep.tif (two, cat)"
    assert found.remarks[0] == f"4 files are left out, which cannot be read: {left_out}"


def test_a_node_that_leaves_out_bad_files_holds_out_the_same_ones_as_without_them(messy):
    skips = OwnReader("", "", 0.3, 0, bad_files="skip").read(str(messy))
    bad = [messy / fault.file for fault in OwnReader("", "", 0.3, 0).read(str(messy)).image_faults()]
    assert len(bad) == 4 and not set(skips.images) & set(bad)
    for file in bad:
        file.unlink()
    clean = OwnReader("", "", 0.3, 0).read(str(messy))
    assert (clean.held, clean.digest) == (skips.held, skips.digest)


def test_a_file_that_was_mended_is_taken_in_again(messy):
    reader = OwnReader("", "", 0.3, 0, bad_files="skip")
    before = reader.read(str(messy))
    draw(messy / "one" / "cat", "broken.png")
    assert len(reader.read(str(messy)).images) == len(before.images) + 1


def test_more_faults_than_an_error_has_room_for_are_counted(tmp_path):
    draw(tmp_path / "cat", "a.png", "b.png")
    (tmp_path / "texts").mkdir()
    for number in range(40):
        (tmp_path / "texts" / f"table-{number}.csv").write_text("text,label\na,\n")
    with pytest.raises(DataError) as error:
        OwnReader("", "", 0.3, 0).read(str(tmp_path / "texts"))
    message = str(error.value)
    assert message.startswith(
        "40 files cannot be used: table-0.csv cannot be used: label column 'label' of table-0.csv"
    )
    assert len(message) < 500 and message.endswith("more, which fedtalora check names")
    assert len(check_data(str(tmp_path / "texts"), settings_of()).faults) == 40


def settings_of():
    from local_grid import defaults

    return RunConfig.parse(defaults()).settings


def test_pictures_beside_the_classes_are_passed_over_by_name(settings, tmp_path):
    draw(tmp_path / "cat", "a.png", "b.png")
    draw(tmp_path, "stray.png")
    assert check_data(str(tmp_path), settings).passed_over == {OUTSIDE: 1}


@pytest.mark.parametrize("inside", [("2023", "2024"), ("images",)])
def test_folders_that_all_hold_the_same_are_asked_about(settings, tmp_path, inside):
    for animal in ("cat", "dog", "elk"):
        for name in inside:
            draw(tmp_path / animal / name, "a.png", "b.png")
    with pytest.raises(DataError, match=rf"as cat and dog and elk, all hold the same \({', '.join(inside)}\), so that"):
        check_data(str(tmp_path), settings)
    as_classes = check_data(str(tmp_path), {**settings, "folder_layout": "class"}).classes
    assert [(one.task, one.name) for one in as_classes] == [("", "cat"), ("", "dog"), ("", "elk")]
    as_tasks = check_data(str(tmp_path), {**settings, "folder_layout": "task"}).classes
    assert [(one.task, one.name) for one in as_tasks] == [(a, name) for a in ("cat", "dog", "elk") for name in inside]


def test_folders_that_do_not_all_hold_the_same_and_a_single_one_are_tasks(settings, tmp_path):
    draw(tmp_path / "one" / "cat", "a.png")
    assert check_data(str(tmp_path), settings).classes[0].task == "one"
    draw(tmp_path / "two" / "cat", "a.png")
    draw(tmp_path / "two" / "dog", "a.png")
    assert [one.task for one in check_data(str(tmp_path), settings).classes] == ["one", "two", "two"]


def test_tables_of_one_name_in_each_task_are_no_reason_to_ask(settings, tmp_path):
    for task in ("one", "two"):
        (tmp_path / task).mkdir()
        (tmp_path / task / "data.csv").write_text("text,label\na,x\nb,y\n")
    assert [one.task for one in check_data(str(tmp_path), settings).classes] == ["one", "one", "two", "two"]


def test_a_broken_file_whose_name_is_no_utf8_is_named_all_the_same(settings, tmp_path):
    draw(tmp_path / "cat", "a.png")
    (tmp_path / "cat" / os.fsdecode(b"\xff.png")).write_bytes(b"x")
    (fault,) = check_data(str(tmp_path), settings).faults
    assert str(fault).encode().startswith(rb"\udcff.png (cat) cannot be decoded")
    assert r"cat/\udcff.png" in printed(tmp_path, status=1)


def test_a_table_is_told_by_class_with_its_faults(settings, tmp_path):
    (tmp_path / "a.csv").write_text("text;label\n" + "on;lamp\noff;lamp\nopen;door\nshut;door\nx;LAMP \n;door\n")
    found = check_data(str(tmp_path / "a.csv"), settings)
    assert found.dataset == "text" and {one.name for one in found.classes} == {"lamp", "LAMP ", "door"}
    (fault,) = found.faults
    assert "is blank in row 7" in fault.reason and str(fault.file) == "a.csv"
    assert found.remarks[0].startswith("classes 'LAMP ' and 'lamp' differ only by case, space or spelling")
    assert found.remarks[1:] == ()
    skipped = check_data(str(tmp_path / "a.csv"), {**settings, "bad_files": "skip"})
    assert skipped.remarks[0].startswith("1 row is left out: ")


def test_a_data_set_that_the_settings_name_is_read_as_a_run_reads_it(settings, messy, tmp_path):
    found = check_data(str(messy / "one"), {**settings, "dataset": "imagefolder"})
    assert {one.name: one.num_train + one.num_test for one in found.classes} == {"cat": 20, "dog": 12}
    assert len(found.faults) == 3 and found.passed_over == {".heic": 2, ".dcm": 1}
    left = load_source("imagefolder", {**settings, "data_path": str(messy / "one"), "bad_files": "skip"})
    assert len(left.train) + len(left.test) == 32
    assert left.remarks[0].startswith("3 files are left out, which cannot be read: broken.png (cat); empty.png (cat)")
    left.train.read(np.arange(len(left.train)))


# The command


def printed(*words, status):
    found = CliRunner().invoke(cli, ["check", *map(str, words)], env={"COLUMNS": "100"})
    assert found.exit_code == status, found.output
    return found.output


def test_the_command_prints_a_folder_as_understood_and_every_fault_with_its_path(messy):
    shown = printed(messy, status=1)
    assert f"{messy}, read as a node's folder (dataset=nodes)\n36 images: 2 task folders, 3 classes; " in shown
    assert re.search(r"two +cat +\d+ +\d+ .*\n +elk +1 +0 +one example to train on, never tested", shown)
    faults = shown[shown.index("4 faults") : shown.index("Passed over: 4 files")]
    assert {line.strip() for line in faults.splitlines() if line.startswith("      ")} == {
        "one/cat/broken.png",
        "one/cat/empty.png",
        "one/dog/phone.jpg",
        "two/cat/deep.tif",
    }
    assert re.search(r"2 +\.heic +save them as JPEG or PNG\n", shown) and re.search(r"1 +\.tif +of 3 frames", shown)
    assert "A run refuses these data." in shown and "two/fox is empty" in shown


def test_the_command_ends_well_where_bad_files_are_left_out_or_there_are_none(messy):
    assert "Can be used. What is at fault is left out" in printed(messy, "--set", "bad-files=skip", status=0)
    for name in ("one/cat/broken.png", "one/cat/empty.png", "one/dog/phone.jpg", "two/cat/deep.tif"):
        (messy / name).unlink()
    assert printed(messy, status=0).endswith("\nCan be used.\n")


def test_the_command_finds_nothing_to_learn_from_in_an_empty_folder(tmp_path):
    assert printed(tmp_path, status=1).endswith("There is nothing to learn from.\n")


def test_of_many_classes_the_smallest_are_shown(tmp_path):
    for number in range(60):
        draw(tmp_path / f"class-{number:02}", *(f"{row}.png" for row in range(1 + (number != 33))))
    shown = printed(tmp_path, status=0)
    assert "class-33" in shown and "and 20 larger ones" in shown and "119 images in 60 classes" in shown


# What is odd about data that all read


def read_table(settings, tmp_path, rows, **changes):
    (tmp_path / "a.csv").write_text("text,label\n" + "".join(f"{text},{label}\n" for text, label in rows))
    source = open_data("text", {**settings, "data_path": str(tmp_path / "a.csv"), **changes})
    chosen = {"num_tasks": 1, "task_order": "given", "partition": "iid", "num_partitions": 2, "seed": 0}
    chosen |= {key: value for key, value in changes.items() if key in chosen}
    return on_shared(source, build_stream(source, settings=settings, **chosen))


def test_names_that_look_alike_and_a_class_of_one_example_are_told(settings, tmp_path):
    rows = [(number, "alarm") for number in "abcd"] + [(number, "ALARM ") for number in "efgh"] + [("i", "lamp")]
    assert read_table(settings, tmp_path, rows) == [
        "classes 'ALARM ' and 'alarm' differ only by case, space or spelling in Unicode, and are 2 classes",
        "class lamp has one training example",
        "class lamp has no test example, and no part in any accuracy",
    ]


def test_tasks_of_one_class_and_clients_without_an_example_are_told(settings, tmp_path):
    rows = [(f"{label} {number}", label) for label in "abc" for number in range(6)]
    remarks = read_table(settings, tmp_path, rows, num_tasks=2, num_partitions=300)
    assert remarks == [
        "task 2 (c) has one class: with loss-classes=task there is nothing to tell apart and the loss is 0",
        "290 of 300 clients hold no example and never train",
    ]
    assert read_table(settings, tmp_path, rows) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_file_that_this_user_may_not_read_is_a_fault(settings, tmp_path):
    draw(tmp_path / "cat", "a.png", "b.png")
    (tmp_path / "cat" / "b.png").chmod(0)
    (fault,) = check_data(str(tmp_path), settings).faults
    assert "cannot be opened (Permission denied)" in fault.reason or "cannot be decoded" in fault.reason


def test_the_rows_of_classes_are_those_that_a_server_gives(messy):
    data = OwnReader("", "", 0.3, 0, bad_files="skip").read(str(messy))
    classes = ClassList(tasks=((), ())).grown(data.held, next_task=0, num_tasks=2, seed=None)
    assert classes.task_names == ("one", "two") and HeldClass("two", "elk", 1, 0) in data.held
