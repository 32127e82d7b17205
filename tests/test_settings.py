"""Defaults, files that build on one another, and the command line's assignments, later ones winning."""

import json

import pytest

from fedtalora_flwr.config import ConfigError
from fedtalora_flwr.config.sources import app_folder, defaults, gather, preset_file, presets, read_file
from fedtalora_flwr.run_folder.resumed import resumed

APP = app_folder()
KNOWN = defaults(APP)


def write(folder, **contents):
    for name, text in contents.items():
        (folder / f"{name}.toml").write_text(text)
    return folder / f"{next(iter(contents))}.toml"


def test_assignments_win_over_the_file_and_the_file_over_the_defaults(tmp_path):
    file = write(tmp_path, mine="rank = 5\nseed = 7\n")
    settings = gather(APP, file=file, assignments=["seed=9", "seed=11"])
    assert (settings["rank"], settings["seed"], settings["alpha"]) == (5, 11, KNOWN["alpha"])
    assert settings.keys() == KNOWN.keys()


def test_a_file_wins_over_its_base_and_over_its_bases_base(tmp_path):
    file = write(
        tmp_path,
        child='base = "parent"\nrank = 1\n',
        parent='base = "grand-parent"\nrank = 2\nseed = 2\n',
        **{"grand-parent": "rank = 3\nseed = 3\nnum-tasks = 3\n"},
    )
    assert read_file(file, KNOWN) == {"rank": 1, "seed": 2, "num-tasks": 3}


def test_an_unknown_base_is_an_error_that_lists_the_files_beside_it(tmp_path):
    file = write(tmp_path, child='base = "nobody"\n', other="", another="")
    with pytest.raises(ConfigError, match=r"child.toml: base 'nobody' names no file beside it; .*: another, other$"):
        read_file(file, KNOWN)


@pytest.mark.parametrize(
    ("contents", "circle"),
    [
        ({"a": 'base = "a"'}, "a -> a"),
        ({"a": 'base = "b"', "b": 'base = "c"', "c": 'base = "b"'}, "a -> b -> c -> b"),
    ],
)
def test_a_base_that_comes_back_to_itself_is_an_error_that_shows_the_circle(tmp_path, contents, circle):
    with pytest.raises(ConfigError, match=f"base goes round in a circle: {circle}$"):
        read_file(write(tmp_path, **contents), KNOWN)


def test_an_unknown_key_of_a_base_is_an_error_that_names_the_bases_file(tmp_path):
    file = write(tmp_path, child='base = "parent"', parent="rnak = 3")
    with pytest.raises(ConfigError, match=r"parent.toml: unknown setting 'rnak'; did you mean rank\?"):
        read_file(file, KNOWN)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.toml", b"rank == 3", "a.toml: "),
        ("a.toml", b"[tool]\nrank = 3", "unknown setting 'tool'"),
        ("a.toml", b"\xff\xfe", "a.toml: .*codec can't decode"),
        ("a.json", b'{"rank": }', "a.json: Expecting value"),
        ("a.json", b'["rank", 3]', "a.json: holds list; write a flat object"),
        ("a.json", b"3", "a.json: holds int"),
    ],
)
def test_a_file_that_cannot_be_read_is_an_error_that_names_it(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        read_file(tmp_path / name, KNOWN)


def test_a_missing_file_and_an_unknown_preset_are_errors(tmp_path):
    with pytest.raises(ConfigError, match="no such settings file"):
        read_file(tmp_path / "none.toml", KNOWN)
    with pytest.raises(ConfigError, match=r"no preset 'clinc'; there are: .*clinc150"):
        preset_file(APP, "clinc")
    assert preset_file(APP, "clinc150") == presets(APP)["clinc150"]


def test_a_runs_config_json_reads_back(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(KNOWN))
    assert read_file(tmp_path / "config.json", KNOWN) == KNOWN


def test_relative_paths_become_absolute_and_names_of_the_hub_stay(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").mkdir()
    changes = ["dataset=hub:tiny", "backbone=hf:owner/name", "data-path=tiny", "backbone-checkpoint=~/w.pth"]
    settings = gather(APP, file=None, assignments=changes)
    assert settings["dataset"] == f"hub:{tmp_path / 'tiny'}"
    assert settings["backbone"] == "hf:owner/name"
    assert settings["data-path"] == str(tmp_path / "tiny")
    assert settings["backbone-checkpoint"].startswith("/") and settings["test-path"] == ""
    local = gather(APP, file=None, assignments=["backbone=timm:local-dir:tiny"])
    assert local["backbone"] == f"timm:local-dir:{tmp_path / 'tiny'}"
    hub = gather(APP, file=None, assignments=["backbone=timm:hf-hub:tiny"])  # a folder of that name is another thing
    assert hub["backbone"] == "timm:hf-hub:tiny"


def test_the_data_root_comes_from_the_environment_unless_it_is_set(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDTALORA_DATA", str(tmp_path / "env"))
    assert gather(APP, file=None, assignments=[])["data-root"] == str(tmp_path / "env")
    chosen = gather(APP, file=None, assignments=[f"data-root={tmp_path}"])
    assert chosen["data-root"] == str(tmp_path)


def test_a_path_that_is_changed_on_resume_becomes_absolute_as_in_a_fresh_run(tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(json.dumps(KNOWN))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    settings = resumed(APP, tmp_path / "run", assignments=["data-root=../data"])
    assert settings["data-root"] == gather(APP, file=None, assignments=["data-root=../data"])["data-root"]
    assert settings["data-root"] == str(tmp_path / "data")
