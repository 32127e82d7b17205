"""One-line wounds in a copy of the code: each must turn a test red whose name describes the wound."""

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COPIED = ("fedtalora_flwr", "server_app", "client_app", "tests/aggregation", "tests/test_imports.py", "pyproject.toml")
FEDTALORA, BASE = "fedtalora_flwr/aggregation/methods/fedtalora.py", "fedtalora_flwr/aggregation/types.py"
FACTORS, AVERAGING = "fedtalora_flwr/aggregation/factors.py", "fedtalora_flwr/aggregation/averaging.py"


@dataclass(frozen=True)
class Wound:
    """`old` becomes `new` in `file`, and `test` fails for it."""

    file: str
    old: str
    new: str
    test: str


WOUNDS = {
    "transposed residual": Wound(
        AVERAGING,
        "return lost.mul_(mean.scaling)",
        "return lost.mul_(mean.scaling).T",
        "tests/aggregation/test_fedtalora.py::test_residual_of_a_square_layer_is_not_transposed",
    ),
    "missing scaling of the residual": Wound(
        AVERAGING,
        "torch.tensordot(mean.scaling * contrast, spread_B, 1)",
        "torch.tensordot(contrast, spread_B, 1)",
        "tests/aggregation/test_fedtalora.py::test_residual_carries_the_scaling",
    ),
    "missing scaling of the product": Wound(
        FACTORS,
        "return self.scaling * (self.lora_B @ self.lora_A)",
        "return self.lora_B @ self.lora_A",
        "tests/aggregation/test_fedtalora.py::test_delta_is_scaling_times_b_times_a",
    ),
    "replaced instead of accumulated": Wound(
        FEDTALORA,
        "residual[name] = added(lost, to=state.residual.get(name))",
        "residual[name] = added(lost, to=None)",
        "tests/aggregation/test_fedtalora.py::test_residual_accumulates_over_rounds_and_does_not_replace",
    ),
    "unweighted mean": Wound(
        BASE,
        "return [update.num_examples / total for update in updates]",
        "return [1 / len(updates) for update in updates]",
        "tests/aggregation/test_fedtalora.py::test_clients_weigh_by_their_number_of_examples",
    ),
    "unsorted sum": Wound(
        BASE,
        "return sorted(updates, key=lambda update: update.partition_id)",
        "return list(updates)",
        "tests/aggregation/test_exact_methods.py::test_order_of_replies_does_not_change_a_bit_of_the_aggregate",
    ),
    "plain mean of the heads": Wound(
        "fedtalora_flwr/aggregation/class_rows.py",
        "weights = update.class_counts[held] / totals[held]",
        "weights = torch.full_like(totals[held], 1 / len(updates))",
        "tests/aggregation/test_class_rows.py::test_class_row_is_averaged_over_the_clients_that_hold_the_class",
    ),
    "added instead of set": Wound(
        "fedtalora_flwr/model/lora.py",
        "torch.add(pristine, residual",
        "torch.add(weight, residual",
        "tests/aggregation/test_loaded_weights.py::test_loading_a_state_sets_the_weights_and_never_adds_to_them",
    ),
    "shared part without its residual": Wound(
        "fedtalora_flwr/aggregation/slots.py",
        "residual=weighted_residual([shared, own], [1.0, 1.0])",
        "residual=dict(own.residual)",
        "tests/aggregation/test_fl_tac.py"
        "::test_shared_part_and_each_cluster_are_the_means_of_what_was_trained_for_any_slots_and_weights",
    ),
    "flwr in the pure core": Wound(
        FACTORS,
        "from torch import Tensor, nn\n",
        "from flwr.app import Message\nfrom torch import Tensor, nn\n",
        "tests/test_imports.py::test_part_of_the_library_imports_only_what_its_place_allows[aggregation]",
    ),
    "client in the server": Wound(
        "fedtalora_flwr/server/exchange.py",
        "import time\n",
        "import time\nfrom fedtalora_flwr.client.handlers import train\n",
        "tests/test_imports.py::test_server_and_client_never_import_each_other",
    ),
}


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    for name in COPIED:
        source, target = ROOT / name, tmp_path / name
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", "*.safetensors"))
        else:
            shutil.copy(source, target)
    return tmp_path


def run_tests(copy: Path, *tests: str) -> subprocess.CompletedProcess[str]:
    """Run tests of the copy on the code of the copy, in a process of its own."""
    options = ("-c", os.devnull, "--rootdir", str(copy), "--noconftest", "-p", "no:cacheprovider", "-q", "--tb=line")
    return subprocess.run(
        [sys.executable, "-m", "pytest", *options, *tests],
        cwd=copy,
        env={**os.environ, "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize("name", WOUNDS)
def test_wound_turns_the_test_red_that_describes_it(copy, name):
    wound = WOUNDS[name]
    file = copy / wound.file
    code = file.read_text()
    assert code.count(wound.old) == 1, f"{wound.file} has changed: the wound {name!r} finds no place"
    file.write_text(code.replace(wound.old, wound.new))
    result = run_tests(copy, wound.test)
    assert result.returncode == 1, f"{name} left {wound.test} green or unrun:\n{result.stdout}{result.stderr}"
    assert f"FAILED {wound.test}" in result.stdout


def test_copy_without_a_wound_is_green(copy):
    result = run_tests(copy, *{wound.test for wound in WOUNDS.values()})
    assert result.returncode == 0, result.stdout + result.stderr
