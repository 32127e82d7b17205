"""The library from Python: the page of examples, a script, a notebook, a plug-in of one's own, the public names."""

import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from local_grid import ROOT, tiny_run
from nbclient import NotebookClient

import fedtalora_flwr as fedtalora
from fedtalora_flwr.launch import api
from fedtalora_flwr.run_folder import names, round_lines

PAGE = (ROOT / "docs" / "API.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
SHORT = {"num-tasks": 1, "num-clients": 2, "rounds-per-task": 1, "max-per-class": 6, "max-test-per-class": 4}
HERE = os.environ | {"PYTHONPATH": f"{ROOT}", "OMP_WAIT_POLICY": "PASSIVE"}


def test_the_public_names_are_these():
    assert fedtalora.__all__ == ["ConfigError", "Run", "RunError", "__version__", "run"]
    assert all(getattr(fedtalora, name) is not None for name in fedtalora.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'nonsuch'"):
        _ = fedtalora.nonsuch


def test_importing_the_package_imports_nothing_of_the_kind():
    code = "import fedtalora_flwr, sys; print(sorted({'torch', 'flwr', 'pandas', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], env=HERE, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_examples_of_the_page_run_as_a_script_without_a_guard_and_print_what_they_print(tmp_path):
    script = tmp_path / "examples.py"
    script.write_text("\n".join(EXAMPLES))
    done = subprocess.run([sys.executable, script], cwd=tmp_path, env=HERE, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    faa, error = done.stdout.splitlines()
    assert 0.3 < float(faa) <= 1 and error == "rank must be at least 1, got 0"
    assert (tmp_path / "runs" / "first" / "report.html").is_file()
    assert (tmp_path / "runs" / "first" / "export" / "merged" / "load.py").is_file()


def test_a_notebook_plays_a_run(tmp_path):
    cell = f"import fedtalora_flwr as fedtalora\nrun = fedtalora.run(settings={SHORT}, out='run')\nrun.rounds.shape[0]"
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell)])
    client = NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": tmp_path}})
    client.execute(env=HERE)
    (output,) = notebook.cells[0].outputs  # nothing but the value
    assert output["data"]["text/plain"] == "1"


def test_a_failed_run_raises_what_it_said_and_keeps_its_folder(tmp_path):
    with pytest.raises(fedtalora.RunError, match="min-class-examples") as caught:
        fedtalora.run(settings=SHORT | {"min-class-examples": 1000}, out=tmp_path / "run")
    assert caught.value.folder == tmp_path / "run" and (caught.value.folder / "logs" / "run.log").is_file()
    assert fedtalora.Run.load(tmp_path / "run").state == "failed"


def test_an_exception_of_the_callback_stops_the_run_and_the_run_goes_on_later(tmp_path):
    def stop(line):
        raise InterruptedError(f"enough after round {line['server_round']}")

    settings = SHORT | {"rounds-per-task": 12}
    with pytest.raises(InterruptedError, match="enough after round 1"):
        fedtalora.run(settings=settings, out=tmp_path / "run", on_round=stop)
    stopped = fedtalora.Run.load(tmp_path / "run")
    assert stopped.state == "unfinished" and stopped.metrics == {} and 1 <= len(stopped.rounds) < 12
    told = []
    done = fedtalora.run(resume=tmp_path / "run", on_round=lambda line: told.append(line["server_round"]))
    first = told[0]  # a run that is stopped between a round's line and its checkpoint plays that round again
    assert done.state == "complete" and told == [*range(first, 13)]
    assert first in (len(stopped.rounds), len(stopped.rounds) + 1)


def test_rounds_that_are_played_again_from_an_earlier_one_are_told(tmp_path):
    path, told = tmp_path / names.ROUNDS, []
    for server_round in (1, 2, 3):
        round_lines.append(path, {"server_round": server_round, "task_id": 0, "mean_loss": 1.0})
    teller = api._Teller(tmp_path, lambda line: told.append((line["server_round"], line["mean_loss"])))
    path.write_text(path.read_text().splitlines(keepends=True)[0])  # as resume-from=1 does
    round_lines.append(path, {"server_round": 2, "task_id": 0, "mean_loss": 0.5})
    teller()
    teller()
    assert told == [(2, 0.5)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"settings": {"rnak": 3}}, "unknown setting 'rnak'; did you mean rank?"),
        ({"preset": "nonsuch"}, "no preset 'nonsuch'"),
        ({"engine": "spark"}, "engine is one of ray, process, got 'spark'"),
        ({"resume": "nowhere", "out": "x"}, "resume goes on with the run's own settings"),
    ],
)
def test_a_wrong_call_is_refused_before_anything_starts(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(fedtalora.ConfigError, match=re.escape(message)):
        fedtalora.run(**arguments)
    assert not list(tmp_path.iterdir())


def test_an_input_of_another_kind_is_refused_by_name(digits_run, tmp_path):
    run = fedtalora.Run.load(digits_run)
    with pytest.raises(ValueError, match="input 0 is int; this run's model takes a PIL image or the path"):
        run.predict([3])
    with pytest.raises(ValueError, match=r"x\.png"):
        run.predict([tmp_path / "x.png"])


PLUG_IN = """
from fedtalora_flwr.aggregation.methods.fedtalora import FedTaLoRA


def create(*, residual_energy):
    assert residual_energy == 1.0
    return FedTaLoRA(residual="off")
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] == "ward"]:
        monkeypatch.delitem(sys.modules, name)
    (tmp_path / "ward").mkdir()
    (tmp_path / "ward" / "__init__.py").write_text("")
    return tmp_path / "ward"


def test_a_method_that_lies_outside_the_package_plays_a_run(place, tmp_path):
    (place / "averages.py").write_text(PLUG_IN)
    folder = tiny_run(tmp_path / "run", method="ward.averages", num_tasks=1)
    assert fedtalora.Run.load(folder).rounds["residual_norm"].tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import nonsuch", r"method ward\.bad1: .*bad1\.py:1: ModuleNotFoundError: No module named 'nonsuch'"),
        ("x = 1\n\ndef create(:", r"method ward\.bad2: .*bad2\.py:3: SyntaxError"),
        ("x = 1\n", r"method ward\.bad3: .*bad3\.py has no function create; see docs/EXTEND\.md"),
    ],
)
def test_a_plug_in_that_cannot_be_imported_is_refused_with_its_file_and_line(place, text, message):
    name = re.search(r"bad\d", message)[0]
    (place / f"{name}.py").write_text(text)
    with pytest.raises(fedtalora.ConfigError, match=message):
        fedtalora.run(settings={"method": f"ward.{name}"}, out=place / "run")


def test_a_plug_in_that_is_nowhere_is_refused_with_what_to_do():
    with pytest.raises(fedtalora.ConfigError, match=r"there is no module 'nonsuch\.method'; install it, or put the fo"):
        fedtalora.run(settings={"method": "nonsuch.method"})
