"""The directory is the registry."""

import subprocess
import sys

import pytest

from fedtalora_flwr.config import registry

PLUG_IN = "def create(*, rank, alpha=2.0):\n    return rank, alpha\n"
WITH_ARGUMENT = "def create(argument, *, rank):\n    return argument, rank\n"
WITH_REST = "def create(*, argument, **settings):\n    return argument, settings\n"


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package of two plug-ins and one file that is none."""
    name = f"plugs_{tmp_path.name.replace('-', '_')}"
    folder = tmp_path / name
    folder.mkdir()
    for file, text in {"__init__": "", "base": "x = 1", "two_words": PLUG_IN, "asks": WITH_ARGUMENT}.items():
        (folder / f"{file}.py").write_text(text)
    (folder / "takes_all.py").write_text(WITH_REST)
    monkeypatch.syspath_prepend(tmp_path)
    return name


def test_files_with_create_are_the_choices_in_kebab_case(package):
    assert registry.available(package) == ("asks", "takes-all", "two-words")


@pytest.mark.parametrize("name", ["two-words", "two_words"])
def test_a_choice_answers_to_kebab_and_snake_case(package, name):
    assert registry.build(package, name, {"rank": 3}) == (3, 2.0)


def test_create_gets_the_settings_that_it_names_and_no_others(package):
    assert registry.build(package, "two-words", {"rank": 3, "alpha": 5.0, "seed": 1}) == (3, 5.0)


def test_what_stands_behind_the_first_colon_or_slash_is_the_argument(package):
    assert registry.build(package, "asks:/a:b-c", {"rank": 3}) == ("/a:b-c", 3)
    assert registry.build(package, "asks/a:b/c", {"rank": 3}) == ("a:b/c", 3)


def test_create_that_takes_a_rest_gets_all_settings_and_names_none_of_it(package):
    assert registry.build(package, "takes-all:x", {"rank": 3, "seed": 1}) == ("x", {"rank": 3, "seed": 1})
    assert registry.parameters(package, "takes-all") == {"argument"}


@pytest.mark.parametrize("name", ["three", "base", "", "__init__", "two words", "../asks"])
def test_an_unknown_choice_is_an_error_that_lists_what_there_is(package, name):
    with pytest.raises(
        ValueError, match=r"there is no .*; choose one of: asks, takes-all, two-words, or name a file of your own"
    ):
        registry.build(package, name, {"rank": 3})


@pytest.mark.parametrize(
    ("name", "message"),
    [("asks", "'asks': write asks:<name>"), ("asks:", "write asks:<name>"), ("two-words:x", "takes no argument")],
)
def test_an_argument_too_few_or_too_many_is_an_error(package, name, message):
    with pytest.raises(ValueError, match=message):
        registry.build(package, name, {"rank": 3})


def test_building_a_choice_does_not_import_the_others():
    code = (
        "import sys; from fedtalora_flwr import data; data.load_source('digits', "
        "dict(test_fraction=0.2, max_per_class=0, seed=0)); assert not {'torch', 'datasets'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
