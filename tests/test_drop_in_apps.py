"""Whole apps with FedTaLoRA: the snippet of docs/FLOWER_APP.md, and examples/peft in this process and on Ray."""

import re
import sys
from pathlib import Path

import pytest
from flwr.app import Context, RecordDict
from local_grid import ROOT
from transformers import AutoModelForSequenceClassification

from fedtalora_flwr.launch.in_process import LocalGrid, play
from fedtalora_flwr.launch.simulation import launch

EXAMPLE = ROOT / "examples" / "peft"
PAGE = (ROOT / "docs" / "FLOWER_APP.md").read_text()
NUM_ROUNDS = 3


def errors(text: str) -> list[float]:
    return [float(error) for error in re.findall(r"round \d: exactness error (\S+)", text)]


def test_the_pages_app_runs_as_it_stands_and_saves_its_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (snippet,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    names: dict[str, object] = {}
    exec(compile(snippet, "FLOWER_APP.md", "exec"), names)
    context = Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config={})
    names["server_app"](LocalGrid(names["client_app"], {}, 2), context)
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "trained").num_labels == 3


@pytest.mark.parametrize("model", ["classifier", "causal"])
def test_one_word_makes_the_examples_average_exact(model, monkeypatch, capsys):
    monkeypatch.setattr(sys, "path", [*sys.path])
    found = {}
    for strategy in ("FedAvg", "FedTaLoRA"):
        play(EXAMPLE, {"strategy": strategy, "model": model, "num-rounds": NUM_ROUNDS, "num-clients": 3})
        found[strategy] = errors(capsys.readouterr().out)
    assert len(found["FedAvg"]) == len(found["FedTaLoRA"]) == NUM_ROUNDS
    assert min(found["FedAvg"]) > 1e-3 and max(found["FedTaLoRA"]) < 1e-6


@pytest.mark.ray
@pytest.mark.full
def test_the_example_runs_in_flowers_simulation(tmp_path: Path) -> None:
    config = tmp_path / "run-config.toml"
    config.write_text('strategy = "FedTaLoRA"\nmodel = "causal"\n')
    result = launch(EXAMPLE, run_config=config, num_supernodes=3, ray_cpus=1, work_dir=tmp_path, on_tick=list)
    text = result.log_path.read_text()
    assert result.ok, text
    assert len(errors(text)) == NUM_ROUNDS and max(errors(text)) < 1e-6
