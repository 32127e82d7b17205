"""Tables and texts as spreadsheets and editors write them, and what a label may be."""

import logging
import logging.handlers

import datasets
import numpy as np
import pytest

from fedtalora_flwr.data import DataError, load_source
from fedtalora_flwr.data.tables import Dialect, dialect_of, place_of, read_text, records

TEXTS = ["Tür auf", "Tür zu, schnell", "Licht", "Licht an", "Licht; aus"]
LABELS = ["alarm", "alarm", "lamp", "lamp", "lamp"]


def table(separator=",", *, end="\n"):
    rows = [f'"{text}"{separator}{label}' for text, label in zip(TEXTS, LABELS, strict=True)]
    return end.join([f"text{separator}label", *rows, ""])


@pytest.fixture
def read(settings, tmp_path):
    """Write a file and read it whole, as `dataset = text` does."""

    def read(name, content, **changes):
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        chosen = {"data_path": str(tmp_path / name), "test_fraction": 0.0, **changes}
        return load_source("text", {**settings, **chosen})

    return read


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", table(",")),
        ("a.csv", table(";")),
        ("a.csv", table("\t")),
        ("a.csv", table("|")),
        ("a.tsv", table("\t")),
        ("a.tsv", table(";")),
        ("a.csv", table(";", end="\r\n")),
        ("a.csv", "sep=;\r\n" + table(";", end="\r\n")),
        ("a.csv", b"\xef\xbb\xbf" + table(";").encode()),
        ("a.csv", table("\t").encode("utf-16")),
        ("a.csv", table("\t").encode("utf-16-le")),
        ("a.csv", table(";").encode("utf-16-be")),
        ("a.csv", table(";").encode("utf-32")),
    ],
)
def test_a_table_is_read_however_a_spreadsheet_writes_it(read, name, content):
    source = read(name, content)
    assert source.class_names == ("alarm", "lamp") and source.train.labels.tolist() == [0, 0, 1, 1, 1]
    assert list(source.train.read(np.arange(5))) == TEXTS


def test_texts_of_any_separator_do_not_sway_what_parts_the_columns(tmp_path):
    (tmp_path / "a.csv").write_text("text,label\n" + '"a; b; c",x\n' * 30)
    assert dialect_of(tmp_path / "a.csv") == Dialect("utf-8", ",", ".", 0)
    (tmp_path / "b.csv").write_text("a,b;text;label\n1,5;so, and so, and so;x\n")
    assert dialect_of(tmp_path / "b.csv") == Dialect("utf-8", ";", ",", 0)


@pytest.mark.parametrize(("name", "line"), [("a.csv", 2), ("a.jsonl", 1), ("a.txt", 2)])
def test_an_older_encoding_is_named_with_the_line_and_the_way_out(read, tmp_path, name, line):
    content = '{"text": "Tür", "label": "x"}\n' if name == "a.jsonl" else table(";")
    message = rf"{name} is not UTF-8 \(line {line}\), but .*Windows-1252.*; save it as UTF-8 \(Excel: CSV UTF-8\), or"
    (tmp_path / name).write_bytes(content.encode("cp1252"))
    with pytest.raises(DataError, match=message):
        read_text(tmp_path / name)
    if name != "a.txt":
        with pytest.raises(DataError, match=message):
            read(name, content.encode("cp1252"))


def test_a_file_that_is_cut_within_a_character_is_an_error_of_its_own(tmp_path):
    (tmp_path / "a.txt").write_bytes("open it".encode("utf-16")[:-1])
    with pytest.raises(DataError, match=r"a\.txt cannot be read .*; save it as UTF-8"):
        read_text(tmp_path / "a.txt")


def test_the_cache_is_no_cause_of_what_is_wrong_with_a_table_and_it_is_said_once(read):
    said = logging.handlers.BufferingHandler(capacity=99)
    logging.getLogger("datasets").addHandler(said)
    with pytest.raises(DataError, match=r"more fields than the header: row 3 has 3 fields, the header 2; put") as error:
        read("a.csv", "text,label\na,x\nb, c,y\nd,y\n")
    logging.getLogger("datasets").removeHandler(said)
    assert "HF_DATASETS_CACHE" not in str(error.value) and not said.buffer


def test_files_of_one_split_that_are_written_differently_are_refused(settings, tmp_path):
    (tmp_path / "train-1.csv").write_text(table(","))
    (tmp_path / "train-2.csv").write_text(table(";"))
    with pytest.raises(DataError, match=r"train-1\.csv and train-2\.csv are written in different ways"):
        load_source("text", {**settings, "data_path": str(tmp_path)})


# Rows as an editor shows them


def test_a_row_has_the_number_that_a_spreadsheet_shows_and_the_line_of_an_editor_where_it_is_another(tmp_path):
    (tmp_path / "a.csv").write_text('text,label\na,x\n\n"b\nb",x\nc,x\n')
    (tmp_path / "b.csv").write_text("sep=;\ntext;label\nd;x\n")
    (tmp_path / "c.jsonl").write_text('{"text": "e"}\n\n{"text": "f"}\n')
    files = [tmp_path / name for name in ("a.csv", "b.csv", "c.jsonl")]
    assert [place_of(files[:1], row) for row in range(3)] == ["row 2", "row 4", "row 5 (line 6)"]
    assert [place_of(files[1:2], 0), place_of(files[2:], 1), place_of([], 7)] == ["row 2 (line 3)", "line 3", "row 7"]
    assert [place_of(files, row) for row in (1, 3, 4)] == [
        "row 4 of a.csv",
        "row 2 (line 3) of b.csv",
        "line 1 of c.jsonl",
    ]
    assert [(number, row["text"]) for number, row in records(files[0])] == [(2, "a"), (4, "b\nb"), (5, "c")]


def test_all_rows_that_cannot_be_used_are_named_at_once_and_can_be_left_out(read):
    content = "text;label\na;x\n ;x\nb;\n;y\nc;y\nd; \ne;y\n"
    with pytest.raises(
        DataError,
        match=r"'label' of .* is empty in rows 4, 7; column 'text' of .* is blank in rows 3, 5; .* by bad-files=skip",
    ):
        read("a.csv", content)
    source = read("a.csv", content, bad_files="skip")
    assert source.class_names == ("x", "y") and list(source.train.read(np.arange(3))) == ["a", "c", "e"]
    (remark,) = source.remarks
    assert remark.startswith("4 rows are left out: ") and "rows 4, 7" in remark and "rows 3, 5" in remark


def test_a_row_keeps_its_number_where_rows_before_it_are_left_out(settings, tmp_path, make_image):
    good, rows = tmp_path / "good.png", []
    make_image(3, 2).save(good)
    for label, content in ((0, good.read_bytes()), (None, b""), (1, b"broken"), (1, good.read_bytes())):
        rows.append({"image": {"bytes": content, "path": None}, "label": label})
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "a.parquet")
    chosen = {"data_path": str(tmp_path / "a.parquet"), "test_fraction": 0.0}
    source = load_source("parquet", {**settings, **chosen, "bad_files": "skip"})
    assert source.train.labels.tolist() == [0, 1] and len(source.train.read(np.arange(2))) == 2
    assert "'label' of" in source.remarks[0] and "is empty in row 1; the image of" in source.remarks[0]
    assert source.remarks[0].endswith("cannot be read in rows 1, 2")


def test_a_fault_behind_rows_that_are_left_out_has_its_own_number(read):
    rows = '{"text": "a", "label": null}\n{"text": "b", "label": 1.0}\n{"text": "c", "label": 1.5}\n'
    with pytest.raises(DataError, match=r"holds 1\.5 in line 3: a number with a fraction"):
        read("a.jsonl", rows, bad_files="skip")


def test_a_table_without_any_good_row_is_an_error_that_says_what_is_wrong(read):
    with pytest.raises(DataError, match=r"'label' of .* is empty in rows 2, 3: no row of .* is left"):
        read("a.csv", "text,label\na,\nb,\n", bad_files="skip")


# Labels


@pytest.mark.parametrize(
    ("name", "content", "classes", "labels"),
    [
        ("a.csv", "text,label\na,2.0\nb,10.0\nc,2.0\n", ("2", "10"), [0, 1, 0]),
        ("a.csv", "text;label\na;2,0\nb;10,0\nc;2,0\n", ("2", "10"), [0, 1, 0]),
        ("a.csv", "text;label;size\na;2.0;1,5\nb;10.0;2,5\nc;2.0;3,5\n", ("2", "10"), [0, 1, 0]),
        ("a.jsonl", '{"text": "a", "label": 1.0}\n{"text": "b", "label": 0.0}\n', ("0", "1"), [1, 0]),
        ("a.jsonl", '{"text": "a", "label": "3.10"}\n{"text": "b", "label": "3.9"}\n', ("3.10", "3.9"), [0, 1]),
        ("a.jsonl", '{"text": "a", "label": "10"}\n{"text": "b", "label": "9"}\n', ("10", "9"), [0, 1]),
        ("a.jsonl", '{"text": "a", "label": true}\n{"text": "b", "label": false}\n', ("False", "True"), [1, 0]),
        ("a.csv", "text,label\na,None\nb,-1x\n", ("-1x", "None"), [1, 0]),
    ],
)
def test_a_label_is_a_string_or_a_whole_number_however_it_is_written(read, name, content, classes, labels):
    source = read(name, content)
    assert (source.class_names, source.train.labels.tolist()) == (classes, labels)


def test_whole_numbers_with_a_fraction_stay_numbers_where_a_hole_made_texts_of_them(read):
    assert read("a.csv", "text,label\na,2.0\nb,\nc,10.0\n", bad_files="skip").class_names == ("2", "10")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.csv",
            "text,label\na,1.5\nb,2\nc,0.5\n",
            r"holds 1\.5 in rows 2, 4: a number with a fraction",
        ),
        ("a.csv", "text;label\na;1,5\nb;2,5\n", r"holds 1\.5 in rows 2, 3: a number with a fraction names no class"),
        ("a.csv", "text,label\na,1\nb,-1\nc,-1\n", r"must be at least 0, got -1 in rows 3, 4; correct or remove"),
        ("a.jsonl", '{"text": "a", "label": null}\n{"text": "b", "label": "x"}\n', r"is empty in line 1; correct or"),
        ("a.jsonl", '{"text": "a", "label": {"n": 1}}\n', r"holds struct<n: int64>; it must hold one class a row"),
        ("a.jsonl", '{"text": "a", "label": ["n"]}\n', r"holds list<.*>; it must hold one class a row"),
        ("a.jsonl", '{"text": ["a", "b"], "label": "x"}\n', r"no column .* that holds such; it has text \(List\)"),
    ],
)
def test_a_label_that_names_no_class_is_refused_with_its_row(read, name, content, message):
    with pytest.raises(DataError, match=message):
        read(name, content)


def test_rows_that_the_hub_marks_as_unlabelled_can_be_left_out(read):
    source = read("a.csv", "text,label\na,1\nb,-1\nc,0\n", bad_files="skip")
    assert source.class_names == ("0", "1") and "must be at least 0, got -1 in row 3" in source.remarks[0]
