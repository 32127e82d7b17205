"""The display of a run follows its files, whatever state it finds them in."""

import io
import json
import os

from rich.console import Console

from fedtalora_flwr.cli.progress import RunProgress


def line_of(server_round: int) -> str:
    """A round as the run folder has it."""
    values = {
        "server_round": server_round,
        "task_id": 0,
        "participants": [0, 1],
        "failures": [],
        "seconds": {"total": 1},
    }
    return json.dumps({**values, "bytes_up": 10, "bytes_down": 20, "mean_loss": 0.5, "accuracy_seen": None}) + "\n"


def test_a_round_is_shown_once_its_line_is_whole(tmp_path):
    rounds, status = tmp_path / "rounds.jsonl", tmp_path / "status.json"
    shown = io.StringIO()
    whole = line_of(2)
    with RunProgress(tmp_path, Console(file=shown)) as progress:
        for looks, text in enumerate([line_of(1), whole[:40], whole[40:-1], "\n"]):
            with rounds.open("a") as file:
                file.write(text)
            status.write_text(json.dumps({"phase": "training", "num_rounds": 7}))
            os.utime(status, (looks, looks))  # it is looked at again when its time has changed
            progress.tick()
            assert ("round 2/7" in shown.getvalue()) == (looks > 1)
    assert shown.getvalue().count("round 1/7") == shown.getvalue().count("round 2/7") == 1
