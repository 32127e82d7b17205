"""The app on a real SuperLink and real SuperNodes: the same result as in one process, and the bytes Flower counts."""

import json
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
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
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


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
