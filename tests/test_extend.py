"""docs/EXTEND.md: every example is put in place as it stands, passes the contract tests and takes part in a run."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from local_grid import ROOT

BLOCK = re.compile(r"```python\n# (fedtalora_flwr/\S+\.py)\n(.*?)```", re.DOTALL)
EXAMPLES = dict(BLOCK.findall((ROOT / "docs" / "EXTEND.md").read_text()))

# Every choice on the page at once, and then the contract tests of methods and of penalties.
PLAY = """
import sys
from pathlib import Path
import pytest
from local_grid import tiny_run
tiny_run(Path(sys.argv[1]), dataset="stripes", partition="by-class", method="uniform", head="cosine", penalty="drift",
         backbone="untrained", penalty_weight=0.1, num_clients=2, local_epochs=2)
contracts = ["tests/aggregation/test_exact_methods.py", "tests/penalties/test_every_penalty.py"]
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "-k", "uniform or drift", *contracts]))
"""


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project with the page's files in it."""
    folder = tmp_path_factory.mktemp("extended")
    for part in ("fedtalora_flwr", "server_app", "client_app", "tests", "experiments"):
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, folder)
    for path, text in EXAMPLES.items():
        assert not (folder / path).exists(), f"{path} is there already"
        (folder / path).write_text(text)
    return folder


def python(copy: Path, *arguments: str) -> str:
    environment = os.environ | {"PYTHONPATH": f"{copy}:{copy / 'tests'}"}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=copy, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_page_has_an_example_for_each_folder():
    folders = {str(Path(path).parent.relative_to("fedtalora_flwr")) for path in EXAMPLES}
    assert folders == {
        *("aggregation/methods", "data/sources", "data/partitions", "metrics"),
        *("model/backbones", "model/heads", "model/penalties"),
    }


def test_examples_pass_the_contract_tests_and_train_together_in_one_run(copy, tmp_path):
    said = python(copy, "-c", PLAY, str(tmp_path / "run"))
    assert re.search(r"\b7 passed", said), said  # the tests that take every method, and every penalty, there is
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    diagonal = [metrics["accuracy_matrix"][i][i] for i in range(2)]
    assert metrics["learning_accuracy"] == pytest.approx(sum(diagonal) / 2)
    held = json.loads((tmp_path / "run" / "manifest.json").read_text())["class_counts"]
    assert [sum(count > 0 for count in counts) for counts in held] == [2, 2]  # a class of each task for each client


def test_examples_are_written_as_the_project_is(copy):
    files = [str(copy / path) for path in EXAMPLES]
    python(copy, "-m", "ruff", "check", *files)
    python(copy, "-m", "ruff", "format", "--check", *files)
