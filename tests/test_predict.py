"""What a run's model says of files, folders and standard input."""

import io
import json
import re
import shutil
import weakref

import numpy as np
import pytest
import torch
from PIL import Image

from fedtalora_flwr.config import RunConfig
from fedtalora_flwr.inference.model import TrainedModelError, open_trained
from fedtalora_flwr.inference.predict import InputError, Item, items_of, predict, read_items
from fedtalora_flwr.model.heads import resolve
from fedtalora_flwr.model.session import data_of

LAMP = "switch the lamp on"


def items(*names, modality="text", stdin=b"", column=""):
    return list(read_items([str(name) for name in names], modality=modality, stdin=io.BytesIO(stdin), column=column))


def texts(*names, **options):
    return [(item.name.rpartition("/")[2], item.raw) for item in items(*names, **options)]


@pytest.fixture(scope="module")
def digits_folder(digits_run, tmp_path_factory):
    """Some of the run's training images as files, two folders deep."""
    config = RunConfig.parse(json.loads((digits_run / "config.json").read_text()))
    folder = tmp_path_factory.mktemp("pictures")
    (folder / "more").mkdir()
    for number, image in enumerate(data_of(config).source.train.read(np.arange(6))):
        image.save(folder / ("more" if number > 3 else "") / f"{number}.png")
    return folder


def test_predictions_of_files_are_those_of_the_runs_own_data(digits_run, digits_folder):
    trained = open_trained(digits_run, device="cpu")
    found = list(predict(trained, iter(items(digits_folder, modality="image")), top=2))
    data = data_of(trained.config)
    inputs = trained.model.backbone.encode(data.source.train, np.arange(6), source=data.source)
    best = trained.logits(inputs).argmax(1).tolist()
    assert [prediction.ranking[0][0] for prediction in found] == [trained.class_names[column] for column in best]
    assert [prediction.item.name[-5:] for prediction in found] == [f"{number}.png" for number in range(6)]
    assert all(len(prediction.ranking) == 2 for prediction in found)


def test_probabilities_sum_to_one_and_fall(digits_run, text_run, digits_folder):
    for run, batch in ((digits_run, items(digits_folder, modality="image")), (text_run, items("-", stdin=b"a\nlamp"))):
        for prediction in predict(open_trained(run, device="cpu"), iter(batch), top=99):
            values = [probability for _, probability in prediction.ranking]
            assert sum(values) == pytest.approx(1, abs=1e-5) and min(values) >= 0
            assert values == sorted(values, reverse=True)


def test_a_linear_head_gives_a_softmax_and_a_ridge_head_its_clipped_scores():
    scores = torch.tensor([[0.9, 0.3, -0.2]])
    torch.testing.assert_close(resolve("linear", {}).probabilities(scores), scores.softmax(1))
    ridge = resolve("ridge", {"ridge_lambda": 0.1})
    torch.testing.assert_close(ridge.probabilities(scores), torch.tensor([[0.75, 0.25, 0.0]]))


def test_an_image_of_any_size_is_brought_to_the_side_of_the_training_images(digits_run):
    trained = open_trained(digits_run, device="cpu")
    wide = Image.fromarray(np.random.default_rng(0).integers(256, size=(20, 31, 3), dtype="u1"))
    assert trained.image_side == 8
    assert trained.encode([wide]).shape == (1, 3, 8, 8)


def test_originals_are_in_memory_one_at_a_time_and_score_as_they_do_together(digits_run):
    trained = open_trained(digits_run, device="cpu")
    noise = np.random.default_rng(0).integers(256, size=(9, 20, 31, 3), dtype="u1")
    alive, most = [], 0

    def originals():
        nonlocal most
        for number, pixels in enumerate(noise):
            image = Image.fromarray(pixels)
            alive.append(weakref.ref(image))
            most = max(most, sum(ref() is not None for ref in alive))
            yield Item(f"{number}.png", image)

    found = list(predict(trained, originals(), top=1))
    assert most <= 2 < len(found) < trained.config.eval_batch_size
    assert {prediction.item.raw.size for prediction in found} == {(8, 8)}
    together = trained.head.probabilities(trained.logits(trained.encode([Image.fromarray(one) for one in noise])))
    assert [prediction.ranking[0][1] for prediction in found] == together.max(1).values.tolist()


def test_a_run_made_before_a_setting_came_is_opened_with_its_default(digits_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(digits_run, run)
    settings = json.loads((run / "config.json").read_text())
    del settings["node-timeout"], settings["signature"]
    (run / "config.json").write_text(json.dumps(settings))
    assert open_trained(run, device="cpu").config == open_trained(digits_run, device="cpu").config


def test_a_run_of_a_version_with_settings_that_are_gone_is_refused_with_its_version(digits_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(digits_run, run)
    settings = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(settings | {"node-patience": 3}))
    message = r"run was made by another version of fedtalora \(0.*commit .*unknown setting 'node-patience'.*; open it"
    with pytest.raises(TrainedModelError, match=message):
        open_trained(run, device="cpu")
    (run / "config.json").write_text(json.dumps(settings | {"node-timeout": -1.0}))
    with pytest.raises(TrainedModelError, match=r"run: node-timeout must be .*, got -1"):
        open_trained(run, device="cpu")


def test_texts_are_read_from_every_kind_of_file(tmp_path):
    (tmp_path / "a.txt").write_text(f"{LAMP}\n\n is it? \n")
    (tmp_path / "b.csv").write_text('id,text\n1,"on, please"\n2,off\n')
    (tmp_path / "c.tsv").write_text("label\tsentence\nx\ton, please\n")
    (tmp_path / "d.json").write_text(json.dumps(["on", {"query": "off"}]))
    (tmp_path / "e.jsonl").write_text('{"text": "on"}\n"off"\n')
    (tmp_path / "f.pdf").write_text("not read from a folder")
    assert texts(tmp_path) == [
        ("a.txt:1", LAMP),
        ("a.txt:3", "is it?"),
        ("b.csv:2", "on, please"),
        ("b.csv:3", "off"),
        ("c.tsv:2", "on, please"),
        ("d.json:1", "on"),
        ("d.json:2", "off"),
        ("e.jsonl:1", "on"),
        ("e.jsonl:2", "off"),
    ]
    assert texts(tmp_path / "c.tsv", column="label") == [("c.tsv:2", "x")]
    (tmp_path / "g.csv").write_bytes('text;label\r\n"an; bitte";x\r\n'.encode("utf-16"))
    assert texts(tmp_path / "g.csv") == [("g.csv:2", "an; bitte")]


@pytest.mark.parametrize("inside", ["\u2028", "\u2029", "\x85", "\x0c"])
def test_a_text_goes_on_after_a_separator_that_ends_no_line_of_a_file(tmp_path, inside):
    said = f"switch the{inside}lamp on"
    (tmp_path / "a.txt").write_bytes(f"{said}\r\n\r\noff\n".encode())
    (tmp_path / "b.jsonl").write_bytes(f'{json.dumps({"text": said}, ensure_ascii=False)}\r\n"off"\n'.encode())
    assert texts(tmp_path) == [("a.txt:1", said), ("a.txt:3", "off"), ("b.jsonl:1", said), ("b.jsonl:2", "off")]


def test_standard_input_holds_a_text_a_line_or_one_image():
    assert texts("-", stdin=f"{LAMP}\n\nß\n".encode()) == [("-:1", LAMP), ("-:3", "ß")]
    content = io.BytesIO()
    Image.new("L", (5, 4), 7).save(content, "PNG")
    (image,) = items("-", modality="image", stdin=content.getvalue())
    assert image.raw.mode == "RGB" and image.raw.size == (5, 4)


@pytest.mark.parametrize(
    ("name", "content", "modality", "message"),
    [
        ("no", None, "image", r"no: no such file or folder; give image files, or - for"),
        ("a.docx", "x", "text", r"a\.docx: \.docx is no text format known here; convert it to one of \.txt, \.jsonl"),
        ("LICENSE", "x", "text", r"LICENSE: a file without ending is no text format"),
    ],
)
def test_a_name_that_stands_for_nothing_is_refused_before_anything_is_read(tmp_path, name, content, modality, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    (tmp_path / "empty").mkdir()
    for wrong, reason in ((name, message), ("empty", f"empty holds no {modality} files")):
        with pytest.raises(InputError, match=reason):
            read_items(["-", str(tmp_path / wrong)], modality=modality, stdin=io.BytesIO(b"on"))


@pytest.mark.parametrize(
    ("name", "content", "modality", "message"),
    [
        ("a.json", "[1", "text", r"a\.json cannot be read as \.json: "),
        ("a.json", '{"a": 1}', "text", r"must hold a list of texts or of objects, got dict"),
        ("a.csv", "id,wort\n1,an\n2,aus\n", "text", r"a\.csv:2 has no text column \(looked for text, .*only id, wort"),
        ("a.txt", "\n \n", "text", r"a\.txt holds no text; give one that does"),
        ("a.jsonl", "", "text", r"a\.jsonl holds no text"),
        ("a.json", "[]", "text", r"a\.json holds no text"),
        ("a.csv", "text\n", "text", r"a\.csv holds no text"),
        ("a.txt", b"\xff\xfe\x00", "text", r"a\.txt cannot be read \(.*; save it as UTF-8"),
        ("a.csv", b"text\nT\xfcr\n", "text", r"a\.csv is not UTF-8 \(line 2\), but .*Windows-1252"),
        ("a.png", "no picture", "image", r"image .*a\.png cannot be decoded as an image"),
    ],
)
def test_a_file_that_cannot_be_read_is_one_item_that_says_what_to_do(tmp_path, name, content, modality, message):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    (item,) = items(tmp_path / name, modality=modality)
    assert item.raw is None and re.search(message, item.error)


def test_a_row_without_a_text_is_told_among_the_others(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "on"}\n{"label": 3}\n"off"\n{"text": 5}\n')
    found = items(tmp_path / "a.jsonl")
    assert [item.raw for item in found] == ["on", None, "off", None]
    assert "a.jsonl:2 has no text column" in found[1].error
    assert "a.jsonl:4 must hold a string in its column text, got 5; put it in quotes" in found[3].error


def test_every_row_is_told_where_each_has_another_fault(tmp_path):
    (tmp_path / "a.json").write_text('["\\ud83d cut", {"text": 5}, {"text": null}]')
    errors = [item.error for item in items(tmp_path / "a.json")]
    assert len(errors) == 3
    for error, words in zip(
        errors, ("no valid Unicode", "must hold a string", "holds no text in its column"), strict=True
    ):
        assert words in error


def test_half_a_character_in_json_is_told_among_the_others(text_run, tmp_path):
    (tmp_path / "a.json").write_text(r'["lamp on", "\ud83d cut", "door", {"text": "\ude00"}, "\ud83d\ude00"]')
    found = list(predict(open_trained(text_run, device="cpu"), iter(items(tmp_path / "a.json")), top=1))
    assert [prediction.item.raw for prediction in found] == ["lamp on", None, "door", None, "\N{GRINNING FACE}"]
    assert re.search(r"a\.json:2 is no valid Unicode text \(.*'\\ud83d' in position 0", found[1].item.error)


def test_standard_input_that_is_empty_or_not_utf8_is_told():
    assert items("-", modality="image")[0].error == "standard input is empty; pipe one image file into it"
    assert items("-", stdin=b"\n \n")[0].error == "standard input is empty; pipe texts into it, one a line"
    assert items("-", modality="image", stdin=b"x")[0].error.startswith("the image on standard input cannot be decoded")
    first, second = items("-", stdin=b"on\n\xff\n")
    assert first.raw == "on" and "line 2 of standard input is not UTF-8" in second.error


def test_a_broken_picture_in_a_folder_is_told_in_its_place_and_the_others_are_classified(
    digits_run, digits_folder, tmp_path
):
    shutil.copytree(digits_folder, tmp_path / "scans")
    (tmp_path / "scans" / "1.png").write_bytes((digits_folder / "1.png").read_bytes()[:40])
    Image.new("I;16", (8, 8), 300).save(tmp_path / "scans" / "deep.png")
    (tmp_path / "scans" / "notes.pdf").write_bytes(b"%PDF-1.4")
    trained = open_trained(digits_run, device="cpu")
    found = [
        prediction.to_json()
        for prediction in predict(trained, iter(items(tmp_path / "scans", modality="image")), top=1)
    ]
    assert [entry["input"].rpartition("/")[2] for entry in found] == [
        "0.png",
        "1.png",
        "2.png",
        "3.png",
        "deep.png",
        "4.png",
        "5.png",
    ]
    broken = {number: entry["error"] for number, entry in enumerate(found) if "error" in entry}
    assert sorted(broken) == [1, 4] and set(found[1]) == {"input", "error"}
    assert "1.png cannot be decoded as an image" in broken[1] and "deep.png has image mode I;16" in broken[4]
    wanted = predict(trained, iter(items(digits_folder, modality="image")), top=1)
    best = [prediction.ranking[0][0] for prediction in wanted]
    assert [entry["predictions"][0]["class"] for entry in found if "error" not in entry] == best[:1] + best[2:]


@pytest.mark.parametrize("mode", ["I;16", "F"])
def test_an_image_of_more_than_8_bits_is_told_as_a_file_and_from_a_program(mode, tmp_path):
    scan = Image.new(mode, (4, 3), 300)
    scan.save(tmp_path / "scan.tif")
    (from_file,) = items(tmp_path / "scan.tif", modality="image")
    good, from_program = items_of([Image.new("L", (4, 3)), scan], modality="image")
    assert (good.raw.mode, good.error) == ("RGB", "")
    for item in (from_file, from_program):
        assert item.raw is None and f"has image mode {mode}, which 8-bit RGB cannot hold" in item.error


def test_a_prediction_as_json_repeats_a_text_and_no_image(text_run, digits_run, digits_folder):
    (prediction,) = predict(open_trained(text_run, device="cpu"), iter(items("-", stdin=LAMP.encode())), top=1)
    found = prediction.to_json()
    assert found["input"] == "-:1" and found["text"] == LAMP and len(found["predictions"]) == 1
    assert set(found["predictions"][0]) == {"class", "probability"}
    images = iter(items(digits_folder / "0.png", modality="image"))
    (prediction,) = predict(open_trained(digits_run, device="cpu"), images, top=1)
    assert set(prediction.to_json()) == {"input", "predictions"}
