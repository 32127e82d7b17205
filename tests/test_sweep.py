"""A sweep: which runs a file asks for, what their table says, and how they are played."""

import csv
import json
import math
import os
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from pathlib import Path

import psutil
import pytest

from fedtalora_flwr.config import ConfigError
from fedtalora_flwr.config.sources import app_folder, sweeps
from fedtalora_flwr.launch.sweep import narrowed, read_plan, side_by_side
from fedtalora_flwr.report import figures, study, write_study

APP = app_folder()
GRID = """# What is asked. Two minutes.
# And more of it.
seeds = [3, 1]
[settings]
rank = 2
[grid]
residual = ["accumulate", "off"]
[grid.data]
alpha-2 = { partition = "quantity", classes-per-client = 2 }
"beta 0.1" = { partition = "dirichlet", dirichlet-beta = 0.1 }
"""


def plan_of(folder: Path, text: str, *assignments: str):
    (folder / "made.toml").write_text(text)
    return read_plan(APP, folder / "made.toml", assignments=assignments)


def test_every_combination_of_the_axes_is_run_once_a_seed(tmp_path):
    plan = plan_of(tmp_path, GRID)
    assert plan.about == "What is asked. Two minutes. And more of it."
    assert plan.axes == {"residual": ("accumulate", "off"), "data": ("alpha-2", "beta 0.1")}
    assert [run.name for run in plan.runs] == [
        f"residual-{residual}_{data}_seed-{seed}"
        for residual in ("accumulate", "off")
        for data in ("alpha-2", "beta-0.1")
        for seed in (3, 1)
    ]
    last = plan.runs[-1]
    assert last.labels == ("off", "beta 0.1")
    config = last.config
    assert (config.residual, config.partition, config.dirichlet_beta) == ("off", "dirichlet", 0.1)
    assert (config.seed, config.rank, config.num_tasks) == (1, 2, 5)


def test_only_the_runs_with_the_given_values_are_kept(tmp_path):
    plan = narrowed(plan_of(tmp_path, GRID), ["residual=off", "data=beta 0.1", "data=alpha-2"])
    assert plan.axes == {"residual": ("off",), "data": ("alpha-2", "beta 0.1")}
    assert [run.labels for run in plan.runs] == [("off", "alpha-2")] * 2 + [("off", "beta 0.1")] * 2
    for wrong, message in {
        "rank=2": "no axis 'rank'; it has residual, data",
        "data=x": "no 'x'; it has alpha-2",
    }.items():
        with pytest.raises(ConfigError, match=message):
            narrowed(plan, [wrong])


def test_a_sweep_takes_a_preset_and_assignments_win_over_all_of_its_runs(tmp_path):
    plan = plan_of(tmp_path, 'preset = "clinc150"\n[settings]\nrank = 2\n[grid]\nseed = [5]', "rank=3")
    (run,) = plan.runs
    assert (run.name, run.config.dataset, run.config.rank, run.config.seed) == ("seed-5", "clinc150", 3, 5)


def test_a_sweep_takes_a_file_beside_it(tmp_path):
    (tmp_path / "base.toml").write_text("rank = 7")
    (run,) = plan_of(tmp_path, 'config = "base.toml"').runs
    assert (run.name, run.config.rank) == ("run", 7)


@pytest.mark.parametrize(
    ("text", "assignments", "error"),
    [
        ("rank = 3", (), "a sweep knows no 'rank'.*settings go in"),
        ("[settings]\nrnk = 3", (), "run run: unknown setting 'rnk'; did you mean rank"),
        ("[grid]\nrank = 3", (), "axis 'rank' must be a list of values"),
        ("[grid]\nrank = [4, 0]", (), "run rank-0: rank must be at least 1, got 0"),
        ("[grid]\nrank = [4, 2]", ("rank=3",), "--set rank would undo the axis 'rank'"),
        ("seeds = [1, 2]", ("seed=3",), "--set seed would undo the axis 'seeds'"),
        ("[grid]\nrank = [4, 2]\n[grid.size]\nsmall = {rank = 1}", (), "'rank' and 'size' both set rank"),
        ("seeds = [1, 2]\n[grid]\nseed = [3]", (), "'seed' and 'seeds' both set seed"),
        ('compare = "head"\n[grid]\nrank = [4, 2]', (), "compare = 'head' names no axis; there are: rank"),
        ("seeds = [1, 1]", (), "seeds must be a list of different whole numbers"),
        ('engine = "dask"', (), "engine must be one of ray, process, got 'dask'"),
        ("jobs = -1", (), "jobs must be a whole number"),
        ("[grid.a]\n'x y' = {rank = 1}\nx-y = {rank = 2}", (), "two runs would share the folder x-y"),
        ("[grid", (), "made.toml: "),
        ("seeds = [[1], [2]]", (), "seeds must be a list of different whole numbers"),
        ("grid = [1, 2]", (), r"made.toml: grid must be a table, \[grid\] with a line for each entry, got \[1, 2\]"),
        ("[[settings]]\nrank = 3", (), r"made.toml: settings must be a table"),
        ("[grid]\nrank = [4, 2, 4]", (), "axis 'rank' has 4 twice"),
        ("[grid.a]\n'..' = {rank = 1}", (), "a run cannot have the folder .."),
        ("[grid.a]\nset-aside = {rank = 1}", (), "a run cannot have the folder set-aside"),
    ],
)
def test_a_sweep_that_cannot_be_is_refused_before_its_first_run(tmp_path, text, assignments, error):
    with pytest.raises(ConfigError, match=error):
        plan_of(tmp_path, text, *assignments)


def test_runs_side_by_side_are_as_many_as_the_cores_carry(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr("fedtalora_flwr.launch.sweep.play._available_bytes", lambda: 2**40)
    assert side_by_side(plan_of(tmp_path, "seeds = [1, 2, 3]")) == 3
    assert side_by_side(plan_of(tmp_path, "seeds = [1, 2, 3]\n[settings]\nthreads = 4")) == 2
    assert side_by_side(plan_of(tmp_path, 'seeds = [1, 2, 3]\nengine = "ray"')) == 1  # five clients a run
    assert side_by_side(plan_of(tmp_path, "seeds = [1, 2, 3]\njobs = 7")) == 7
    monkeypatch.setattr("fedtalora_flwr.launch.sweep.play._available_bytes", lambda: 5 * 2**30)
    assert side_by_side(plan_of(tmp_path, "seeds = [1, 2, 3]")) == 2


@pytest.mark.parametrize("name", sweeps(APP))
def test_every_sweep_that_ships_parses_and_says_how_long_it_takes(name):
    plan = read_plan(APP, sweeps(APP)[name])
    assert "minutes" in plan.about
    assert len({run.config for run in plan.runs}) == len(plan.runs)


# --- What a sweep came to


def made_run(folder: Path, *, faa: float, partition: str = "p", exactness: float = 1e-8) -> Path:
    folder.mkdir(parents=True)
    line = {"server_round": 1, "task_id": 0, "residual_norm": 0.5, "exactness_error": exactness}
    metrics = {"faa": faa, "aia": 0.5, "forgetting": 0.0, "accuracy_seen": [0.5, faa], "bytes_up_total": 2000}
    files = {"config": {}, "manifest": {"partition_hash": partition, "git_commit": "c0ffee"}, "metrics": metrics}
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    (folder / "rounds.jsonl").write_text(json.dumps(line))
    return folder


def with_rounds(folder: Path, *lines: dict[str, float]) -> Path:
    rounds = [{"server_round": number, "task_id": 0, **line} for number, line in enumerate(lines, start=1)]
    (folder / "rounds.jsonl").write_text("\n".join(map(json.dumps, rounds)))
    return folder


@pytest.fixture
def made_study(tmp_path):
    runs = {
        ("x", "off"): {0: made_run(tmp_path / "a", faa=0.5), 1: made_run(tmp_path / "b", faa=0.7, exactness=3e-8)},
        ("y", "off"): {0: made_run(tmp_path / "e", faa=0.9)},
        ("x", "on"): {0: made_run(tmp_path / "c", faa=0.52), 1: made_run(tmp_path / "d", faa=0.76)},
        ("y", "on"): {0: made_run(tmp_path / "f", faa=0.2, partition="q")},
        ("z", "on"): {},
    }
    return study("made", about="Why.", axes=["d|t", "r"], compare=1, cases=runs, failures={"z_on": "no [b]memory[/b]"})


def columns(found) -> list[dict[str, str]]:
    return [dict(zip(found.header(), row, strict=True)) for row in found.rows()]


def test_the_table_has_mean_and_spread_over_the_seeds_and_the_worst_exactness(made_study):
    first, *_ = columns(made_study)
    assert (first["seeds"], first["FAA (%)"], first["exactness error"]) == ("2", "60.0 ± 14.1", "3e-08")
    assert first["bytes up"] == "2.0 kB" and "bytes down" not in first


def test_clusters_are_judged_by_the_last_round_and_the_least_after_the_first_in_table_and_csv(tmp_path):
    lines = [{"cluster_accuracy": a, "residual_norm": n} for a, n in ((0.1, 0.2), (0.7, 3.0), (0.9, 0.5), (0.8, 1.5))]
    lines[-1] |= {"routing_accuracy": 0.6, "accuracy_routed": 0.4}
    clustered = with_rounds(made_run(tmp_path / "a", faa=0.5), *lines)
    plain = made_run(tmp_path / "b", faa=0.7)
    runs = {("fl-tac",): {0: clustered}, ("fedit",): {0: plain}}
    found = study("made", about="", axes=["method"], compare=0, cases=runs, failures={})
    first, second = columns(found)
    labels = (
        *("slots in the cluster of their task (%)", "the least of it from round 2 on (%)"),
        *("inputs sent to the cluster of their task (%)", "FAA, task not known (%)", "largest residual norm"),
    )
    assert [first[label] for label in labels] == ["80.0", "70.0", "60.0", "40.0", "3"]
    assert [second[label] for label in labels] == ["–", "–", "–", "–", "0.5"]
    write_study(found, tmp_path / "out")
    for name, mark in {"runs.csv": "", "results.csv": "_mean"}.items():
        clusters, other = csv.DictReader((tmp_path / "out" / name).read_text().splitlines())
        read = {key: clusters[key + mark] for key in ("cluster_accuracy", "cluster_accuracy_least", "accuracy_routed")}
        assert read == {"cluster_accuracy": "0.8", "cluster_accuracy_least": "0.7", "accuracy_routed": "0.4"}
        assert (clusters["residual_norm" + mark], clusters["residual_norm_largest" + mark]) == ("1.5", "3.0")
        assert other["routing_accuracy" + mark] == ""


def test_a_table_without_clusters_has_no_column_for_them(made_study):
    assert not [label for label in made_study.header() if "cluster" in label or "not known" in label]


def test_gains_are_taken_seed_by_seed_and_only_on_the_same_partitions(made_study):
    key = "FAA against the first r"
    assert [row[key] for row in columns(made_study)] == ["–", "+4.00 ± 2.83", "–", "–"]
    assert made_study.gains(made_study.cases[1]) == pytest.approx([0.02, 0.06])


def test_runs_that_do_not_say_what_their_clients_hold_are_not_compared(tmp_path):
    runs = {(r,): {0: made_run(tmp_path / r, faa=faa)} for r, faa in (("off", 0.5), ("on", 0.7))}
    for name in ("off", "on"):
        manifest = tmp_path / name / "manifest.json"
        facts = {key: fact for key, fact in json.loads(manifest.read_text()).items() if key != "partition_hash"}
        manifest.write_text(json.dumps(facts))
    found = study("made", about="", axes=["r"], compare=0, cases=runs, failures={})
    assert [row["FAA against the first r"] for row in columns(found)] == ["–", "–"]


def test_nothing_is_compared_where_the_first_value_has_no_finished_run(tmp_path):
    runs = {
        ("accumulate",): {},
        ("replace",): {0: made_run(tmp_path / "a", faa=0.5)},
        ("off",): {0: made_run(tmp_path / "b", faa=0.7)},
    }
    found = study("made", about="", axes=["residual"], compare=0, cases=runs, failures={})
    assert [row["FAA against the first residual"] for row in columns(found)] == ["–", "–"]


def test_a_study_is_written_as_markdown_csv_and_a_page_that_needs_no_network(made_study, tmp_path):
    page = write_study(made_study, tmp_path / "out").read_text()
    assert page.count("<svg") == 3 and "no [b]memory[/b]" in page and "http://" not in page.replace("http://www.w3", "")
    main, _, rest = page.partition("All numbers")
    assert "FAA (%)" in main and "bytes up" not in main and "bytes up" in rest
    markdown = (tmp_path / "out" / "results.md").read_text()
    assert "| d\\|t | r |" in markdown and "- z_on failed: no [b]memory[/b]" in markdown
    cases = (tmp_path / "out" / "results.csv").read_text().splitlines()
    header, row = cases[0].split(","), cases[1].split(",")
    values = dict(zip(header, row, strict=True))
    assert float(values["faa_mean"]) == pytest.approx(0.6)
    assert float(values["faa_std"]) == pytest.approx(0.2 / math.sqrt(2))
    assert len((tmp_path / "out" / "runs.csv").read_text().splitlines()) == 7


def test_the_plot_is_a_file_of_its_own_on_white_ground_in_a_font_that_every_reader_has(made_study, tmp_path):
    write_study(made_study, tmp_path / "out")
    file = tmp_path / "out" / "cases.svg"
    picture = ET.parse(file).getroot()
    assert float(picture.attrib["width"].removesuffix("pt")) == pytest.approx(792)
    ground = next(element for element in picture.iter() if element.get("id") == "patch_1")[0]
    assert "fill: #ffffff" in ground.attrib["style"]
    words = {
        element.text: element.attrib["style"]
        for element in picture.iter()
        if "font-family:" in element.get("style", "")
    }
    assert {"FAA (%)", "forgetting (points)", "x · on"} <= words.keys()
    assert all("', sans-serif" in style for style in words.values())
    assert file.stat().st_size < 200_000


def test_each_data_set_has_its_own_scale_and_compared_cases_stand_together():
    means = {("clinc150", "a"): (95, 93), ("clinc150", "b"): (94, 96), ("tiny-imagenet", "a"): (27, 26)}
    rows = [
        figures.CaseRow(name=f"{data} {group} {index}", block=data, group=group, values=[(mean, 1.0), (2.0, math.nan)])
        for (data, group), pair in means.items()
        for index, mean in enumerate(pair)
    ]
    first, second, below, _ = figures.cases(rows, ["FAA (%)", "forgetting"]).axes
    assert first.get_xlim()[0] > 90 and below.get_xlim()[1] < 30
    one, two, three, four = first.get_yticks()
    assert two - one == four - three < three - two
    assert [label.get_text() for label in below.get_yticklabels()] == ["tiny-imagenet a 0", "tiny-imagenet a 1"]
    assert (first.get_xlabel(), below.get_xlabel()) == ("", "FAA (%)") and second.get_xlim()[0] < 2


# --- Real runs


SMALL = """# Does a wrong layer stop the other run? Seconds.
[settings]
num-tasks = 2
max-per-class = 6
num-clients = 3
partition = "iid"
rounds-per-task = 2
ridge-features = 30
device = "cpu"
[grid]
lora-blocks = ["last:1", "4-9"]
"""


def start(file: Path, out: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [Path(sys.executable).parent / "fedtalora", "sweep", file, "--out", out, *arguments]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=subprocess.STDOUT, text=True, start_new_session=True)


def swept(file: Path, out: Path, *arguments: str) -> tuple[int, str]:
    process = start(file, out, *arguments)
    output, _ = process.communicate(timeout=300)
    return process.returncode, output


def result(run: Path) -> dict[str, object]:
    values: dict[str, object] = json.loads((run / "metrics.json").read_text())
    del values["wall_seconds"], values["bytes_down_total"]  # who was stopped after a round's end has its base already
    return values


def test_a_failed_run_stops_no_other_and_finished_ones_are_left_alone_until_their_settings_change(tmp_path):
    file, out = tmp_path / "small.toml", tmp_path / "out"
    file.write_text(SMALL)
    status, output = swept(file, out)
    good, bad = out / "lora-blocks-last-1", out / "lora-blocks-4-9"
    assert status == 1, output
    assert "1 of 2 runs failed" in output and "4-9 is out of range" in output
    assert not (bad / "metrics.json").exists() and (out / "index.html").is_file()
    written = (good / "metrics.json").stat().st_mtime_ns
    file.write_text(SMALL.replace('"4-9"', '"first:1"'))
    status, output = swept(file, out, "--jobs", "1")
    assert status == 0, output
    assert "2 runs, 1 finished before" in output
    assert (good / "metrics.json").stat().st_mtime_ns == written
    assert swept(file, out, "--dry-run")[1].count("  finished") == 2
    changed = swept(file, out, "--dry-run", "--set", "rank=3")[1]
    assert changed.count("  finished") == 0 and changed.count("other settings, to be set aside") == 2
    table = (out / "results.md").read_text()
    assert swept(file, out, "--only", "lora-blocks=first:1")[0] == 0
    assert (out / "results.md").read_text() == table  # of the whole sweep, not of what was played
    (out / "lora-blocks-last-1" / "manifest.json").write_text("{")
    status, output = swept(file, out, "--only", "lora-blocks=first:1")
    assert status == 0 and "left out, as they cannot be read: lora-blocks-last-1" in output
    (bad.parent / "lora-blocks-first-1" / "config.json").write_text("{")  # cut off
    (good / "metrics.json").unlink()
    assert [line.split("  ")[1] for line in swept(file, out, "--dry-run")[1].splitlines()] == [
        "stopped",
        "other settings, to be set aside",
    ]


def test_a_run_whose_folder_cannot_be_made_stops_no_other(tmp_path):
    file, out = tmp_path / "small.toml", tmp_path / "out"
    file.write_text(SMALL.replace('"4-9"', '"first:1"').replace("num-tasks = 2", "num-tasks = 2\nstop-after-task = 1"))
    out.mkdir()
    (out / "lora-blocks-last-1").write_text("a file where a folder should be")
    status, output = swept(file, out)
    assert status == 1 and "1 of 2 runs failed" in output and "lora-blocks-last-1: " in output, output
    assert (out / "lora-blocks-first-1" / "metrics.json").is_file()


def wait_until(condition, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.05)
    return False


@pytest.mark.full
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_sweep_that_is_stopped_leaves_no_process_and_goes_on_to_the_same_numbers(tmp_path, number):
    file = tmp_path / "small.toml"
    file.write_text(SMALL.replace('"4-9"', '"first:1"').replace("num-tasks = 2", "num-tasks = 5"))
    out = tmp_path / "out"
    process = start(file, out)
    rounds = out / "lora-blocks-last-1" / "rounds.jsonl"
    assert wait_until(lambda: rounds.exists() and rounds.read_text().count("\n") >= 2, 300)
    family = psutil.Process(process.pid).children(recursive=True)
    assert len(family) >= 2
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -9}[number], output
    assert wait_until(lambda: not any(p.is_running() and p.status() != "zombie" for p in family), 30)
    assert not (out / "lora-blocks-last-1" / "metrics.json").exists()
    status, output = swept(file, out)
    assert status == 0 and "lora-blocks-last-1 goes on" in output, output
    status, _ = swept(file, tmp_path / "undisturbed")
    assert status == 0
    for name in ("lora-blocks-last-1", "lora-blocks-first-1"):
        assert result(out / name) == result(tmp_path / "undisturbed" / name)
