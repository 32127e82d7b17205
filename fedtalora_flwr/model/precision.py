"""What ``precision = auto`` means on this machine's CPU: bf16 where a trial says that it works and pays, else float32.

Processors without bf16 emulate it slowly, and virtual machines announce one that then faults. So a child process tries
it (`trial`). All processes of a machine must come to one answer, or a run could not be repeated: the first to ask
makes the trial, the others wait for it, and the answer is kept in the cache folder for this CPU and version of torch.

Torch is not imported here: it is the child's to load, and the doctor asks too.
"""

import fcntl
import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

from fedtalora_flwr.config.sources import cache_folder
from fedtalora_flwr.config.whole import write_text

LEAST_SPEEDUP = 1.2  # below it bf16 is not worth its rounding
MOST_ERROR = 0.05  # of any tensor's norm; rounding alone makes 0.01
LIMIT_SECONDS = 60.0

_TRIAL = (sys.executable, "-P", "-m", "fedtalora_flwr.model.trial")


@dataclass(frozen=True)
class Verdict:
    """What ``precision = auto`` takes on this CPU.

    Parameters
    ----------
    takes_bf16
        Else float32.
    reason
        What the trial found, in a few words.
    """

    takes_bf16: bool
    reason: str


def on_cpu() -> Verdict:
    """Say what ``precision = auto`` takes on this CPU; a machine's first call takes some seconds."""
    return _known(verdict_file())


def verdict_file() -> Path:
    """Name the file of this CPU and version of torch; without it the next to ask makes the trial again."""
    return cache_folder() / f"bf16-{_cpu_and_torch()}.json"


def judge(command: Sequence[str] = _TRIAL, *, limit_seconds: float = LIMIT_SECONDS) -> Verdict:
    """Run a trial, which may fault, hang or err, and judge bf16 by it."""
    path = os.pathsep.join(filter(None, [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")]))
    try:
        ended = subprocess.run(
            command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, timeout=limit_seconds, check=False
        )
    except subprocess.TimeoutExpired:
        return Verdict(False, f"bf16 gave no answer in {limit_seconds:.0f} s")
    if ended.returncode < 0:
        return Verdict(False, f"bf16 crashes here (signal {-ended.returncode})")
    if ended.returncode > 0:
        return Verdict(False, "bf16 fails here")
    found = json.loads(ended.stdout)
    if not found["error"] <= MOST_ERROR:  # NaN too
        return Verdict(False, f"bf16 is off by {found['error']:.2g} of a result's size here")
    return Verdict(found["speedup"] >= LEAST_SPEEDUP, f"bf16 is {found['speedup']:.1f} times as fast as float32 here")


@lru_cache(maxsize=1)
def _known(file: Path) -> Verdict:
    """Read the verdict or, the first of all processes alone, reach it."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            return _read(file) or _write(file, judge())
    except OSError as error:  # each process for itself might come to another answer
        return Verdict(False, f"bf16 is not tried, for the answer cannot be kept ({error})")


def _read(file: Path) -> Verdict | None:
    try:
        return Verdict(**json.loads(file.read_text()))
    except (FileNotFoundError, ValueError, TypeError):  # not there, or damaged
        return None


def _write(file: Path, verdict: Verdict) -> Verdict:
    write_text(file, json.dumps(asdict(verdict)) + "\n")
    return verdict


@lru_cache(maxsize=1)
def _cpu_and_torch() -> str:
    """Tell CPUs apart by model and features, which a virtual machine may hide; and versions of torch."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else [platform.processor(), platform.machine()]
    facts = sorted({line for line in lines if line.partition(":")[0].strip() in ("model name", "flags", "Features")})
    text = "\n".join([*(facts or lines), importlib.metadata.version("torch")])
    return hashlib.sha256(text.encode()).hexdigest()[:12]
