"""What the command line does before and without a run: help, settings, errors and their exit status."""

import json
import os
import socket
import subprocess
import sys
import tomllib
import weakref
from importlib.metadata import version

import pytest
import typer

from fedtalora_flwr.cli import app, run
from fedtalora_flwr.config import RunConfig
from fedtalora_flwr.config.sources import app_folder, defaults, presets
from fedtalora_flwr.inference.predict import Prediction
from fedtalora_flwr.run_folder import names

COMMANDS = ("run", "sweep", "report", "compare", "export", "predict", "evaluate", "serve", "data", "presets", "doctor")
SLOW_LIBRARIES = ("torch", "numpy", "flwr", "ray", "timm", "peft", "transformers", "datasets", "matplotlib")


@pytest.fixture
def fedtalora(monkeypatch, capsys, tmp_path):
    """Run the command in an empty folder; gives exit status, output and errors with blanks as they are."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.delenv("FEDTALORA_DATA", raising=False)

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["fedtalora", *arguments])
        with pytest.raises(SystemExit) as ended:
            app.main()
        captured = capsys.readouterr()
        return int(ended.value.code or 0), captured.out, captured.err

    return call


def make_run(folder, **files):
    folder.mkdir()
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return str(folder)


def test_help_lists_every_command_and_exits_with_0(fedtalora):
    status, out, _ = fedtalora("--help")
    assert status == 0
    assert all(f" {command} " in out for command in COMMANDS)


@pytest.mark.parametrize(
    "arguments",
    [
        *(["--help"], ["run", "--help"], ["sweep", "--help"], ["export", "--help"], ["predict", "--help"]),
        *(["serve", "--help"], ["run", "--list-settings"], ["presets"]),
    ],
)
def test_quick_commands_import_no_slow_library(arguments):
    code = (
        f"import sys; sys.argv = ['fedtalora', *{arguments}]\n"
        "from fedtalora_flwr.cli.app import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        f"loaded = [name for name in {SLOW_LIBRARIES} if name in sys.modules]\n"
        "assert not loaded, loaded"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=60)


def test_the_version_is_printed(fedtalora):
    assert fedtalora("--version")[:2] == (0, f"fedtalora {version('fedtalora')}\n")


def test_an_unknown_command_and_an_unknown_option_exit_with_2(fedtalora):
    assert fedtalora("trian")[0] == 2
    assert fedtalora("run", "--rank", "3")[0] == 2


def test_list_settings_prints_every_setting_with_its_default(fedtalora):
    status, out, _ = fedtalora("run", "--list-settings")
    assert status == 0
    assert tomllib.loads(out) == defaults(app_folder())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "learning-rat=0.1"], "unknown setting 'learning-rat'; did you mean learning-rate?"),
        (["--set", "rank"], "--set takes key=value, got 'rank'"),
        (["--set", "rank=0"], "rank must be at least 1, got 0"),
        (["--set", "partition=iid", "--set", "num-tasks=0"], "num-tasks must be from 1 to 10000, got 0"),
        (["--set", "optimizer=[adam]"], "optimizer must be one of adamw, sgd, got '[adam]'"),
        (["--nodes", "2", "--set", "min-replies=3"], "min-replies 3 can never be met by num-clients 2; lower it"),
        (["--preset", "clinc"], "no preset 'clinc'; there are: cifar100, clinc150"),
        (["--config", "none.toml"], "none.toml: no such settings file"),
        (["--preset", "clinc150", "--config", "a.toml"], "give --preset or --config, not both"),
        (["--ray-address", "auto"], "the address of a Ray cluster is HOST:PORT, as ray start --head prints it, got "),
        (["--ray-address", "head:6379", "--cpus", "2"], "--cpus sizes a Ray of the run's own; the clients take all "),
    ],
)
def test_run_refuses_impossible_settings_in_one_line_with_status_2_and_no_folder(
    fedtalora, tmp_path, arguments, message
):
    status, out, err = fedtalora("run", *arguments)
    assert (status, out) == (2, "")
    assert err.startswith(f"error: {message}") and err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_run_at_a_cluster_that_does_not_answer_exits_with_1_and_leaves_no_folder(fedtalora, tmp_path):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # bound, but nobody listens
        address = f"127.0.0.1:{closed.getsockname()[1]}"
        status, _, err = fedtalora("run", "--ray-address", address)
    assert status == 1 and err.startswith(f"error: no Ray cluster answers at {address}")
    assert list(tmp_path.iterdir()) == []


def test_run_does_not_write_over_another_run(fedtalora, tmp_path):
    folder = make_run(tmp_path / "mine", config={})
    status, _, err = fedtalora("run", "--out", folder)
    assert status == 2 and "holds a run already; choose another --out, or go on with it by --resume" in err


@pytest.mark.parametrize(
    ("files", "found"),
    [
        ({}, "nothing"),
        ({"status.json": '{"phase": "failed"}'}, "nothing"),
        ({"config.json": "{}", "status.json": '{"phase": "failed"}'}, "nothing"),  # before its data were known
        ({"config.json": "{}", "status.json": '{"phase": "failed"}', "manifest.json": "{}"}, "stopped"),
        ({"config.json": "{}", "status.json": '{"phase": "training"}'}, "stopped"),
        ({"config.json": "{}"}, "stopped"),
        ({"config.json": "{}", "status.json": "cut"}, "stopped"),
        ({"config.json": "{}", "status.json": "[]"}, "stopped"),
        ({"config.json": "{}", "metrics.json": "{}"}, "finished"),
    ],
)
def test_a_folder_holds_a_run_unless_it_failed_before_its_data_were_known(tmp_path, files, found):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert names.standing(tmp_path) == found


def test_run_that_is_stopped_before_it_has_begun_is_started_again_and_not_resumed(fedtalora, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("fedtalora_flwr.launch.engine.follow", stop)
    status, _, err = fedtalora("run", "--engine", "process", "--out", "mine")
    assert status == 130 and err == "error: stopped before the run had begun; start it again as before\n"


def test_resume_refuses_what_is_no_run_what_is_finished_and_other_settings(fedtalora, tmp_path):
    status, _, err = fedtalora("run", "--resume", "nothing")
    assert status == 2 and "nothing is no run folder: it has no config.json" in err
    finished = make_run(tmp_path / "done", config=defaults(app_folder()), metrics={})
    status, _, err = fedtalora("run", "--resume", finished)
    assert status == 2 and f"is finished: it has metrics.json; fedtalora report {finished} shows it" in err
    status, _, err = fedtalora("run", "--resume", finished, "--set", "rank=3")
    assert (
        status == 2
        and "--resume goes on with the run's own settings; --set may change only base-cache-gb, cache-gb, check-data, "
        in err
    )


def test_an_out_that_cannot_be_made_is_an_error_in_one_line(fedtalora, tmp_path):
    (tmp_path / "file").write_text("")
    status, _, err = fedtalora("run", "--out", "file/run")
    assert status == 2 and err == f"error: [Errno 20] Not a directory: '{tmp_path}/file/run'\n"


def test_why_a_run_failed_is_told_where_its_report_cannot_be_written(capsys, tmp_path):
    folder = tmp_path / "run"
    make_run(folder, config={}, status={"phase": "failed", "message": "no [space] left"})
    (folder / "report.html").mkdir()
    with pytest.raises(typer.Exit):
        run._explain_failure(folder, "details")
    assert "error: the run failed: no [space] left\n" in capsys.readouterr().err


def test_presets_lists_each_with_its_first_line(fedtalora):
    status, out, _ = fedtalora("presets")
    assert status == 0
    assert [line.split()[0] for line in out.splitlines()] == list(presets(app_folder()))
    assert "CLINC150: 10 tasks x 15 intents" in out


def test_presets_with_a_name_prints_flat_settings_for_flwr_run(fedtalora):
    status, out, _ = fedtalora("presets", "paper-tiny-imagenet-q4")
    settings = tomllib.loads(out)
    assert status == 0 and settings["classes-per-client"] == 4 and settings["num-clients"] == 30
    RunConfig.parse({**defaults(app_folder()), **settings})
    assert fedtalora("presets", "paper")[0] == 2


def test_data_shows_who_holds_what_and_writes_the_page(fedtalora, tmp_path):
    status, out, _ = fedtalora("data", "--set", "num-clients=3", "--out", "[who].html")
    assert status == 0
    assert "partition hash " in out and f"picture {tmp_path / '[who].html'}" in out
    assert "<html" in (tmp_path / "[who].html").read_text()[:200]


def test_data_without_out_names_the_page_after_the_data_and_png_is_a_picture(fedtalora, tmp_path):
    assert fedtalora("data")[0] == fedtalora("data", "--out", "who.png")[0] == 0
    assert (tmp_path / "digits-data.html").is_file()
    assert (tmp_path / "who.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "clinc150", "--config", "a.toml"], "give --preset or --config, not both"),
        (["--out", "who.txt"], "is written as .html, .png or .svg, got 'who.txt'"),
        (
            ["--set", "dataset=nothing"],
            "there is no dataset 'nothing'; choose one of: agnews, cifar10, cifar100, clinc150, digits",
        ),
        (["--set", "num-tasks=11"], "num-tasks must be in [1, 10], the classes of digits, got 11"),
    ],
)
def test_data_refuses_what_cannot_be_with_status_2(fedtalora, arguments, message):
    status, _, err = fedtalora("data", *arguments)
    assert status == 2 and message in err


def test_report_and_compare_on_what_is_no_run_folder_exit_with_2(fedtalora, tmp_path):
    status, _, err = fedtalora("report", "nothing")
    assert status == 2 and err.startswith("error: nothing is no run folder")
    (tmp_path / "empty").mkdir()
    status, _, err = fedtalora("report", "empty")
    assert status == 2 and err.startswith("error: ") and "empty" in err
    status, _, err = fedtalora("compare", "empty")
    assert status == 2 and "compare needs two run folders or more, got 1" in err


def test_export_prints_what_it_measured_and_refuses_with_status_2(fedtalora, timm_run, tmp_path):
    status, out, _ = fedtalora("export", str(timm_run), "--to", "peft", "--out", "model")
    assert status == 0 and (tmp_path / "model" / "load.py").is_file()
    assert "model after all 4 rounds" in out and "logits differ from the run's by at most" in out
    status, _, err = fedtalora("export", str(timm_run), "--to", "peft", "--out", "model")
    assert status == 2 and "model is there already; give another --out, or --force to replace it" in err
    status, _, err = fedtalora("export", "nothing", "--to", "peft")
    assert status == 2 and "nothing is no run folder" in err
    assert fedtalora("export", str(timm_run))[0] == 2


@pytest.mark.parametrize(("command", "rest"), [("export", ["--to", "merged", "--out", "model"]), ("predict", ["-"])])
def test_the_model_of_a_slot_is_asked_for_by_client_and_number(fedtalora, timm_run, command, rest):
    for options in (["--slot", "first"], ["--slot", "0:1", "--cluster", "2"]):
        status, _, err = fedtalora(command, str(timm_run), *rest, *options)
        assert status == 2 and "--slot takes CLIENT:NUMBER, as 0:1, and no --cluster beside it; got" in err
    status, _, err = fedtalora(command, str(timm_run), *rest, "--slot", "0:1")
    assert status == 2 and "has no slot 0:1; it has one model" in err


def test_predict_prints_a_line_for_each_input_or_one_json_array(fedtalora, text_run, tmp_path):
    (tmp_path / "said.txt").write_text("switch the lamp on\nwhere is the door\n")
    status, out, _ = fedtalora("predict", str(text_run), "said.txt", "--top", "2")
    lines = [line.split("\t") for line in out.splitlines()]
    assert status == 0 and [(line[0], line[-1]) for line in lines] == [
        ("said.txt:1", "switch the lamp on"),
        ("said.txt:2", "where is the door"),
    ]
    names = {"lamp", "door", "radio", "oven"}
    assert all(len(line) == 4 and {entry.split()[0] for entry in line[1:3]} <= names for line in lines)
    found = json.loads(fedtalora("predict", str(text_run), "said.txt", "--json")[1])
    assert [entry["predictions"][0]["class"] for entry in found] == [line[1].split()[0] for line in lines]
    status, out, err = fedtalora("predict", str(text_run), "said.docx", "--device", "cpu")
    assert (status, out) == (2, "") and "error: said.docx: no such file or folder" in err


def test_predict_names_what_it_cannot_read_classifies_the_rest_and_exits_with_1(fedtalora, text_run, tmp_path):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.json").write_text("[1")
    (tmp_path / "texts" / "b.txt").write_text("where is the door\n")
    status, out, err = fedtalora("predict", str(text_run), "texts")
    assert status == 1 and out.startswith("texts/b.txt:1\t") and out.count("\n") == 1
    assert "error: texts/a.json cannot be read as .json" in err
    status, out, _ = fedtalora("predict", str(text_run), "texts", "--json")
    broken, good = json.loads(out)
    assert status == 1 and broken["input"] == "texts/a.json" and "cannot be read as .json" in broken["error"]
    assert good["input"] == "texts/b.txt:1" and len(good["predictions"]) == 3


def test_predict_keeps_no_item_for_its_json_array(fedtalora, text_run, tmp_path, monkeypatch):
    (tmp_path / "said.txt").write_text("switch the lamp on\n" * 9)
    alive, most, to_json = [], [], Prediction.to_json

    def watched(prediction):
        alive.append(weakref.ref(prediction))
        most.append(sum(ref() is not None for ref in alive))
        return to_json(prediction)

    monkeypatch.setattr(Prediction, "to_json", watched)
    assert fedtalora("predict", str(text_run), "said.txt", "--json")[0] == 0
    assert len(most) == 9 and max(most) <= 2


def test_predict_goes_on_after_a_file_whose_name_is_not_utf8(fedtalora, text_run, tmp_path):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / os.fsdecode(b"a\xff.txt")).write_text("where is the door\n")
    (tmp_path / "texts" / "b.txt").write_text("switch the lamp on\n")
    status, out, _ = fedtalora("predict", str(text_run), "texts")
    assert status == 0
    assert [line.split("\t")[0] for line in out.splitlines()] == ["texts/a?.txt:1", "texts/b.txt:1"]
    (tmp_path / "texts" / os.fsdecode(b"c\xff.json")).write_text("[1")
    status, out, _ = fedtalora("predict", str(text_run), "texts", "--json")
    _, _, broken = json.loads(out)
    assert status == 1 and broken["input"] == "texts/c?.json" and "c?.json cannot be read" in broken["error"]


def test_an_error_is_shown_in_full_where_a_traceback_is_asked_for(monkeypatch):
    monkeypatch.setenv("FEDTALORA_TRACEBACK", "1")
    monkeypatch.setattr(sys, "argv", ["fedtalora", "report", "nothing"])
    with pytest.raises(FileNotFoundError):
        app.main()


def test_doctor_prints_a_line_for_each_finding_and_exits_by_the_worst(fedtalora, monkeypatch):
    from fedtalora_flwr.cli import doctor

    findings = [doctor.Finding("ok", "disk", "72 GiB [free]"), doctor.Finding("note", "data", "not set")]
    monkeypatch.setattr(doctor, "examine", lambda: findings)
    assert fedtalora("doctor")[:2] == (0, "ok   disk: 72 GiB [free]\nnote data: not set\n")
    findings.append(doctor.Finding("bad", "ray", "missing"))
    status, out, _ = fedtalora("doctor")
    assert status == 1 and out.endswith("bad  ray: missing\n")
