"""Count the project's files that one round runs through, and the switches between them: where it tangles.

The second of three rounds of one client on digits with a linear head, in one process.

    python benchmarks/hops.py            # --list names the files, with the calls that enter each
"""

import sys
import tempfile
import threading
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any

from fedtalora_flwr.config.sources import app_folder, defaults
from fedtalora_flwr.launch.in_process import play
from fedtalora_flwr.server.run import ServerRun

ROOT = Path(__file__).parents[1]
OURS = tuple(f"{ROOT / part}/" for part in ("fedtalora_flwr", "server_app", "client_app"))
ROUND = 2
SETTINGS = {
    "num-clients": 1,
    "num-tasks": 1,
    "rounds-per-task": 3,
    "head": "linear",
    "max-per-class": 8,
    "max-test-per-class": 4,
}


def main() -> None:
    visited: list[str] = []
    watching, play_round = False, ServerRun.play_round

    def look(frame: FrameType, event: str, _: Any) -> None:
        name = frame.f_code.co_filename
        if watching and event == "call" and name.startswith(OURS) and visited[-1:] != [name]:
            visited.append(name)

    def watched(run: ServerRun, server_round: int) -> None:
        nonlocal watching
        watching = server_round == ROUND
        play_round(run, server_round)
        watching = False

    ServerRun.play_round = watched  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as folder:
        settings = defaults(app_folder()) | SETTINGS | {"out": f"{folder}/run"}
        sys.setprofile(look)
        threading.setprofile(look)
        play(app_folder(), settings)
        sys.setprofile(None)
    counted = Counter(Path(name).relative_to(ROOT).as_posix() for name in visited)
    if "--list" in sys.argv:
        for name, entered in counted.most_common():
            print(f"{entered:4} {name}")
    print(f"one round: {len(counted)} files of the project, {len(visited)} switches between them")


if __name__ == "__main__":
    main()
