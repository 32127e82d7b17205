"""Data sets joined to one whose tasks they are, pairs of texts, and the data sets that are known by name."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtalora_flwr.config import ConfigError, RunConfig
from fedtalora_flwr.config.joined import Part, joined, parts_of
from fedtalora_flwr.config.sources import app_folder, gather
from fedtalora_flwr.data import DataError, Source, Split, build_stream, load_source, stored_side
from fedtalora_flwr.data.sources.join import _side_by_side


def write(path: Path, header: tuple[str, ...], rows: list[tuple[Any, ...]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


@pytest.fixture
def tables(tmp_path: Path) -> str:
    """A folder of single texts with a test split and a file of pairs without, of uneven sizes, joined."""
    write(tmp_path / "lines" / "train.csv", ("text", "label"), [(f"line {n}", "ab"[n % 2]) for n in range(5)])
    write(tmp_path / "lines" / "test.csv", ("text", "label"), [("held 0", "b"), ("held 1", "a")])
    pairs = [(f"first {n}", f"second {n}", "xyz"[n % 3]) for n in range(30)]
    write(tmp_path / "pairs.csv", ("premise", "hypothesis", "label"), pairs)
    return f"join:text={tmp_path / 'lines'}+text={tmp_path / 'pairs.csv'}"


def everything(source: Source, split: Split) -> list[tuple[str, Any]]:
    read = split.read(np.arange(len(split)))
    return [(source.class_names[label], raw) for label, raw in zip(split.labels, read, strict=True)]


# Joined sets


def test_parts_are_groups_of_classes_under_their_names_and_rows_keep_their_inputs(settings, tables):
    source = load_source(tables, settings)
    assert source.class_names == ("lines/a", "lines/b", "pairs/x", "pairs/y", "pairs/z")
    assert source.groups == ((0, 1), (2, 3, 4))
    assert (source.modality, source.num_texts) == ("text", (1, 2))
    train, test = everything(source, source.train), everything(source, source.test)
    assert [row for row in train if row[0].startswith("lines")] == [
        (f"lines/{'ab'[n % 2]}", f"line {n}") for n in range(5)
    ]
    assert [row for row in test if row[0].startswith("lines")] == [("lines/b", "held 0"), ("lines/a", "held 1")]
    of_pairs = sorted(row for row in train + test if row[0].startswith("pairs"))
    assert of_pairs == sorted((f"pairs/{'xyz'[n % 3]}", (f"first {n}", f"second {n}")) for n in range(30))
    assert np.bincount(source.test.labels).tolist() == [1, 1, 2, 2, 2]  # of the part without a split a fifth of each


def test_a_part_is_drawn_as_if_it_were_the_only_one(settings, tables):
    few = {**settings, "max_per_class": 3, "max_test_per_class": 1, "seed": 4}
    source = load_source(tables, few)
    alone = load_source("text", {**few, "data_path": str(parts_of(tables)[1].path)})
    for split in ("train", "test"):
        whole = everything(source, getattr(source, split))
        of_part = [(name.removeprefix("pairs/"), raw) for name, raw in whole if name.startswith("pairs")]
        assert of_part == everything(alone, getattr(alone, split))
    assert np.bincount(source.train.labels).tolist() == [3, 2, 3, 3, 3]


def test_each_part_is_one_task_in_order_domain(settings, tables):
    source = load_source(tables, settings)
    stream = build_stream(
        source, num_tasks=2, task_order="domain", partition="iid", num_partitions=3, seed=1, settings=settings
    )
    assert sorted(stream.tasks) == [(0, 1), (2, 3, 4)]


@given(st.lists(st.integers(0, 4), min_size=1, max_size=5), st.data())
def test_any_rows_in_any_order_are_those_of_their_part(sizes, data):
    splits = [
        Split(np.full(size, number % 2), lambda rows, number=number: [(number, int(row)) for row in rows])
        for number, size in enumerate(sizes)
    ]
    whole = _side_by_side(splits, first_classes=[10 * number for number in range(len(sizes))])
    wanted = [(number, row) for number, size in enumerate(sizes) for row in range(size)]
    rows = data.draw(st.lists(st.integers(0, len(wanted) - 1), max_size=8)) if wanted else []
    assert whole.read(np.array(rows, dtype=np.int64)) == [wanted[row] for row in rows]
    assert whole.labels.tolist() == [10 * number + number % 2 for number, _ in wanted]


def test_images_are_stored_at_the_largest_side_of_a_part(settings, tmp_path, make_image):
    for name in ("ant", "bee"):
        (tmp_path / name).mkdir()
        for number in range(3):
            make_image(12, 20, value=number).save(tmp_path / name / f"{number}.png")
    for order in ("digits+imagefolder={}", "imagefolder={}+digits"):
        source = load_source("join:" + order.format(tmp_path), settings)
        assert stored_side(source, size=64) == 12 and stored_side(source, size=9) == 9
        assert len(source.groups) == 2 and f"{tmp_path.name}/ant" in source.class_names


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ("digits+text={}/pairs.csv", r"one kind of inputs, and digits holds images, pairs holds texts; leave one"),
        ("digits+digits", "two parts are called digits; leave one out"),
        ("glue/sst2+glue:sst2", "two parts are called glue/sst2"),
        ("text={}/lines/train.csv+text={}/lines/train.csv", "two parts are called train; .* of different names"),
        ("text+digits", "text has no path; write text=path/to/its/data"),
        ("digits={}", r"dataset digits reads no data-path, got '.*'; leave it out"),
        ("digits+join:digits", "a part cannot be joined itself, got join:digits"),
        ("nodes={}", "the data are on the nodes, there is nothing to read here"),
        ("glue/sts+digits", "there is no glue/sts; choose one of: glue/cola, glue/mrpc, .*glue/sst2"),
        ("digits+didgets", "there is no dataset 'didgets'; choose one of: agnews, cifar10, "),
    ],
)
def test_parts_that_cannot_be_joined_are_refused_by_name(settings, tables, tmp_path, parts, message):
    with pytest.raises(ValueError, match=message):
        load_source("join:" + parts.format(tmp_path, tmp_path), settings)


def test_a_path_beside_a_joined_set_is_refused(settings, tables, tmp_path):
    with pytest.raises(DataError, match="reads no data-path"):
        load_source(tables, {**settings, "data_path": str(tmp_path)})


def test_the_grammar_comes_back_as_it_was():
    text = "join:cifar10+hub:owner/name#config+text=a=b.csv+glue/rte+my.own-parts"
    assert joined(parts_of(text)) == text
    assert parts_of(text)[2] == Part("text", "a=b.csv")
    assert parts_of("hub:/c++/x") == (Part("hub:/c++/x"),)


def test_an_unknown_part_is_refused_with_the_settings(tmp_path):
    with pytest.raises(ConfigError, match="there is no dataset 'cifar11'; choose one of: agnews, cifar10"):
        RunConfig.parse(gather(app_folder(), file=None, assignments=["dataset=join:digits+cifar11"]))


def test_paths_of_parts_become_absolute_and_one_with_a_plus_is_refused(monkeypatch, tmp_path):
    (tmp_path / "c++" / "hub").mkdir(parents=True)
    (tmp_path / "hub").mkdir()
    monkeypatch.chdir(tmp_path)
    found = gather(app_folder(), file=None, assignments=["dataset=join:text=a.csv+hub:hub+digits"])
    assert found["dataset"] == f"join:text={tmp_path}/a.csv+hub:{tmp_path}/hub+digits"
    monkeypatch.chdir(tmp_path / "c++")
    with pytest.raises(ConfigError, match=r"dataset: 'text=.*c\+\+/a.csv' holds a \+, which parts one data set"):
        gather(app_folder(), file=None, assignments=["dataset=join:digits+text=a.csv"])


# Pairs


def texts(settings: dict[str, Any], path: Path, **changes: Any) -> Source:
    return load_source("text", {**settings, "data_path": str(path), "test_fraction": 0.0, **changes})


@pytest.mark.parametrize(
    "names",
    [("sentence1", "sentence2"), ("question1", "question2"), ("question", "sentence"), ("premise", "hypothesis")],
)
def test_pairs_are_found_by_their_usual_names_in_the_usual_order(settings, tmp_path, names):
    path = write(tmp_path / "a.csv", (names[1], "label", names[0]), [("two", "x", "one"), ("four", "y", "three")])
    source = texts(settings, path)
    assert source.num_texts == (2,)
    assert source.train.read(np.array([1, 0])) == [("three", "four"), ("one", "two")]


def test_a_lone_text_column_stays_single_whatever_its_name(settings, tmp_path):
    path = write(tmp_path / "a.csv", ("sentence1", "label"), [("one", "x"), ("two", "y")])
    source = texts(settings, path)
    assert source.num_texts == (1,) and list(source.train.read(np.arange(2))) == ["one", "two"]


def test_two_columns_may_be_named_and_a_name_may_hold_a_comma(settings, tmp_path):
    header = ("ask", "reply", "ask,reply", "label")
    path = write(tmp_path / "a.csv", header, [("a", "b", "c", "x"), ("d", "e", "f", "y")])
    assert texts(settings, path, input_column="reply, ask").train.read(np.array([0])) == [("b", "a")]
    assert list(texts(settings, path, input_column="ask,reply").train.read(np.array([0]))) == ["c"]


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (
            "image,caption",
            r"'image,caption' of .* holds Image, string, neither images nor text nor two different texts",
        ),
        ("caption,caption", "holds string, string, neither"),
        ("caption,title,label", "holds string, string, int64, neither"),
        ("caption,subtitle", r"input-column 'subtitle': .* has no such column; it has image \(Image\)"),
    ],
)
def test_columns_that_are_no_pair_of_texts_are_refused_by_name(settings, tmp_path, make_image, column, message):
    features = {"image": datasets.Image(), "caption": datasets.Value("string"), "title": datasets.Value("string")}
    rows = {"image": [make_image(3, 3)] * 2, "caption": ["a", "b"], "title": ["c", "d"], "label": [0, 1]}
    table = datasets.Dataset.from_dict(rows, features=datasets.Features(features | {"label": datasets.Value("int64")}))
    table.to_parquet(tmp_path / "a.parquet")
    with pytest.raises(DataError, match=message):
        load_source("parquet", {**settings, "data_path": str(tmp_path / "a.parquet"), "input_column": column})


def test_a_row_without_its_second_text_is_an_error_that_names_the_column(settings, tmp_path):
    rows = [{"premise": "a", "hypothesis": text, "label": label} for text, label in (("b", "x"), (None, "y"))]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match=r"column 'hypothesis' of .* holds no text in line 2; correct or remove"):
        texts(settings, tmp_path / "a.jsonl")


def test_a_pair_may_have_one_blank_text_and_not_two(settings, tmp_path):
    write(tmp_path / "a.csv", ("premise", "hypothesis", "label"), [("a", "", "x"), ("", "b", "y"), (" ", "", "y")])
    with pytest.raises(DataError, match=r"column 'premise' and 'hypothesis' of .* is blank in row 4; correct or"):
        texts(settings, tmp_path / "a.csv")
    assert len(texts(settings | {"bad_files": "skip"}, tmp_path / "a.csv").train) == 2


def test_training_pairs_and_single_test_texts_are_refused(settings, tmp_path):
    write(tmp_path / "train.csv", ("premise", "hypothesis", "label"), [("a", "b", "x"), ("c", "d", "y")])
    write(tmp_path / "test.csv", ("text", "label"), [("a", "x")])
    with pytest.raises(DataError, match="training inputs are of kind pair of texts, those of test of kind text; set"):
        texts(settings, tmp_path)


# Known by name


def save(path: Path, rows: dict[str, list[Any]], features: dict[str, Any] | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict(rows, features=features and datasets.Features(features)).to_parquet(path)


def test_glue_names_its_classes_by_words_and_tests_on_the_development_set(settings, tmp_path):
    folder = tmp_path / "glue" / "sst2"
    for split, labels in (("train", [1, 0, 1]), ("val", [0]), ("dev", [1, 1])):
        save(folder / f"{split}.parquet", {"sentence1": [f"{split} {n}" for n in range(len(labels))], "label": labels})
    source = load_source("glue/sst2", {**settings, "data_root": str(tmp_path)})
    assert source.class_names == ("negative", "positive") and source.num_texts == (1,)
    assert source.train.labels.tolist() == [1, 0, 1]
    assert list(source.test.read(np.arange(2))) == ["dev 0", "dev 1"]


@pytest.mark.parametrize("where", ["root", "hub"])
def test_glue_in_the_hubs_layout_passes_over_its_withheld_labels(settings, monkeypatch, tmp_path, where):
    names = ["entailment", "not_entailment"]
    features = {"sentence1": datasets.Value("string"), "sentence2": datasets.Value("string")}
    features |= {"label": datasets.ClassLabel(names=names), "idx": datasets.Value("int32")}
    for split, labels in (("train", [1, 0, 1]), ("validation", [0, 1]), ("test", [-1, -1])):
        one, two = ([f"{split} {n} {side}" for n in range(len(labels))] for side in ("one", "two"))
        rows = {"sentence1": one, "sentence2": two, "label": labels, "idx": list(range(len(labels)))}
        save(tmp_path / "glue" / "rte" / f"{split}-00000-of-00001.parquet", rows, features)
    if where == "hub":
        copy = datasets.load_dataset(
            "parquet",
            data_files={
                split: str(tmp_path / "glue" / "rte" / f"{split}-*") for split in ("train", "validation", "test")
            },
        )
        asked = []
        monkeypatch.setattr(
            "fedtalora_flwr.data.hf_known.load_hub", lambda name, config: asked.append((name, config)) or copy
        )
        source = load_source("glue/rte", settings)
        assert asked == [("nyu-mll/glue", "rte")]
    else:
        source = load_source("glue/rte", {**settings, "data_root": str(tmp_path)})
    assert source.class_names == tuple(names) and source.num_texts == (2,)
    assert source.train.read(np.array([0])) == [("train 0 one", "train 0 two")]
    assert source.test.labels.tolist() == [0, 1]


def test_glue_takes_words_and_refuses_other_labels(settings, tmp_path):
    file, root = tmp_path / "glue" / "cola" / "train.parquet", {"data_root": str(tmp_path), "test_fraction": 0.0}
    save(file, {"sentence": ["a", "b"], "label": ["unacceptable", "acceptable"]})
    source = load_source("glue/cola", {**settings, **root})
    assert [source.class_names[label] for label in source.train.labels] == ["unacceptable", "acceptable"]
    save(file, {"sentence": ["a", "b"], "label": [1, 2]})
    with pytest.raises(DataError, match=r"must be 0 or unacceptable, 1 or acceptable, got 2; correct the files"):
        load_source("glue/cola", {**settings, **root})


@pytest.mark.parametrize(("name", "columns"), [("cifar10", ("img", "label")), ("cifar100", ("img", "fine_label"))])
def test_known_images_are_read_from_the_hubs_columns_too(settings, tmp_path, make_image, name, columns):
    features = {columns[0]: datasets.Image(), columns[1]: datasets.ClassLabel(names=["ant", "bee"])}
    for split, labels in (("train", [0, 1, 1]), ("test", [1])):
        rows = {columns[0]: [make_image(6, 6, value=n) for n in range(len(labels))], columns[1]: labels}
        save(tmp_path / name / f"{split}-00000-of-00001.parquet", rows, features)
    source = load_source(name, {**settings, "data_root": str(tmp_path)})
    assert (source.class_names, source.modality, source.test.labels.tolist()) == (("ant", "bee"), "image", [1])


def test_ag_news_is_read_from_the_data_root(settings, tmp_path):
    features = {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["World", "Sci/Tech"])}
    for split, labels in (("train", [0, 1]), ("test", [1])):
        save(tmp_path / "agnews" / f"{split}.parquet", {"text": ["t"] * len(labels), "label": labels}, features)
    source = load_source("join:agnews", {**settings, "data_root": str(tmp_path)})
    assert source.class_names == ("agnews/World", "agnews/Sci/Tech")


def test_the_real_glue_tasks_join_single_texts_and_pairs(settings, real_data: Callable[[str], Path]):
    parts = [f"glue/{task}" for task in ("sst2", "mrpc", "qqp", "qnli", "rte", "cola")]
    root = {"data_root": str(real_data("glue")), "max_per_class": 40}
    source = load_source(f"join:{'+'.join(parts)}", {**settings, **root})
    assert source.groups == tuple((2 * n, 2 * n + 1) for n in range(6)) and source.num_texts == (1, 2)
    assert np.bincount(source.train.labels).tolist() == [40] * 12
    sizes = np.bincount(source.test.labels).reshape(6, 2).sum(1).tolist()
    assert sizes == [872, 1725, 1500, 1000, 277, 1043]
    first = {
        name: source.train.read(np.flatnonzero(source.train.labels == 2 * n)[:1])[0] for n, name in enumerate(parts)
    }
    assert [isinstance(raw, str) for raw in first.values()] == [True, False, False, False, False, True]
    assert source.class_names[:4] == (
        *("glue/sst2/negative", "glue/sst2/positive", "glue/mrpc/not_equivalent", "glue/mrpc/equivalent"),
    )


def test_the_real_cifars_are_two_tasks_of_one_side(settings, real_data: Callable[[str], Path]):
    root = {"data_root": str(real_data("cifar10")), "max_per_class": 5}
    source = load_source("join:cifar10+cifar100", {**settings, **root})
    assert [len(group) for group in source.groups] == [10, 100] and stored_side(source, size=84) == 32
