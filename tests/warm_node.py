"""The processes of a node, as Flower has them: a SuperNode, its SuperExec, and one process for each message.

The SuperExec reads a line of JSON for each message, and starts its process, which prints a line of JSON.
"""

import json
import os
import subprocess
import sys
from typing import Any


def supernode(*arguments: str) -> None:
    subprocess.run([sys.executable, __file__, "superexec", *arguments])


def superexec(*arguments: str) -> None:
    for line in sys.stdin:
        subprocess.Popen([sys.executable, __file__, "message", line, *arguments], stdin=subprocess.DEVNULL)


def message(line: str, app_folder: str) -> None:
    import importlib
    import logging

    logs: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: logs.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("fedtalora.warm").addHandler(handler)
    sys.path.insert(0, app_folder)
    importlib.import_module("toyapp")
    caller = importlib.import_module("fedtalora_flwr.client.warm.caller")
    from fedtalora_flwr.client import warm

    asked: dict[str, Any] = json.loads(line)
    caller.IDLE_SECONDS, caller.SILENT_SECONDS = asked["idle_seconds"], asked["silent_seconds"]
    own = {"pid": os.getpid(), "log": logs}
    try:
        value = warm.call(warm.Task("toyapp.work", asked["function"], (*asked["arguments"],)), run_id=asked["run_id"])
        print(json.dumps({"value": value, "imported_here": "toyapp.work" in sys.modules, **own}), flush=True)
    except Exception as error:
        print(json.dumps({"error": repr(error), "imported_here": "toyapp.work" in sys.modules, **own}), flush=True)


if __name__ == "__main__":
    role, *words = sys.argv[1:]
    {"supernode": supernode, "superexec": superexec, "message": message}[role](*words)
