"""pyproject.toml is the only home of defaults, and knows the same settings as RunConfig."""

from typing import get_type_hints

import pytest
from local_grid import defaults

from fedtalora_flwr import aggregation
from fedtalora_flwr.config import ConfigError, RunConfig, kebab, snake
from fedtalora_flwr.model import heads

TYPES = {kebab(name): kind for name, kind in get_type_hints(RunConfig).items()}


def test_every_setting_has_a_default_and_every_default_is_a_setting():
    assert set(defaults()) == set(TYPES)


def test_settings_stand_in_the_same_order_in_both_places():
    assert list(defaults()) == list(TYPES)


@pytest.mark.parametrize("key", TYPES)
def test_default_has_the_type_of_its_field(key):
    assert type(defaults()[key]) is TYPES[key]


def test_defaults_parse_and_come_back_as_they_were():
    assert RunConfig.parse(defaults()).flat() == defaults()


def test_default_method_and_head_exist():
    config = RunConfig.parse(defaults())
    assert aggregation.resolve(config.method, config.settings).exact
    assert heads.resolve(config.head, config.settings).lifted_dim(9) > 0


def test_fields_have_no_defaults_of_their_own():
    with pytest.raises(TypeError, match="missing"):
        RunConfig()


@pytest.mark.parametrize("name", ["learning_rate", "out", "a_b_c"])
def test_key_and_field_name_convert_both_ways(name):
    assert snake(kebab(name)) == name


def test_unknown_key_is_refused_with_the_nearest_one():
    with pytest.raises(ConfigError, match="unknown setting 'learning-rat'; did you mean learning-rate"):
        RunConfig.parse(defaults() | {"learning-rat": 0.1})


def test_missing_key_is_named():
    settings = defaults()
    del settings["rank"]
    with pytest.raises(ConfigError, match="settings are missing: rank"):
        RunConfig.parse(settings)


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("rank", 4.0, "rank takes a whole number, got 4.0"),
        ("rank", True, "rank takes a whole number, got True"),
        ("verify", 1, "verify takes true or false, got 1"),
        ("dataset", 7, "dataset takes a text, got 7"),
        ("rank", 0, "rank must be at least 1, got 0"),
        ("alpha", float("nan"), "alpha must be above 0, got nan"),
        ("learning-rate", float("inf"), "learning-rate must be at least 0, got inf"),
        ("fraction-train", 0.0, "fraction-train must be above 0 and at most 1, got 0.0"),
        ("optimizer", "adam", "optimizer must be one of adamw, sgd, got 'adam'"),
        ("stop-after-task", 6, "stop-after-task 6 is beyond num-tasks 5"),
        ("min-replies", 6, "min-replies 6 can never be met by num-clients 5"),
    ],
)
def test_impossible_value_is_refused_with_its_key_and_value(key, value, text):
    with pytest.raises(ConfigError, match=text.replace(".", r"\.")):
        RunConfig.parse(defaults() | {key: value})


def test_a_run_without_training_rounds_needs_a_head_that_learns_without_them():
    RunConfig.parse(defaults() | {"rounds-per-task": 0, "head": "ridge"})
    with pytest.raises(ConfigError, match="rounds-per-task 0 trains nothing; head = ridge, lda and prototype learn"):
        RunConfig.parse(defaults() | {"rounds-per-task": 0, "head": "linear"})


def test_whole_number_does_for_a_float():
    alpha = RunConfig.parse(defaults() | {"alpha": 16}).alpha
    assert alpha == 16.0 and type(alpha) is float
