"""The doctor says what is wrong on this machine, and what to do about it."""

import socket
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

from fedtalora_flwr.cli import doctor
from fedtalora_flwr.model.train import precision_of


@pytest.fixture(scope="module")
def findings(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("cwd"))
        return doctor.examine()


def test_this_environment_can_run_the_demo_and_each_subject_is_looked_at_once(findings):
    assert [finding for finding in findings if finding.level == "bad"] == []
    subjects = [finding.subject for finding in findings]
    assert len(subjects) == len(set(subjects))
    assert {"libraries", "torchvision", "Flower's programs", "bf16 on the CPU", "loopback", "data"} <= set(subjects)
    assert "--engine process" in findings[subjects.index("other users")].text  # what loopback does not keep out
    libraries = findings[subjects.index("libraries")].text
    assert f"flwr {version('flwr')}" in libraries and f"ray {version('ray')}" in libraries


def test_every_finding_that_is_not_ok_names_what_to_do(findings):
    actions = ("export", "install", "leave precision", "free some", "clone", "checkout", "close something", "correct")
    actions += ("use --engine process",)
    assert all(any(action in f.text for action in actions) for f in findings if f.level != "ok")


def test_what_it_says_of_bf16_is_what_auto_takes_here(findings):
    (finding,) = (f for f in findings if f.subject == "bf16 on the CPU")
    taken = precision_of(torch.device("cpu"), "auto")
    assert finding.level == {"bf16": "ok", "fp32": "note"}[taken]
    assert ("takes it" in finding.text) == (taken == "bf16")


def test_the_requirements_are_those_of_the_checkout():
    by_name = {requirement.name: requirement for requirement in doctor._requirements()}
    assert {"flwr", "torch", "torchvision", "timm", "peft", "transformers", "datasets"} <= by_name.keys()
    assert not by_name["flwr"].specifier.contains("1.40.0") and by_name["flwr"].specifier.contains("1.39.2")
    assert "`pyproject.toml` asks for `flwr<1.40`" in Path(__file__).parents[1].joinpath("deploy/README.md").read_text()


def test_a_missing_and_an_outdated_library_are_bad_and_the_rest_is_listed():
    needed = [Requirement("no-such-library>=2"), Requirement("torch<1"), Requirement("numpy>=1")]
    missing, outdated, fitting = doctor._libraries(needed)
    assert missing.level == outdated.level == "bad"
    assert missing.text == "not installed, no-such-library>=2 is needed; run make install"
    assert outdated.text == f"{version('torch')} is installed, torch<1 is needed; run make install"
    assert fitting.level == "ok" and "numpy" in fitting.text and "torch" not in fitting.text


def test_missing_programs_of_flower_are_bad_and_named(tmp_path):
    for name in ("flwr", "flower-superlink"):
        (tmp_path / name).touch(mode=0o755)
    (finding,) = doctor._programs(tmp_path)
    assert finding.level == "bad"
    assert finding.text.startswith("flower-superexec, flwr-simulation, flwr-clientapp not in ")


def test_a_torchvision_that_cannot_be_imported_is_bad(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    finding = doctor._torchvision()
    assert finding.level == "bad" and "pip install --force-reinstall torch torchvision" in finding.text


def test_torch_that_cannot_be_imported_leaves_no_verdict_on_bf16(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setattr(doctor, "on_cpu", lambda: pytest.fail("a trial was made"))
    finding = doctor._bf16_on_cpu()
    assert finding.level == "note" and "make install" in finding.text


def test_loopback_that_cannot_be_bound_is_bad(monkeypatch):
    def refuse(address):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(socket, "create_server", refuse)
    assert doctor._loopback().level == "bad"


@pytest.mark.parametrize(
    ("environment", "level"),
    [
        ({}, "ok"),
        ({"no_proxy": ""}, "ok"),
        ({"HTTPS_PROXY": "http://proxy:3128"}, "note"),
        ({"http_proxy": "http://proxy:3128", "NO_PROXY": "example.org"}, "note"),
        ({"http_proxy": "http://proxy:3128", "no_proxy": "example.org, 127.0.0.1"}, "ok"),
        ({"all_proxy": "socks5://proxy", "NO_PROXY": "*"}, "ok"),
    ],
)
def test_a_proxy_that_would_get_calls_to_this_machine_is_noted_with_the_fix(environment, level):
    finding = doctor._proxies(environment)
    assert finding.level == level
    assert (level == "note") == ("export no_proxy=127.0.0.1,localhost" in finding.text)


def test_what_earlier_runs_left_is_told_with_the_command_that_clears_it(tmp_path):
    assert doctor._cache(tmp_path / "cache").text.endswith(
        " holds 0 B (residuals of earlier runs, at most base-cache-gb)"
    )
    (tmp_path / "cache" / "bases").mkdir(parents=True)
    (tmp_path / "cache" / "bases" / "a.safetensors").write_bytes(bytes(3 * 10**6))
    found = doctor._cache(tmp_path / "cache")
    assert "holds 3.0 MB" in found.text and f"rm -r {tmp_path / 'cache'} frees it" in found.text


def test_the_data_root_is_looked_into(tmp_path):
    assert "FEDTALORA_DATA is not set" in doctor._data("").text
    assert doctor._data(str(tmp_path)).level == "note"
    (tmp_path / "clinc150").mkdir()
    finding = doctor._data(str(tmp_path))
    assert finding.level == "ok" and finding.text.endswith("holds clinc150")


@pytest.mark.parametrize(("gib", "level"), [(0.1, "bad"), (1.5, "note"), (40.0, "ok")])
def test_little_disk_space_is_noted_and_none_is_bad(tmp_path, monkeypatch, gib, level):
    usage = doctor.shutil.disk_usage(tmp_path)._replace(free=int(gib * 2**30))
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda folder: usage)
    assert doctor._disk(tmp_path).level == level
