"""Assignments of the command line get the type of their setting."""

import subprocess
import sys
from pathlib import Path

import pytest
from local_grid import defaults

from fedtalora_flwr.config import ConfigError, RunConfig, parse_assignment

KNOWN = defaults()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("rank=6", ("rank", 6)),
        (" rank = 6 ", ("rank", 6)),
        ("learning-rate=1", ("learning-rate", 1.0)),
        ("learning-rate=3e-4", ("learning-rate", 3e-4)),
        ("verify=true", ("verify", True)),
        ("lora-targets=q,v", ("lora-targets", "q,v")),
        ("dataset='hub:a/b'", ("dataset", "hub:a/b")),
        ("data-path=/a=b", ("data-path", "/a=b")),
        ("lora-blocks=3", ("lora-blocks", "3")),
        ("out=", ("out", "")),
    ],
)
def test_an_assignment_takes_the_type_of_its_setting(text, expected):
    key, value = parse_assignment(text, KNOWN)
    assert (key, value) == expected and type(value) is type(expected[1])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rank", "--set takes key=value, got 'rank'"),
        ("rnak=3", r"unknown setting 'rnak'; did you mean rank\?"),
        ("zzz=3", "fedtalora run --list-settings lists what there is"),
        ("rank=2.0", "rank takes a whole number, got 2.0"),
        ("rank=two", "rank takes a whole number, got 'two'"),
        ("rank=", "rank takes a whole number, got ''"),
        ("alpha=[1]", r"alpha takes a number, got \[1\]"),
        ("verify=yes", "verify takes true or false, got 'yes'"),
        ("verify=1", "verify takes true or false, got 1"),
    ],
)
def test_an_assignment_that_cannot_be_is_an_error_that_says_what_is(text, message):
    with pytest.raises(ConfigError, match=message):
        parse_assignment(text, KNOWN)


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_a_seed_beyond_what_generators_take_is_refused(seed):
    RunConfig.parse(KNOWN | {"seed": 2**63 - 1})
    with pytest.raises(ConfigError, match="seed must be at least 0 and below"):
        RunConfig.parse(KNOWN | {"seed": seed})


def test_the_last_task_is_all_of_them_unless_the_run_stops_before():
    assert RunConfig.parse(KNOWN | {"num-tasks": 5}).last_task == 5
    assert RunConfig.parse(KNOWN | {"num-tasks": 5, "stop-after-task": 3}).last_task == 3


@pytest.mark.parametrize("key", ["method", "dataset", "partition", "penalty", "backbone", "head"])
def test_a_choice_that_is_not_there_is_refused_with_those_that_are(key):
    with pytest.raises(ConfigError, match=rf"there is no {key} 'nonsuch'; choose one of: \w+"):
        RunConfig.parse({**defaults(), key: "nonsuch"})


def test_choices_are_checked_without_importing_them():
    code = "import sys; from fedtalora_flwr.config import RunConfig; from local_grid import defaults; "
    code += "before = set(sys.modules); RunConfig.parse(defaults()); "
    code += "assert not {m for m in set(sys.modules) - before if m.startswith(('fedtalora', 'torch'))}"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent)
