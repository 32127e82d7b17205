import json
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from fedtalora_flwr.metrics import TaskMatrix
from fedtalora_flwr.report import compare, data_table, figures, print_table, read_run, write_data_page, write_report

HOSTILE = '<script>alert("x")</script>'


def synthetic_run(
    folder: Path,
    *,
    num_tasks: int = 3,
    classes_per_task: int = 2,
    num_clients: int = 4,
    rounds_per_task: int = 3,
    beta: float = 0.5,
    class_names: list[str] | None = None,
    stop_at_round: int | None = None,
    seed: int = 0,
    **config: object,
) -> Path:
    """Write a run folder as a run of this shape would; `stop_at_round` leaves it unfinished."""
    rng = np.random.default_rng(seed)
    num_classes = num_tasks * classes_per_task
    names = class_names or [f"class {c}" for c in range(num_classes)]
    order = rng.permutation(num_classes).tolist()
    tasks = [order[t * classes_per_task : (t + 1) * classes_per_task] for t in range(num_tasks)]
    shares = rng.dirichlet([beta] * num_clients, size=num_classes)
    class_counts = np.stack([rng.multinomial(140 + 10 * (c % 3), shares[c]) for c in range(num_classes)], 1)
    settings = {
        "method": "fedtalora",
        "residual": "accumulate",
        "verify": True,
        "dataset": "digits",
        "data-path": "",
        "num-tasks": num_tasks,
        "partition": "dirichlet",
        "dirichlet-beta": beta,
        "num-clients": num_clients,
        "min-replies": 1,
        "rounds-per-task": rounds_per_task,
        "learning-rate": 0.002,
        "backbone": "vit_mini",
        "lora-targets": "attn+mlp",
        "rank": 4,
        "seed": seed,
        "out": str(folder),
    } | config
    modules = {
        f"blocks.{b}.{m}": s for b in range(6) for m, s in {"attn.qkv": [576, 192], "mlp.fc1": [768, 192]}.items()
    }
    manifest = {
        "fedtalora_version": "0.1.0",
        "versions": {"python": "3.11.9", "torch": "2.15.0", "flwr": "1.39.0"},
        "git_commit": "0123456789abcdef0123456789abcdef01234567",
        "seed": seed,
        "started_at": "2025-11-21T09:30:00+00:00",
        "class_names": names,
        "class_order": order,
        "tasks": tasks,
        "partition_hashes": [f"{seed:02x}{k:062x}" for k in range(num_clients)],
        "partition_hash": f"{seed:064x}",
        "class_counts": class_counts.tolist(),
        "parameters": {"total": 2_713_354, "trainable": 82_186, "transmitted": 82_186, "lora": 80_256},
        "adapted_modules": modules,
    }
    matrix = TaskMatrix.empty(num_tasks)
    rounds = []
    for server_round in range(1, num_tasks * rounds_per_task + 1):
        task_id, within = divmod(server_round - 1, rounds_per_task)
        ends = within == rounds_per_task - 1
        if ends:
            sizes = [30 + 7 * j for j in range(task_id + 1)]
            shape = [0.96 * 0.96 ** (task_id - j) - 0.02 * rng.random() for j in range(task_id + 1)]
            matrix = matrix.with_row(task_id, [round(n * a) for n, a in zip(sizes, shape, strict=True)], sizes)
        wait = 2.5 + rng.random()
        seconds = {"wait": wait, "aggregate": 0.2, "evaluate": 0.9 if ends else 0.0}
        failed = server_round % 7 == 5
        rounds.append(
            {
                "server_round": server_round,
                "task_id": task_id,
                "participants": list(range(num_clients)),
                "failures": [{"partition_id": 1, "reason": f"loss is not finite {HOSTILE}"}] if failed else [],
                "bytes_up": 330_000 * (num_clients - failed),
                "bytes_down": 350_000 * num_clients + 60_000 * task_id,
                "seconds": seconds | {"total": sum(seconds.values()) + 0.15},
                "mean_loss": 0.05 + 1.6 * float(np.exp(-within)) * (1 + 0.1 * rng.random()),
                "residual_norm": 0.3 * float(np.sqrt(server_round)),
                "exactness_error": 0.0 if server_round == 1 else 1e-8 * float(1 + rng.random()),
                "accuracy_seen": matrix.accuracy_seen()[task_id] if ends else None,
            }
        )
    rounds = rounds[:stop_at_round]
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "rounds.jsonl").write_text("".join(json.dumps(line) + "\n" for line in rounds))
    if stop_at_round is None:
        metrics = matrix.summary() | {
            "bytes_up_total": sum(line["bytes_up"] for line in rounds),
            "bytes_down_total": sum(line["bytes_down"] for line in rounds),
            "wall_seconds": sum(line["seconds"]["total"] for line in rounds) + 8,
            "num_rounds": len(rounds),
        }
        (folder / "metrics.json").write_text(json.dumps(metrics, allow_nan=False))
    return folder


def rewrite_last_round(folder: Path, **changes: object) -> None:
    lines = (folder / "rounds.jsonl").read_text().splitlines()
    lines[-1] = json.dumps(json.loads(lines[-1]) | changes)
    (folder / "rounds.jsonl").write_text("\n".join(lines) + "\n")


def with_slots(folder: Path) -> Path:
    """Make it a run whose four clients have a slot for each of three tasks, one in four of them in a wrong cluster."""
    manifest = json.loads((folder / "manifest.json").read_text()) | {"slots": [[0, 1, 2]] * 4}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    slots = [
        {"partition_id": k, "number": task, "cluster": task, "right": k != 1, "x": 10.0 * task, "y": float(k)}
        for k in range(4)
        for task in range(3)
    ]
    rewrite_last_round(folder, slots=slots, cluster_accuracy=0.75)
    return folder


class Page(HTMLParser):
    """Collect what a browser would see: ids, references, elements and text."""

    def __init__(self, html: str):
        super().__init__()
        self.ids: list[str] = []
        self.loads: list[str] = []
        self.tags: set[str] = set()
        self.text = ""
        self.feed(html)
        self.loads += re.findall(r"url\(([^)]*)\)", html) + re.findall(r"@import[^;]*", html)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        for key, value in attrs:
            if key == "id":
                self.ids.append(value)
            if key in ("src", "href", "xlink:href", "data", "srcset", "action"):
                self.loads.append(value)

    def handle_data(self, data):
        self.text += data


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return synthetic_run(tmp_path / "demo")


def report_of(folder: Path) -> tuple[str, Page]:
    html = write_report(folder).read_text(encoding="utf-8")
    return html, Page(html)


def test_a_run_says_what_privacy_it_has_and_what_each_client_has_spent(run):
    assert "Privacy\nNone." in report_of(run)[1].text
    manifest = json.loads((run / "manifest.json").read_text()) | {"privacy": f"epsilon 8 at most {HOSTILE}"}
    (run / "manifest.json").write_text(json.dumps(manifest))
    rewrite_last_round(run, epsilon_spent={"0": 7.987, "10": 3.2})
    html, page = report_of(run)
    assert "Epsilon 8 at most" in page.text and HOSTILE not in html
    assert "client 07.99client 103.20" in page.text and "not of this run" in page.text


def test_a_complete_run_shows_every_section_and_its_numbers(run):
    html, page = report_of(run)
    metrics = json.loads((run / "metrics.json").read_text())
    assert f"{100 * metrics['faa']:.1f} %" in page.text
    assert f"{100 * metrics['forgetting']:.1f}" in page.text
    assert html.count("<svg") == 8
    for words in ("Accuracy on each task", "Exactness error", "Classes by client", "Time of a round"):
        assert words in page.text
    assert "0" * 64 in page.text
    assert "not finished" not in page.text


def test_a_page_loads_nothing_and_its_ids_are_unique(run):
    _, page = report_of(run)
    assert page.loads, "the figures refer to their own shapes"
    assert all(target.startswith("#") for target in page.loads)
    assert {target[1:] for target in page.loads} <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))
    assert "script" not in page.tags


def test_a_report_is_written_the_same_twice_and_leaves_no_other_file(run):
    first = write_report(run).read_bytes()
    assert write_report(run).read_bytes() == first
    names = {file.name for file in run.iterdir()}
    assert names == {"config.json", "manifest.json", "rounds.jsonl", "metrics.json", "report.html"}


def test_every_picture_of_a_report_is_also_written_as_a_file_of_its_own(tmp_path):
    run = with_slots(synthetic_run(tmp_path / "demo"))
    page = write_report(run, pictures=tmp_path / "pictures").read_text(encoding="utf-8")
    files = sorted((tmp_path / "pictures").iterdir())
    assert len(files) == page.count("<svg") == 9
    for file in files:
        assert "fill: #ffffff" in file.read_text() and "', sans-serif" in file.read_text(), file
    clusters = ET.parse(tmp_path / "pictures" / "clusters.svg").getroot()
    words = [text for element in clusters.iter() if (text := (element.text or "").strip())]
    assert {"task 1", "task 3", "in a wrong cluster or none", "round 9: 75.0 %"} <= set(words)


def test_an_unfinished_run_says_so_and_shows_what_its_rounds_hold(tmp_path):
    folder = synthetic_run(tmp_path / "stopped", stop_at_round=4)
    with (folder / "rounds.jsonl").open("a") as file:
        file.write('{"server_round": 5, "task_')
    record = read_run(folder)
    assert record.state == "unfinished"
    assert len(record.accuracy_seen()) == 1, "task 1 is measured, task 2 has only begun"
    assert np.isnan(record.metric("forgetting"))
    _, page = report_of(folder)
    assert "This run is not finished. The numbers" in page.text
    assert "stopped after round 4 of 9" in page.text
    assert "cut off" in page.text
    assert "Training loss" in page.text


@pytest.mark.parametrize(
    ("manifest", "config", "planned"),
    [
        ({"num_rounds": 6}, {}, 6),
        ({}, {"stop-after-task": 2}, 6),
        ({}, {"rounds-per-task": 0}, 3),
        ({"slots": [[0, 1, 2]] * 4}, {}, 3),
    ],
)
def test_a_stopped_run_says_how_many_rounds_it_was_to_have_also_one_of_an_earlier_version(
    tmp_path, manifest, config, planned
):
    folder = synthetic_run(tmp_path / "stopped", stop_at_round=2, **config)
    file = folder / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | manifest))
    record = read_run(folder)
    assert record.num_rounds == planned
    assert f"the run stopped after round 2 of {planned}," in record.notes[0]


def test_accuracy_in_the_middle_of_a_task_is_not_yet_that_tasks(tmp_path):
    folder = synthetic_run(tmp_path / "stopped", stop_at_round=5)
    rewrite_last_round(folder, accuracy_seen=0.123)
    assert len(read_run(folder).accuracy_seen()) == 1


def test_a_run_whose_last_round_got_too_few_updates_is_called_failed(tmp_path):
    folder = synthetic_run(tmp_path / "broken", stop_at_round=4, **{"min-replies": 4})
    reason = "CUDA out of memory\n& more"
    rewrite_last_round(folder, failures=[{"partition_id": 2, "reason": reason}])
    _, page = report_of(folder)
    assert "This run failed." in page.text
    assert "Round 4 got 3 good updates, fewer than min-replies = 4" in page.text
    assert reason in page.text


def test_a_run_that_recorded_its_own_failure_shows_the_reason(tmp_path):
    folder = synthetic_run(tmp_path / "broken", stop_at_round=4)
    status = {"phase": "failed", "message": f"node 3 left {HOSTILE}"}
    (folder / "status.json").write_text(json.dumps(status))
    assert read_run(folder).state == "failed"
    html, page = report_of(folder)
    assert status["message"] in page.text
    assert "<script" not in html


def test_a_run_that_stopped_before_its_first_round_still_has_a_report(tmp_path):
    folder = synthetic_run(tmp_path / "early", stop_at_round=0)
    (folder / "manifest.json").unlink()
    (folder / "rounds.jsonl").unlink()
    html, page = report_of(folder)
    assert "No round was recorded" in page.text
    assert "manifest.json is missing" in page.text
    assert "<svg" not in html


def test_a_run_that_ended_early_by_its_settings_shows_the_tasks_it_measured(run):
    metrics = json.loads((run / "metrics.json").read_text())
    metrics["accuracy_matrix"][2] = [None] * 3
    metrics["accuracy_seen"][2] = None
    (run / "metrics.json").write_text(json.dumps(metrics))
    assert len(read_run(run).accuracy_seen()) == 2
    _, page = report_of(run)
    assert "after task 2 of 3" in page.text


def test_a_round_done_again_after_a_restart_counts_once(run):
    lines = (run / "rounds.jsonl").read_text().splitlines()
    again = json.dumps(json.loads(lines[4]) | {"mean_loss": 77.0})
    (run / "rounds.jsonl").write_text("\n".join([*lines[:5], again, *lines[5:]]) + "\n")
    record = read_run(run)
    assert [line["server_round"] for line in record.rounds] == list(range(1, 10))
    assert record.rounds[4]["mean_loss"] == 77.0


def test_text_from_other_machines_is_escaped(tmp_path):
    names = [HOSTILE, "a & b", "$x_1$ \x07 bell", "日本語", "']]>", "x" * 300]
    folder = synthetic_run(tmp_path / "hostile", class_names=names, **{"data-path": HOSTILE})
    html, page = report_of(folder)
    assert "<script" not in html
    assert "&lt;script&gt;" in html
    assert "script" not in page.tags
    assert "loss is not finite <script>" in page.text
    page = write_data_page(
        tmp_path / "data.html", class_counts=np.ones((2, 6)), tasks=[[0, 1, 2], [3, 4, 5]], class_names=names
    )
    assert "<script" not in page.read_text(encoding="utf-8")


def test_no_client_failed_is_said(tmp_path):
    _, page = report_of(synthetic_run(tmp_path / "small", num_tasks=1, rounds_per_task=2))
    assert "No client failed in any of the 2 rounds." in page.text


def test_the_command_gives_every_setting_but_those_of_the_place(run):
    config = json.loads((run / "config.json").read_text()) | {"data-path": "/d/" + "x" * 90, "note": "it's"}
    (run / "config.json").write_text(json.dumps(config))
    _, page = report_of(run)
    command = page.text[page.text.index("fedtalora run") :]
    assert "--set rank=4" in command
    assert "--set verify=true" in command
    assert "--set lora-targets=attn+mlp" in command
    assert """--set 'note=it'"'"'s'""" in command
    assert "--set out=" not in command
    assert "see config.json: data-path" in command


def test_a_missing_number_leaves_a_gap_and_not_an_error(run):
    (run / "rounds.jsonl").write_text('{"server_round": 1, "task_id": 0, "mean_loss": NaN}\n')
    _, page = report_of(run)
    assert "Training loss" not in page.text


@pytest.mark.parametrize(
    ("file", "content", "error", "message"),
    [
        ("config.json", None, FileNotFoundError, "config.json is missing"),
        ("config.json", "{", ValueError, "config.json is not JSON"),
        ("manifest.json", "[]", ValueError, "must hold a JSON object, got list"),
    ],
)
def test_what_is_no_run_folder_is_refused_by_name(run, file, content, error, message):
    (run / file).unlink()
    if content is not None:
        (run / file).write_text(content)
    with pytest.raises(error, match=message):
        read_run(run)


def test_a_path_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such directory"):
        write_report(tmp_path / "nothing")


def printed(what: object) -> str:
    console = Console(record=True, width=140, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
    if hasattr(what, "rounds"):
        print_table(what, console)
    else:
        console.print(what)
    return console.export_text()


def test_the_table_of_a_run_holds_its_matrix_and_headline_numbers(run):
    text = printed(read_run(run))
    assert "T3" in text
    for label in ("FAA", "AIA", "forgetting", "bytes up", "time"):
        assert label in text


def test_the_table_of_an_unfinished_run_says_so(tmp_path):
    text = printed(read_run(synthetic_run(tmp_path / "stopped", stop_at_round=4)))
    assert "unfinished" in text
    assert "stopped after round 4 of 9" in text


def test_compare_shows_the_settings_that_differ_and_only_those(tmp_path):
    a = synthetic_run(tmp_path / "a")
    b = synthetic_run(tmp_path / "b", residual="off")
    out = tmp_path / "pages" / "compare.html"
    comparison = compare([a, b], out=out)
    assert comparison.differing == (("residual", ("accumulate", "off")),)
    text = printed(comparison.table())
    assert "residual" in text
    assert "learning-rate" not in text
    page = Page(out.read_text(encoding="utf-8"))
    assert "residual" in page.text
    assert all(target.startswith("#") for target in page.loads)


def test_compare_refuses_runs_whose_clients_held_other_data(tmp_path):
    paths = [synthetic_run(tmp_path / name, seed=seed) for name, seed in (("one", 1), ("two", 2))]
    with pytest.raises(ValueError, match=r"(?s)one: .*two: .*--allow-different-partitions"):
        compare(paths, out=tmp_path / "no.html")
    assert not (tmp_path / "no.html").exists()
    notes = compare(paths, allow_different_partitions=True).notes
    assert "did not hold the same data" in notes[0]


def test_compare_refuses_runs_that_do_not_say_what_their_clients_held(tmp_path):
    paths = [synthetic_run(tmp_path / name) for name in ("one", "two")]
    (paths[1] / "manifest.json").unlink()
    with pytest.raises(ValueError, match="two: no partition hash"):
        compare(paths)


def test_compare_tells_runs_of_one_name_apart_and_needs_two(tmp_path):
    paths = [synthetic_run(tmp_path / name / "run") for name in ("x", "y")]
    assert compare(paths).names == ("x/run", "y/run")
    with pytest.raises(ValueError, match="two run folders or more, got 1"):
        compare(paths[:1])
    with pytest.raises(ValueError, match="more than once"):
        compare([paths[0], paths[0]])


def test_the_best_of_a_column_is_sought_among_complete_runs(tmp_path):
    complete = [synthetic_run(tmp_path / "a"), synthetic_run(tmp_path / "b")]
    stopped = synthetic_run(tmp_path / "c", stop_at_round=1)
    metrics = json.loads((complete[1] / "metrics.json").read_text())
    (complete[1] / "metrics.json").write_text(json.dumps(metrics | {"faa": 0.99, "bytes_up_total": 10**9}))
    rows = compare([*complete, stopped]).results()
    assert [row["cells"][0]["best"] for row in rows] == [False, True, False]
    assert [row["cells"][3]["best"] for row in rows] == [True, False, False]
    assert not any(row["cells"][1]["best"] for row in rows), "a tie has no best"
    assert rows[2]["name"] == "c (unfinished)"


COUNTS = np.array([[5, 0, 7], [0, 0, 11]])
TASKS = [[2], [0, 1]]


def test_the_data_table_counts_examples_and_classes_of_each_task():
    lines = printed(data_table(COUNTS, tasks=TASKS)).splitlines()
    first = next(line for line in lines if "7 (1)" in line)
    assert "5 (1)" in first
    assert "12 (2)" in first
    second = next(line for line in lines if "11 (1)" in line)
    assert "·" in second


@pytest.mark.parametrize("ending", ["html", "png", "svg"])
def test_the_map_of_classes_is_written_as_its_ending_says(tmp_path, ending):
    target = tmp_path / "deep" / f"map.{ending}"
    write_data_page(
        target,
        class_counts=COUNTS,
        tasks=TASKS,
        class_names=["cat", "dog", "elk"],
        partition_hashes=["aa", "bb"],
    )
    starts = {"html": b"<!DOCTYPE html>", "png": b"\x89PNG", "svg": b"<?xml"}
    assert target.read_bytes().startswith(starts[ending])


def test_the_map_of_classes_refuses_another_ending(tmp_path):
    with pytest.raises(ValueError, match=r"\.html, \.png or \.svg, got 'map\.pdf'"):
        write_data_page(tmp_path / "map.pdf", class_counts=COUNTS, tasks=TASKS, class_names=["a", "b", "c"])


@pytest.mark.parametrize(
    ("num_clients", "num_tasks", "classes", "shown"),
    [(5, 5, 2, True), (10, 10, 15, True), (30, 10, 100, False), (5, 1, 200, False), (200, 10, 2, True)],
)
def test_the_map_of_classes_goes_over_to_tasks_where_classes_have_no_room(num_clients, num_tasks, classes, shown):
    tasks = np.arange(num_tasks * classes).reshape(num_tasks, classes).tolist()
    counts = np.ones((num_clients, num_tasks * classes))
    assert figures.shows_classes(counts, tasks=tasks) is shown


def test_a_figure_is_well_formed_and_holds_its_text_as_text():
    figure = figures.class_map(COUNTS, tasks=TASKS, class_names=["cat", "<dog>", "elk"])
    root = ET.fromstring(figures.to_svg(figure, name="map", title="a title"))
    texts = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"cat", "<dog>", "elk", "11", "client 1", "task 2"} <= set(texts)
    assert root.get("aria-label") == "a title"


@pytest.mark.parametrize("error", [[0.0, 0.0], [np.nan, 0.0], [1e-9, 3e-2], [5.0, 5.0]])
def test_exactness_error_has_a_scale_whatever_the_errors_are(error):
    figure = figures.exactness_error(error, rounds=[1, 2], task_ids=[0, 1])
    assert "exactness error" in figures.to_svg(figure, name="e", title="t")


def shapes_with_tips(svg: str) -> list[str]:
    root = ET.fromstring(svg)
    return [title.text or "" for title in root.iter("{http://www.w3.org/2000/svg}title")]


def test_cells_points_and_bars_say_what_they_are_where_a_pointer_rests(tmp_path):
    matrix = figures.accuracy_matrix([[0.5, np.nan], [0.25, 1.0]])
    told = shapes_with_tips(figures.to_svg(matrix, name="m", title="t"))
    assert told == ["task 1 after task 1: 50.00 %", "not measured", "task 1 after task 2: 25.00 %", *told[3:]]
    loss = figures.loss([0.5, np.nan, 0.125], rounds=[1, 2, 3], task_ids=[0, 0, 0])
    assert shapes_with_tips(figures.to_svg(loss, name="l", title="t")) == ["round 1: 0.5", "round 3: 0.125"]
    held = figures.class_map(COUNTS, tasks=TASKS, class_names=["cat", HOSTILE, "elk"])
    assert any(HOSTILE in tip for tip in shapes_with_tips(figures.to_svg(held, name="c", title="t")))
    figures.to_file(matrix, tmp_path / "matrix.svg", "svg")
    assert shapes_with_tips((tmp_path / "matrix.svg").read_text()) == told


def test_a_picture_takes_ground_and_text_from_its_page_and_alone_stands_on_white(tmp_path):
    figure = figures.accuracy_over_tasks({"a": [0.9, 0.8]}, num_tasks=2)
    inside = figures.to_svg(figure, name="a", title="t")
    assert "var(--paper)" in inside and "var(--ink)" in inside and "#ffffff" not in inside and "#222222" not in inside
    figures.to_file(figure, tmp_path / "a.svg", "svg")
    alone = (tmp_path / "a.svg").read_text()
    assert "#ffffff" in alone and "var(" not in alone


def test_text_on_a_tone_keeps_its_colour_on_a_dark_page():
    svg = figures.to_svg(figures.accuracy_matrix([[0.99]]), name="m", title="t")
    (text,) = (one for one in ET.fromstring(svg).iter("{http://www.w3.org/2000/svg}text") if one.text == "99.0")
    assert "#fdfdfd" in text.attrib["style"].lower()


def test_a_page_has_a_style_for_dark_screens_and_every_colour_that_its_pictures_ask_for(run):
    html, _ = report_of(run)
    dark = re.search(r"@media screen and \(prefers-color-scheme: dark\) \{\s*:root \{([^}]*)\}", html)
    asked = set(re.findall(r"var\((--[\w-]+)\)", html))
    assert dark and asked <= set(re.findall(r"(--[\w-]+):", dark[1]))


def test_an_axis_shows_the_part_of_the_scale_where_the_runs_are():
    close = {"a": [0.95, 0.94, 0.93], "b": [0.96, 0.95, 0.94]}
    low, high = figures.accuracy_over_tasks(close, num_tasks=3).axes[0].get_ylim()
    assert low > 0.85 and high < 1.01 and low < 0.93 and high > 0.96
    low, high = figures.accuracy_over_tasks({"a": [0.05, 0.99]}, num_tasks=2).axes[0].get_ylim()
    assert low == 0 and high >= 1
    assert figures.accuracy_over_tasks({"a": [np.nan]}, num_tasks=2).axes[0].get_ylim() == (0, 1)


def test_settings_of_this_run_stand_before_those_at_their_defaults(tmp_path):
    _, page = report_of(synthetic_run(tmp_path / "run", rank=5))
    before, _, after = page.text.partition("At their defaults")
    assert "rank5" in re.sub(r"\s", "", before.partition("Set for this run")[2])
    assert re.sub(r"\s", "", after).find("methodfedtalora") > 0
