"""A damaged line of rounds.jsonl is named, and takes no other with it, whoever reads the file."""

import io
import json
import os
from pathlib import Path

import pytest
from rich.console import Console

from fedtalora_flwr.cli.progress import RunProgress
from fedtalora_flwr.run_folder import round_lines
from fedtalora_flwr.run_folder.reader import read_run
from fedtalora_flwr.run_folder.writer import Failure, RoundLog, RunFolder


def log_of(server_round: int) -> RoundLog:
    return RoundLog(
        server_round=server_round,
        task_id=0,
        participants=[0, 1, 2],
        failures=[Failure(1, 'late, {"server_round": 9} and "quoted"')],
        bytes_up=1234,
        bytes_down=5678,
        seconds={"total": 0.25},
        mean_loss=0.5,
        residual_norm=0.125,
        weights={2: 0.75},
    )


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path)
    folder.write_config({"num-tasks": 1, "rounds-per-task": 5})
    for server_round in range(1, 6):
        folder.append_round(log_of(server_round))
    return folder


def rounds_of(path: Path) -> list[int]:
    return [line.values["server_round"] for line in round_lines.read(path)[0]]


def damaged(path: Path) -> list[str]:
    return [str(damage) for damage in round_lines.read(path)[1]]


def spoil(path: Path, line: int, change) -> None:
    lines = path.read_bytes().splitlines(keepends=True)
    lines[line - 1] = change(lines[line - 1])
    path.write_bytes(b"".join(lines))


def test_whole_log_gives_every_line_without_its_checksum(folder):
    lines, damages = round_lines.read(folder.path / "rounds.jsonl")
    assert [line.values["server_round"] for line in lines] == [1, 2, 3, 4, 5] and damages == []
    assert "crc32" not in lines[0].values and lines[0].values["weights"] == {"2": 0.75}


def test_a_line_is_on_the_disk_before_the_round_counts_as_written(folder, monkeypatch):
    path, flush, at = folder.path / "rounds.jsonl", os.fsync, []

    def noted(number: int) -> None:
        flush(number)
        at.append((os.fstat(number).st_ino, os.fstat(number).st_size))

    monkeypatch.setattr(os, "fsync", noted)
    folder.append_round(log_of(6))
    assert at == [(path.stat().st_ino, path.stat().st_size)]


@pytest.mark.parametrize("bit", [0x01, 0x10, 0x20, 0x80])
def test_no_flipped_byte_of_a_line_changes_what_is_read_or_hides_another_line(folder, bit):
    path = folder.path / "rounds.jsonl"
    whole, (good, _) = path.read_bytes(), round_lines.read(path)
    start = whole.index(b"\n") * 2 + 2  # of the third line
    end = whole.index(b"\n", start)
    for place in range(start, end):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ bit]) + whole[place + 1 :])
        lines, damages = round_lines.read(path)
        values = {line.values["server_round"]: line.values for line in lines}
        assert values.keys() >= {1, 2, 4, 5}
        if 3 in values:  # the byte was one of the checksum's name
            assert good[2].values.items() <= values[3].items() and not damages
        else:
            assert {damage.number for damage in damages} <= {3, 4} and damages[0].number == 3


def test_a_lost_line_break_hides_no_line(folder):
    path = folder.path / "rounds.jsonl"
    spoil(path, 2, lambda line: line.replace(b"\n", b"J"))
    assert rounds_of(path) == [1, 3, 4, 5]
    assert [text.split(":")[0] for text in damaged(path)] == ["rounds.jsonl, line 2 is damaged"]


def test_a_line_after_one_that_was_cut_short_is_read(folder):
    path = folder.path / "rounds.jsonl"
    path.write_bytes(path.read_bytes()[:-40])
    assert damaged(path) == ["rounds.jsonl, line 5 is cut off, as if the run was stopped while it wrote"]
    folder.append_round(log_of(6))
    assert rounds_of(path) == [1, 2, 3, 4, 6] and damaged(path)[0].startswith("rounds.jsonl, line 5 is damaged: ")


def test_resume_keeps_every_good_line_and_names_the_damaged_one(folder):
    path = folder.path / "rounds.jsonl"
    before = path.read_bytes().splitlines(keepends=True)
    spoil(path, 2, lambda line: line.replace(b"1234", b"1235"))
    damages = folder.keep_rounds(4)
    assert path.read_bytes() == before[0] + before[2] + before[3]
    assert [str(damage) for damage in damages] == ["rounds.jsonl, line 2 is damaged: its checksum is another"]


def test_report_goes_on_beside_a_damaged_line_and_says_which_round_is_missing(folder):
    spoil(folder.path / "rounds.jsonl", 2, lambda line: b"\xff" + line[1:])
    record = read_run(folder.path)
    assert [line["server_round"] for line in record.rounds] == [1, 3, 4, 5]
    assert any(note.startswith("rounds.jsonl, line 2 is damaged: ") for note in record.notes)
    assert "rounds.jsonl has no line of round 2." in record.notes


def test_progress_names_a_damaged_line_once_and_shows_those_after_it(folder):
    shown = io.StringIO()
    with RunProgress(folder.path, Console(file=shown, width=300)) as progress:
        folder.append_round(log_of(6))
        spoil(folder.path / "rounds.jsonl", 6, lambda line: line.replace(b"1234", b"1235"))
        folder.append_round(log_of(7))
        for look in range(2):
            (folder.path / "status.json").write_text(json.dumps({"phase": "training", "num_rounds": 7}))
            os.utime(folder.path / "status.json", (look, look))
            progress.tick()
    assert shown.getvalue().count("rounds.jsonl, line 6 is damaged: its checksum is another") == 1
    assert shown.getvalue().count("round 7/7") == 1


def test_line_of_an_earlier_version_is_taken_as_it_is(tmp_path):
    (tmp_path / "rounds.jsonl").write_text('{"server_round": 1, "task_id": 0}\n{"task_id": 0}\n')
    assert rounds_of(tmp_path / "rounds.jsonl") == [1]
    assert damaged(tmp_path / "rounds.jsonl") == [
        "rounds.jsonl, line 2 is damaged: it needs a whole number 'server_round'"
    ]
