import io
import json
import time

import datasets
import numpy as np
import PIL.Image
import pytest

from fedtalora_flwr.config import registry
from fedtalora_flwr.data import SOURCES, DataError, load_source, open_data, stored_side
from fedtalora_flwr.data.hf_rows import source_from_splits

TRAIN_LABELS, TEST_LABELS = [2, 0, 2, 0, 2, 0, 2], [0, 1, 2]  # of three classes, one never trained


@pytest.fixture
def write_images(make_image):
    """Write a Parquet file as the hub has it: encoded images and a ClassLabel."""

    def write(path, labels, *, names=("ant", "bee", "cat"), columns=("image", "label")):
        path.parent.mkdir(parents=True, exist_ok=True)
        features = {columns[0]: datasets.Image(), columns[1]: datasets.ClassLabel(names=list(names))}
        rows = {columns[0]: [make_image(6, 5, value=i) for i in range(len(labels))], columns[1]: labels}
        datasets.Dataset.from_dict(rows, features=datasets.Features(features)).to_parquet(path)
        return path

    return write


def write_text(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        separator = "," if path.suffix == ".csv" else "\t"
        lines = [rows[0], *(row.values() for row in rows)]
        path.write_text("".join(separator.join(map(str, line)) + "\n" for line in lines))
    return path


def sentences(labels, column="label"):
    return [{"text": f"sentence {number}", column: label} for number, label in enumerate(labels)]


# digits


def test_digits_are_held_out_by_class(settings):
    source = load_source("digits", settings)
    assert (len(source.train) + len(source.test), source.num_classes) == (1797, 10)
    share = np.bincount(source.test.labels) / np.bincount(np.concatenate([source.train.labels, source.test.labels]))
    np.testing.assert_allclose(share, 0.2, atol=0.01)
    assert stored_side(source, size=64) == 8


@pytest.mark.parametrize("name", registry.available(SOURCES))
def test_every_source_names_its_parameters_as_configuration_keys(name, settings):
    assert registry.parameters(SOURCES, name) <= {*settings, "argument"}


# Parquet


def test_a_parquet_file_without_test_file_is_held_out(settings, write_images, tmp_path):
    path = write_images(tmp_path / "photos.parquet", TRAIN_LABELS)
    source = load_source("parquet", {**settings, "data_path": str(path)})
    assert (source.modality, source.class_names) == ("image", ("ant", "cat"))
    assert np.bincount(source.test.labels).tolist() == [1, 1]


def test_a_folder_of_parquet_files_has_its_own_test_split(settings, write_images, tmp_path, make_image):
    write_images(tmp_path / "train-00000-of-00002.parquet", TRAIN_LABELS[:4])
    write_images(tmp_path / "train-00001-of-00002.parquet", TRAIN_LABELS[4:])
    write_images(tmp_path / "validation.parquet", TEST_LABELS)
    source = load_source("parquet", {**settings, "data_path": str(tmp_path)})
    assert source.train.labels.tolist() == [1, 0, 1, 0, 1, 0, 1]
    assert source.test.labels.tolist() == [0, 1]
    first, second = source.test.read(np.array([1, 0]))
    np.testing.assert_array_equal(np.asarray(first), np.asarray(make_image(6, 5, value=2)))
    np.testing.assert_array_equal(np.asarray(second), np.asarray(make_image(6, 5, value=0)))


def test_test_path_goes_before_the_folders_own_test_file(settings, write_images, tmp_path):
    write_images(tmp_path / "train.parquet", TRAIN_LABELS)
    write_images(tmp_path / "test.parquet", TEST_LABELS)
    other = write_images(tmp_path / "elsewhere" / "mine.parquet", [2, 2, 2])
    for test_path in (other, other.parent):
        source = load_source("parquet", {**settings, "data_path": str(tmp_path), "test_path": str(test_path)})
        assert source.test.labels.tolist() == [1, 1, 1]


def test_test_labels_follow_the_names_where_the_files_number_classes_differently(settings, write_images, tmp_path):
    write_images(tmp_path / "train.parquet", [0, 1, 2])
    write_images(tmp_path / "test.parquet", [0, 1, 2, 1], names=("cat", "yak", "ant"))
    source = load_source("parquet", {**settings, "data_path": str(tmp_path)})
    assert [source.class_names[label] for label in source.test.labels] == ["cat", "ant"]


def test_plain_encoded_bytes_are_read_as_images(settings, tmp_path, make_image):
    content = io.BytesIO()
    make_image(4, 3).save(content, "PNG")
    rows = {"img": [{"bytes": content.getvalue(), "path": None}] * 2, "class": [7, 3]}
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "a.parquet")
    source = load_source("parquet", {**settings, "data_path": str(tmp_path / "a.parquet")})
    assert source.class_names == ("3", "7")
    assert source.train.read(np.array([0]))[0].size == (4, 3)


def test_reading_rows_decodes_only_these_rows_and_names_a_broken_one(settings, tmp_path, make_image):
    content = io.BytesIO()
    make_image(4, 3).save(content, "PNG")
    images = [{"bytes": b, "path": p} for b, p in ((content.getvalue(), "a.png"), (b"broken", "b.png"))]
    datasets.Dataset.from_dict(
        {"image": [*images, None], "label": [0, 0, 1]},
        features=datasets.Features({"image": datasets.Image(decode=False), "label": datasets.Value("int64")}),
    ).to_parquet(tmp_path / "a.parquet")
    quiet = {**settings, "data_path": str(tmp_path / "a.parquet"), "test_fraction": 0.0}
    train = load_source("parquet", quiet).train
    assert len(train.read(np.array([0]))) == 1
    with pytest.raises(DataError, match=r"row 1 of .*a\.parquet.*file b\.png cannot be decoded"):
        train.read(np.array([0, 1]))
    with pytest.raises(DataError, match=r"row 2 of .* holds no image"):
        train.read(np.array([2]))


def test_columns_of_unusual_names_are_found_by_the_settings(settings, write_images, tmp_path):
    path = write_images(tmp_path / "a.parquet", TRAIN_LABELS, columns=("scan", "finding"))
    chosen = {"data_path": str(path), "input_column": "scan", "label_column": "finding"}
    assert load_source("parquet", {**settings, **chosen}).class_names == ("ant", "cat")
    # the only columns of their types need no setting
    assert load_source("parquet", {**settings, "data_path": str(path)}).class_names == ("ant", "cat")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"label_column": "species"},
            r"label-column 'species'.*no such column; it has image \(Image\), label",
        ),
        ({"input_column": "photo"}, r"input-column 'photo'.*no such column; it has image \(Image\), label"),
        ({"input_column": "label"}, r"input-column 'label' of .* holds ClassLabel, neither images nor text"),
        ({"label_column": "image"}, r"label column 'image' .* one class a row"),
    ],
)
def test_a_wrong_column_is_an_error_that_lists_the_columns(settings, write_images, tmp_path, changes, message):
    path = write_images(tmp_path / "a.parquet", TRAIN_LABELS)
    with pytest.raises(DataError, match=message):
        load_source("parquet", {**settings, "data_path": str(path), **changes})


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            {"text": ["a", "b"], "mood": ["x", "y"]},
            r"no column .* for labels .*text \(string\), mood.*label-column",
        ),
        ({"a": ["x", "y"], "b": ["x", "y"], "label": [0, 1]}, r"no column .* for images .*input-column"),
        ({"text": ["a", "b"], "label": [0, -1]}, r"must be at least 0, got -1 in row 1"),
        ({"text": ["a", "b"], "label": [0, None]}, r"'label' .* is empty in row 1"),
        ({"text": ["a", "b"], "label": ["x", ""]}, r"'label' .* is empty in row 1"),
        (
            {"text": ["a", "b"], "label": [0.5, 1.0]},
            r"'label' .* holds 0\.5 in row 0: a number with a fraction names no",
        ),
        ({"text": ["a", None], "label": [0, 1]}, r"column 'text' of .* holds no text in row 1"),
        ({"text": ["a", "b"], "label": [[0], [1]]}, r"'label' .* one class a row"),
        ({"text": [], "label": []}, r"has no rows|cannot be read"),
    ],
)
def test_unusable_rows_are_errors_that_name_the_place(settings, tmp_path, rows, message):
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(DataError, match=message):
        load_source("parquet", {**settings, "data_path": str(tmp_path / "a.parquet")})


def test_a_label_beyond_its_class_label_is_an_error(settings, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["a", "b"])})
    table = pa.table({"text": ["x", "y"], "label": [1, 2]}).replace_schema_metadata(features.arrow_schema.metadata)
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"must be in \[0, 1\] .*got 2 in row 1|cannot be read"):
        load_source("parquet", {**settings, "data_path": str(tmp_path / "a.parquet")})


@pytest.mark.parametrize("key", ["data_path", "test_path"])
def test_a_path_that_the_data_set_does_not_read_is_an_error_that_names_those_that_do(settings, tmp_path, key):
    readers = "imagefolder, nodes, parquet, text" if key == "data_path" else "imagefolder, parquet, text"
    name = key.replace("_", "-")
    with pytest.raises(DataError, match=f"dataset digits reads no {name}, got '{tmp_path}'; .* does: {readers}$"):
        open_data("digits", {**settings, key: str(tmp_path)})


@pytest.mark.parametrize("dataset", ["parquet", "text", "imagefolder"])
def test_a_path_that_is_empty_or_missing_is_an_error_that_names_the_key(settings, tmp_path, dataset):
    with pytest.raises(DataError, match="data-path is empty; set data-path"):
        load_source(dataset, settings)
    with pytest.raises(DataError, match=r"data-path '.*/nowhere': there is no file or folder"):
        load_source(dataset, {**settings, "data_path": str(tmp_path / "nowhere")})


def test_a_folder_without_training_files_is_an_error_that_lists_what_is_there(settings, tmp_path):
    (tmp_path / "notes.md").touch()
    with pytest.raises(DataError, match=r"holds no train\*.parquet, only notes.md"):
        load_source("parquet", {**settings, "data_path": str(tmp_path)})


@pytest.mark.parametrize("content", [b"", b"PAR1 and then nothing"])
def test_a_broken_parquet_file_is_an_error_that_names_it(settings, tmp_path, content):
    (tmp_path / "a.parquet").write_bytes(content)
    with pytest.raises(DataError, match=r"a\.parquet cannot be read as parquet"):
        load_source("parquet", {**settings, "data_path": str(tmp_path / "a.parquet")})


# Text


@pytest.mark.parametrize("suffix", ["json", "jsonl", "csv", "tsv"])
def test_string_labels_become_classes_sorted_by_name(settings, tmp_path, suffix):
    write_text(tmp_path / f"train.{suffix}", sentences(["pay", "hi", "pay", "bye", "hi"], "intent"))
    write_text(tmp_path / f"test.{suffix}", sentences(["pay", "unheard", "bye"], "intent"))
    source = load_source("text", {**settings, "data_path": str(tmp_path)})
    assert (source.modality, source.class_names) == ("text", ("bye", "hi", "pay"))
    assert source.train.labels.tolist() == [2, 1, 2, 0, 1]
    assert source.test.labels.tolist() == [2, 0]
    assert list(source.test.read(np.array([1, 0]))) == ["sentence 2", "sentence 0"]


def test_integer_labels_are_ordered_as_numbers(settings, tmp_path):
    path = write_text(tmp_path / "a.csv", sentences([10, 9, 10, 9, 100]))
    source = load_source("text", {**settings, "data_path": str(path), "test_fraction": 0.0})
    assert source.class_names == ("9", "10", "100")
    assert len(source.test) == 0


def test_words_that_look_like_missing_values_are_kept(settings, tmp_path):
    path = write_text(tmp_path / "a.csv", [{"text": "null", "label": "NA"}, {"text": "nan", "label": "None"}])
    source = load_source("text", {**settings, "data_path": str(path), "test_fraction": 0.0})
    assert source.class_names == ("NA", "None")
    assert list(source.train.read(np.arange(2))) == ["null", "nan"]


def test_a_row_of_a_known_data_set_without_text_is_an_error_when_it_is_read():
    rows = datasets.Dataset.from_dict({"text": ["a", None, ""], "label": ["x", "y", "y"]})
    source = source_from_splits("known", {"train": rows}, input_column="", label_column="")
    assert list(source.train.read(np.array([0, 2]))) == ["a", ""]
    with pytest.raises(DataError, match=r"row 1 of known \(train\) holds no text in column 'text'"):
        source.train.read(np.array([0, 1]))


def test_unquoted_commas_in_every_text_are_an_error_instead_of_cut_texts(settings, tmp_path):
    (tmp_path / "a.csv").write_text("text,label\nhello, you,hi\nsee you, then,bye\n")
    with pytest.raises(DataError, match=r"a\.csv have more fields than the header: row 2 has 3 fields"):
        load_source("text", {**settings, "data_path": str(tmp_path / "a.csv")})


def test_a_path_may_hold_characters_of_a_search_pattern(settings, tmp_path):
    path = write_text(tmp_path / "a [1]*" / "a.csv", sentences(["x", "y", "x"]))
    assert load_source("text", {**settings, "data_path": str(path)}).class_names == ("x", "y")


def test_a_broken_json_file_is_an_error_that_names_it(settings, tmp_path):
    (tmp_path / "a.json").write_text('[{"text": "x", "label": ')
    with pytest.raises(DataError, match=r"a\.json cannot be read as json"):
        load_source("text", {**settings, "data_path": str(tmp_path / "a.json")})


def test_a_file_of_another_kind_is_an_error_that_lists_the_kinds(settings, tmp_path):
    (tmp_path / "a.xlsx").touch()
    with pytest.raises(DataError, match=r"one of \.parquet, \.json.*got .*a\.xlsx"):
        load_source("text", {**settings, "data_path": str(tmp_path / "a.xlsx")})


# Folders of images


def save(image: PIL.Image.Image, path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def test_subfolders_are_classes_at_any_depth(settings, tmp_path, make_image):
    save(make_image(4, 4), tmp_path / "yak" / "1.png")
    save(make_image(4, 4, value=9), tmp_path / "ant" / "images" / "2.png")
    save(make_image(4, 4, mode="L", value=30), tmp_path / "ant" / "images" / "3.PNG")
    save(make_image(4, 4), tmp_path / ".cache" / "4.png")
    (tmp_path / "ant" / "labels.txt").touch()
    (tmp_path / "ant" / "._2.png").touch()
    (tmp_path / "empty").mkdir()
    source = load_source("imagefolder", {**settings, "data_path": str(tmp_path), "test_fraction": 0.0})
    assert source.class_names == ("ant", "yak")
    assert source.train.labels.tolist() == [0, 0, 1]
    images = source.train.read(np.array([2, 0]))
    np.testing.assert_array_equal(np.asarray(images[1]), np.asarray(make_image(4, 4, value=9)))


def test_a_folder_that_is_linked_to_is_read_once_and_a_circle_of_links_ends(settings, tmp_path, make_image):
    save(make_image(4, 4), tmp_path / "data" / "ant" / "1.png")
    save(make_image(4, 4), tmp_path / "data" / "yak" / "2.png")
    save(make_image(4, 4), tmp_path / "elsewhere" / "3.png")
    (tmp_path / "data" / "ant" / "all").symlink_to(tmp_path / "data")
    (tmp_path / "elsewhere" / "same").symlink_to(".")
    (tmp_path / "data" / "ant" / "more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "ant" / "more-again").symlink_to(tmp_path / "elsewhere")
    source = load_source("imagefolder", {**settings, "data_path": str(tmp_path / "data"), "test_fraction": 0.0})
    assert source.train.labels.tolist() == [0, 0, 1]


def test_files_that_can_be_written_or_named_but_not_read_are_no_pictures(settings, tmp_path, make_image):
    for name in ("1.png", "2.tiff", "3.jpg", "4.mpo"):
        save(make_image(4, 4), tmp_path / "ant" / name)
    for name in ("a.pdf", "b.palm", "c.h5", "d.hdf", "e.mpg", "f.eps", "g.ps", "h.wmf", "i.grib", "j.bufr"):
        (tmp_path / "ant" / name).write_bytes(b"notes")
    source = load_source("imagefolder", {**settings, "data_path": str(tmp_path), "test_fraction": 0.0})
    assert [image.size for image in source.train.read(np.arange(len(source.train)))] == [(4, 4)] * 4


@pytest.mark.parametrize("test_name", ["val", "test"])
def test_train_and_test_folders_are_splits(settings, tmp_path, make_image, test_name):
    for name in ("train/ant/1.png", "train/bee/2.png", f"{test_name}/bee/3.png", f"{test_name}/yak/4.png"):
        save(make_image(3, 3), tmp_path / name)
    source = load_source("imagefolder", {**settings, "data_path": str(tmp_path)})
    assert source.class_names == ("ant", "bee")
    assert source.test.labels.tolist() == [1]


def test_a_flat_test_folder_without_classes_is_passed_over(settings, tmp_path, make_image):
    for name in ("train/ant/1.png", "test/2.png", "val/ant/3.png"):
        save(make_image(3, 3), tmp_path / name)
    source = load_source("imagefolder", {**settings, "data_path": str(tmp_path)})
    assert source.test.labels.tolist() == [0]


def test_a_class_called_train_is_not_taken_for_a_split(settings, tmp_path, make_image):
    for name in ("train/1.png", "train/2.png", "car/1.png", "car/2.png"):
        save(make_image(3, 3), tmp_path / name)
    assert load_source("imagefolder", {**settings, "data_path": str(tmp_path)}).class_names == (
        "car",
        "train",
    )


def test_test_path_names_a_folder_of_classes(settings, tmp_path, make_image):
    for name in ("a/ant/1.png", "a/bee/1.png", "b/bee/1.png"):
        save(make_image(3, 3), tmp_path / name)
    paths = {"data_path": str(tmp_path / "a"), "test_path": str(tmp_path / "b")}
    assert load_source("imagefolder", {**settings, **paths}).test.labels.tolist() == [1]


def test_a_folder_without_images_in_subfolders_is_an_error(settings, tmp_path, make_image):
    save(make_image(3, 3), tmp_path / "1.png")
    with pytest.raises(DataError, match=r"holds no images in subfolders \(subfolders: none\)"):
        load_source("imagefolder", {**settings, "data_path": str(tmp_path)})


def test_a_broken_image_file_is_an_error_that_names_it(settings, tmp_path, make_image):
    save(make_image(3, 3), tmp_path / "ant" / "1.png")
    (tmp_path / "ant" / "2.jpg").write_bytes(b"nothing")
    source = load_source("imagefolder", {**settings, "data_path": str(tmp_path), "test_fraction": 0.0})
    with pytest.raises(DataError, match=r"ant/2\.jpg cannot be decoded"):
        source.train.read(np.array([1]))


# The hub


def test_a_local_folder_laid_out_like_the_hub_is_loaded(settings, write_images, tmp_path):
    write_images(tmp_path / "data" / "train-00000-of-00001.parquet", TRAIN_LABELS, columns=("img", "fine_label"))
    write_images(tmp_path / "data" / "test-00000-of-00001.parquet", TEST_LABELS, columns=("img", "fine_label"))
    source = load_source(f"hub:{tmp_path}", settings)
    assert (source.class_names, source.test.labels.tolist()) == (("ant", "cat"), [0, 1])
    assert source.test.read(np.array([0]))[0].size == (6, 5)


def test_a_test_split_with_withheld_labels_gives_way_to_validation(settings, tmp_path):
    (tmp_path / "data").mkdir()
    features = datasets.Features(
        {"sentence": datasets.Value("string"), "label": datasets.ClassLabel(names=["bad", "good"])}
    )
    for split, labels in (("train", [0, 1, 0]), ("validation", [1, 1]), ("test", [-1, -1, -1])):
        rows = {"sentence": ["so so"] * len(labels), "label": labels}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(
            tmp_path / "data" / f"{split}-00000-of-00001.parquet"
        )
    assert load_source(f"hub:{tmp_path}", settings).test.labels.tolist() == [1, 1]


def test_a_hub_folder_that_is_not_there_is_an_error(settings, tmp_path):
    with pytest.raises(DataError, match=r"there is no folder .*nowhere"):
        load_source(f"hub:{tmp_path}/nowhere", settings)


def test_an_empty_hub_folder_is_an_error(settings, tmp_path):
    with pytest.raises(DataError, match="cannot be loaded"):
        load_source(f"hub:{tmp_path}", settings)


def unreachable(*_args, **_kwargs):
    raise ConnectionError("no route to host")


@pytest.mark.parametrize("dataset", ["hub:owner/name", "tiny-imagenet", "clinc150"])
def test_offline_the_hub_is_an_error_that_says_so_at_once(settings, monkeypatch, tmp_path, dataset):
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", unreachable)
    configured = datasets.config.HF_HUB_OFFLINE
    start = time.perf_counter()
    with pytest.raises(DataError, match="no connection and no cached copy"):
        load_source(dataset, {**settings, "data_root": str(tmp_path)})
    assert time.perf_counter() - start < 5
    assert datasets.config.HF_HUB_OFFLINE is configured  # the rest of the process keeps its mode


@pytest.mark.parametrize("dataset", ["tiny-imagenet", "clinc150"])
def test_offline_a_known_data_set_names_both_places_to_put_it(settings, monkeypatch, tmp_path, dataset):
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", unreachable)
    monkeypatch.setenv("FEDTALORA_DATA", str(tmp_path))
    with pytest.raises(DataError, match=rf"{tmp_path}/{dataset} and set data-root or .*FEDTALORA_DATA"):
        load_source(dataset, settings)


# CLINC150 and Tiny-ImageNet


def write_clinc(folder, *, domains):
    folder.mkdir()
    train = [["hello", "hi"], ["pay it", "pay"], ["so long", "bye"], ["hey", "hi"]]
    rows = {"train": train, "test": [["pay now", "pay"]], "val": [], "oos_train": [["what?", "oos"]]}
    (folder / "data_full.json").write_text(json.dumps(rows))
    (folder / "domains.json").write_text(json.dumps(domains))


def test_clinc150_orders_classes_by_domain_and_leaves_out_of_scope_out(settings, tmp_path):
    write_clinc(tmp_path / "clinc150", domains={"talk": ["hi", "bye"], "bank": ["pay"]})
    source = load_source("clinc150", {**settings, "data_root": str(tmp_path)})
    assert source.class_names == ("hi", "bye", "pay")
    assert source.groups == ((0, 1), (2,))
    assert source.train.labels.tolist() == [0, 2, 1, 0]
    assert source.test.read(np.array([0])) == ["pay now"]


def test_clinc150_with_domains_that_miss_an_intent_is_an_error(settings, tmp_path):
    write_clinc(tmp_path / "clinc150", domains={"talk": ["hi"], "bank": ["pay"]})
    with pytest.raises(DataError, match=r"domains\.json must name each intent .*\['bye'\]"):
        load_source("clinc150", {**settings, "data_root": str(tmp_path)})


def test_clinc150_without_its_file_is_an_error_that_names_it(settings, tmp_path):
    (tmp_path / "clinc150").mkdir()
    with pytest.raises(DataError, match=r"clinc150/data_full\.json cannot be read"):
        load_source("clinc150", {**settings, "data_root": str(tmp_path)})


def test_clinc150_from_the_hub_drops_the_out_of_scope_class(settings, monkeypatch):
    features = datasets.Features(
        {"text": datasets.Value("string"), "intent": datasets.ClassLabel(names=["hi", "oos", "pay"])}
    )
    tables = {
        "train": datasets.Dataset.from_dict({"text": ["a", "b", "c"], "intent": [2, 1, 0]}, features=features),
        "test": datasets.Dataset.from_dict({"text": ["d", "e"], "intent": [1, 2]}, features=features),
    }
    monkeypatch.setattr("fedtalora_flwr.data.sources.clinc150.load_hub", lambda _name, config: tables)
    source = load_source("clinc150", settings)
    assert source.class_names == ("hi", "pay")
    assert list(source.train.read(np.arange(2))) == ["a", "c"]
    assert source.test.labels.tolist() == [1]


def test_tiny_imagenet_trains_on_the_novel_classes_by_their_readable_names(settings, write_images, tmp_path):
    folder = tmp_path / "tiny-imagenet"
    wnids = ("n01", "n02", "n03")
    write_images(folder / "train-novel.parquet", TRAIN_LABELS, names=wnids)
    write_images(folder / "train-base.parquet", [1, 1], names=wnids)
    write_images(folder / "val.parquet", TEST_LABELS, names=wnids)
    (folder / "classes.json").write_text(json.dumps({"wnids": wnids, "names": ["ant", "bee", "cat"]}))
    source = load_source("tiny-imagenet", {**settings, "data_root": str(tmp_path)})
    assert source.class_names == ("ant", "cat")
    assert (len(source.train), source.test.labels.tolist()) == (7, [0, 1])


def test_the_real_clinc150_has_ten_domains_of_fifteen_intents(settings, real_data):
    source = load_source("clinc150", {**settings, "data_root": str(real_data("clinc150"))})
    assert (len(source.train), len(source.test), source.num_classes) == (15_000, 4_500, 150)
    assert [len(group) for group in source.groups] == [15] * 10
    assert source.groups[0] == tuple(range(15))


def test_the_real_tiny_imagenet_has_a_hundred_novel_classes(settings, real_data):
    source = load_source("tiny-imagenet", {**settings, "data_root": str(real_data("tiny-imagenet"))})
    assert np.bincount(source.train.labels).tolist() == [200] * 100
    assert np.bincount(source.test.labels).tolist() == [50] * 100
    assert source.class_names[0] == "tailed frog"
    assert {image.size for image in source.test.read(np.array([4_999, 0]))} == {(64, 64)}


def test_tiny_imagenet_of_all_classes_leaves_those_out_that_the_shipped_backbone_knows(tmp_path, write_images):
    names = [f"n{index:08d}" for index in range(200)]
    for split, labels in (("train", [3, 0, 1, 4, 2]), ("val", [4, 3, 0])):  # 0, 1 and 2 are base classes
        write_images(tmp_path / "tiny-imagenet" / f"{split}.parquet", labels, names=names)
    settings = {"data_root": str(tmp_path), "test_fraction": 0.2, "max_per_class": 0, "seed": 0}
    source = load_source("tiny-imagenet", settings)
    assert source.class_names == ("n00000003", "n00000004")
    assert source.train.labels.tolist() == [0, 1] and source.test.labels.tolist() == [1, 0]
