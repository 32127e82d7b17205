"""Print the tables of docs/RESULTS.md from the runs that experiments/results.sh made.

Usage: python experiments/results_table.py [FOLDER]
"""

import json
import re
import statistics
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

ROWS = {  # suffix of a run's name -> what it is
    "": "federated, residual accumulate",
    "-off": "federated, residual off (FedAvg of the factors)",
    "-frozen": "frozen backbone, no LoRA",
    "-pooled": "pooled, task by task: one client with all data of a task",
    "-joint": "pooled, all data at once",
    "-plain-ridge": "federated, ridge on the features themselves",
    "-frozen-plain-ridge": "frozen, ridge on the features themselves",
}


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/results")
    runs: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for path in sorted(folder.glob("*/metrics.json")):
        runs[re.sub(r"-s\d+$", "", path.parent.name)].append(read(path.parent))
    for preset in ("clinc150", "tiny-imagenet"):
        print(f"\n### {preset}\n")
        print(
            "| run | seeds | ridge F_AA | ridge AIA | forgetting | linear F_AA | residual norm | exactness | minutes |"
        )
        print("|---|---|---|---|---|---|---|---|---|")
        for suffix, words in ROWS.items():
            if found := runs.get(preset + suffix):
                print(f"| {words} | {len(found)} | {' | '.join(spread(found, key, style) for key, style in COLUMNS)} |")


COLUMNS = (
    ("faa", "{:.1f}"), ("aia", "{:.1f}"), ("forgetting", "{:.1f}"), ("linear", "{:.1f}"),
    ("residual_norm", "{:.3f}"), ("exactness", "{:.0e}"), ("minutes", "{:.1f}"),
)  # fmt: skip


def read(run: Path) -> dict[str, Any]:
    metrics = json.loads((run / "metrics.json").read_text())
    lines = [json.loads(text) for text in (run / "rounds.jsonl").read_text().splitlines()]
    linear = lines[-1].get("accuracy_seen_linear")
    errors = [line["exactness_error"] for line in lines if "exactness_error" in line]
    return {
        "faa": 100 * metrics["faa"],
        "aia": 100 * metrics["aia"],
        "forgetting": 100 * metrics["forgetting"],
        "linear": None if linear is None else 100 * linear,
        "residual_norm": lines[-1]["residual_norm"] or None,
        "exactness": max(errors, default=None),
        "minutes": metrics["wall_seconds"] / 60,
    }


def spread(found: list[dict[str, Any]], key: str, style: str) -> str:
    """Give mean and standard deviation over the seeds, or the one value there is."""
    values = [run[key] for run in found if run[key] is not None]
    if not values:
        return "-"
    mean = style.format(statistics.mean(values))
    return f"{mean} ± {style.format(statistics.stdev(values))}" if len(values) > 1 and key != "minutes" else mean


if __name__ == "__main__":
    main()
