"""What a server names on a node's disk is refused where the node did not offer it, before anything is read."""

from pathlib import Path
from typing import Any

import PIL.Image
import pytest
from flwr.app import Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from local_grid import TINY, defaults

from fedtalora_flwr import wire
from fedtalora_flwr.client.handlers import hello

OWN = {"partition-id": 0, "num-partitions": 1, "name": "site0"}


def ask(node_config: dict[str, Any], **changes: Any) -> wire.Hello:
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
    message = Message(RecordDict(), dst_node_id=1, message_type="query")
    settings = {key.replace("_", "-"): value for key, value in changes.items()}
    message.content = hello(message, defaults() | TINY | {"num-clients": 1} | settings, node_config)
    return wire.read_hello(message)


def pictures(folder: Path) -> Path:
    for number in range(8):
        path = folder / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.new("L", (8, 8), 20 * number).save(path)
    return folder


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A disk with what the node offers, in ``data`` and ``scans``, and what it does not, in ``private``."""
    monkeypatch.delenv("FEDTALORA_DATA", raising=False)
    for folder in ("data/photos", "scans", "private", "scans-of-others"):
        pictures(tmp_path / folder)
    (tmp_path / "data" / "way-out").symlink_to(tmp_path / "private")
    return tmp_path


ASKED = {
    "another folder": ("data-path", {"dataset": "imagefolder", "data_path": "{disk}/private"}),
    "a folder whose name begins alike": (
        "data-path",
        {"dataset": "imagefolder", "data_path": "{disk}/scans-of-others"},
    ),
    "a way up": ("data-path", {"dataset": "imagefolder", "data_path": "{disk}/data/photos/../../private"}),
    "a link that leads out": ("data-path", {"dataset": "imagefolder", "data_path": "{disk}/data/way-out"}),
    "a home": ("data-path", {"dataset": "text", "data_path": "~/notes.csv"}),
    "the folder of the process": ("data-path", {"dataset": "imagefolder", "data_path": "."}),
    "a path where the node has its own": ("data-path", {"dataset": "nodes", "data_path": "{disk}/private"}),
    "test data elsewhere": (
        "test-path",
        {"dataset": "imagefolder", "data_path": "{disk}/data/photos", "test_path": "{disk}/private"},
    ),
    "another root": ("data-root", {"dataset": "clinc150", "data_root": "{disk}/private"}),
    "a root that is not read": ("data-root", {"dataset": "digits", "data_root": "/"}),
    "a folder laid out like one of the hub": ("dataset", {"dataset": "hub:{disk}/private"}),
    "a part of a joined data set": ("dataset", {"dataset": "join:digits+imagefolder={disk}/private"}),
    "a part that is laid out like one of the hub": ("dataset", {"dataset": "join:digits+hub:{disk}/private"}),
    "a part of the hub": ("dataset", {"dataset": "join:digits+hub:someone/else"}),
    "a folder behind a slash": ("dataset", {"dataset": "hub/{disk}/private"}),
    "an encoder behind a slash": ("backbone", {"backbone": "hf/{disk}/private"}),
    "an encoder in a folder with a colon": ("backbone", {"backbone": "hf:{disk}/private:b"}),
    "a model of timm's behind a slash": ("backbone", {"backbone": "timm/local-dir:{disk}/private"}),
    "a data set of the hub": ("dataset", {"dataset": "hub:someone/else"}),
    "a kind of file that the hub's library knows": ("dataset", {"dataset": "hub:imagefolder"}),
    "a checkpoint": (
        "backbone-checkpoint",
        {"backbone": "timm:test_vit", "backbone_checkpoint": "{disk}/private/x.pth"},
    ),
    "an encoder": ("backbone", {"backbone": "hf:{disk}/private"}),
    "a model of timm's": ("backbone", {"backbone": "timm:local-dir:{disk}/private"}),
}


@pytest.mark.parametrize("what", ASKED)
def test_node_refuses_what_it_did_not_offer_by_name(disk: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    key, settings = ASKED[what]
    monkeypatch.setenv("FEDTALORA_DATA", str(disk / "data"))
    named = {name: value.replace("{disk}", str(disk)) for name, value in settings.items()}
    with pytest.raises(wire.WireError, match=f"^{key} ") as refusal:
        ask(OWN | {"data-path": str(disk / "scans")}, **named)
    assert "lies outside the folders" in str(refusal.value) or "takes no data set of the hub" in str(refusal.value)


def test_refusal_does_not_tell_whether_the_folder_is_there(disk: Path) -> None:
    def refusal(folder: str) -> str:
        with pytest.raises(wire.WireError) as found:
            ask(OWN, dataset="imagefolder", data_path=str(disk / folder / "x"))
        return str(found.value)

    assert refusal("private") == refusal("nothing")


def test_node_reads_what_the_server_names_below_its_folders(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDTALORA_DATA", str(disk / "data"))
    named = ask(OWN, dataset="imagefolder", data_path=str(disk / "data" / "photos"), num_tasks=1)
    assert named.class_counts.tolist() == [3, 3]
    own = ask(OWN | {"data-path": str(disk / "scans")}, dataset="nodes")
    assert [(one.name, one.num_train + one.num_test) for one in own.own] == [("a", 4), ("b", 4)]


def test_links_that_lie_in_a_nodes_own_folder_belong_to_its_data(disk: Path) -> None:
    (disk / "scans" / "c").symlink_to(disk / "private" / "a")
    own = ask(OWN | {"data-path": str(disk / "scans")}, dataset="nodes")
    assert [one.name for one in own.own] == ["a", "b", "c"]


def test_simulated_node_reads_what_its_user_names(disk: Path) -> None:
    simulated = {"partition-id": 0, "num-partitions": 1}
    found = ask(simulated, dataset="imagefolder", data_path=str(disk / "private"), num_tasks=1)
    assert found.class_counts.tolist() == [3, 3]
