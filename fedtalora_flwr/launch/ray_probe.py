"""Look at a Ray cluster before a run goes there: can this machine join it, is there room for the clients.

As a program, ``python cluster.py ADDRESS CLIENT_CPUS CLIENT_GPUS`` joins the cluster as a driver without work and
prints a JSON object on its last line: ``nodes``, or ``error`` with what to do. It starts and stops no part of Ray.
A process of its own, because a Ray that does not answer can only be killed.
"""

import json
import os
import sys
import time
from collections.abc import Mapping, Sequence

JOIN_SECONDS = 10
FREE_SECONDS = 15.0  # until the CPUs of a run that has just ended are free again


def places(nodes: Sequence[Mapping[str, float]], *, client_cpus: int, client_gpus: float) -> int:
    """Count the clients that fit on the nodes side by side, as Flower counts its actors.

    Parameters
    ----------
    nodes
        Each node's resources under Ray's names, e.g. ``{"CPU": 8.0, "GPU": 1.0}``.
    client_cpus, client_gpus
        What a client takes.
    """
    return sum(
        min(
            int(node.get("CPU", 0) / client_cpus),
            int(node.get("GPU", 0) / client_gpus) if client_gpus else sys.maxsize,
        )
        for node in nodes
    )


def refusal(
    nodes: Sequence[Mapping[str, float]], free: Mapping[str, float], *, client_cpus: int, client_gpus: float
) -> str:
    """Say why a run cannot go to the cluster now, in words for the user; empty if it can.

    Parameters
    ----------
    nodes
        As in `places`.
    free
        What is not in use of all nodes together.
    client_cpus, client_gpus
        As in `places`.
    """
    share = f"{client_cpus} CPUs" + (f" and {client_gpus:g} GPUs" if client_gpus else "")
    if not places(nodes, client_cpus=client_cpus, client_gpus=client_gpus):
        have = "; ".join(f"{node.get('CPU', 0):g} CPUs, {node.get('GPU', 0):g} GPUs" for node in nodes)
        return (
            f"no node of the Ray cluster has room for one client of {share}; its {len(nodes)} nodes have: {have}. "
            "Lower --set threads or --client-gpus, or give more to ray start --num-cpus --num-gpus"
        )
    for name in ["CPU", *(["GPU"] if client_gpus else [])]:
        total = sum(node.get(name, 0) for node in nodes)
        if free.get(name, 0) < total:
            return (
                f"of the Ray cluster's {total:g} {name}s only {free.get(name, 0):g} are free. Flower puts clients on "
                "all of them, and those on the others would wait: let the cluster's other jobs end (ray status), or "
                "start another cluster"
            )
    return ""


def main(address: str, client_cpus: int, client_gpus: float) -> dict[str, object]:
    """Join the cluster, wait a little for its CPUs to be free, and give the verdict."""
    os.environ["RAY_GCS_SERVER_REQUEST_TIMEOUT_SECONDS"] = str(JOIN_SECONDS)
    # What is meant for the run's driver is none of the probe's.
    for name in ("RAY_ADDRESS", "RAY_JOB_CONFIG_JSON_ENV_VAR"):
        os.environ.pop(name, None)
    import ray

    try:
        ray.init(address=address, log_to_driver=False, configure_logging=False)
    except Exception as error:  # Ray raises what it likes: a version's mismatch, no node on this machine, no answer
        return {
            "error": f"Ray could not join the cluster at {address} ({error}). This machine must be one of its nodes "
            f"(ray start --address {address}), with the same versions of Python and Ray; see docs/CLUSTER.md"
        }
    deadline = time.monotonic() + FREE_SECONDS
    while True:
        alive = [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
        resources = [node["Resources"] for node in alive]
        free = ray.available_resources()  # type: ignore[no-untyped-call]
        why = refusal(resources, free, client_cpus=client_cpus, client_gpus=client_gpus)
        if not why or time.monotonic() > deadline:
            break
        time.sleep(0.5)
    return {"error": why} if why else {"nodes": {node["NodeName"]: node["Resources"].get("CPU", 0) for node in alive}}


if __name__ == "__main__":
    print("\n" + json.dumps(main(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]))), flush=True)
