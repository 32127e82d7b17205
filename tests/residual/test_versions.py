"""Every client reaches the server's base bit for bit, whatever it missed, lost or damaged."""

import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedtalora_flwr.aggregation.factors import Step, added, on_grid, pays
from fedtalora_flwr.residual import ZERO, Ledger, Patch, ResidualVersion, VersionMissing, VersionStore

LAYERS = {"blocks.0.qkv": (40, 24), "blocks.0.proj": (24, 24), "blocks.1.fc1": (48, 24)}


def change(generator: torch.Generator, *, inner: int) -> dict[str, Step | Tensor]:
    """What an aggregation may lose: factors where they are smaller, else a dense matrix."""
    lost: dict[str, Step | Tensor] = {}
    for name, shape in LAYERS.items():
        left = torch.randn(shape[0], inner, generator=generator, dtype=torch.float64)
        right = torch.randn(inner, shape[1], generator=generator, dtype=torch.float64)
        lost[name] = on_grid(left, right) if pays(inner, shape) else (left @ right).float()
    return lost


class Server:
    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.residual: Mapping[str, Tensor] = {}
        self.ledger = Ledger(self.residual)

    def aggregate(self, *, inner: int) -> None:
        lost = change(self.generator, inner=inner)
        self.residual = {name: added(lost[name], to=self.residual.get(name)) for name in LAYERS}
        self.ledger.advance(self.residual, {name: step for name, step in lost.items() if isinstance(step, Step)})

    def restart(self) -> None:
        """A killed server goes on from its checkpoint: it knows its residual and nobody's base."""
        self.ledger = Ledger(self.residual)

    def bring(self, partition: int, store: VersionStore) -> tuple[ResidualVersion, int]:
        """One exchange with a client, as the strategy does it: at most one patch is sent again."""
        for attempt in (1, 2):
            patch = self.ledger.patch(partition)
            try:
                base = store.reach(patch)
            except VersionMissing as missing:
                self.ledger.report(partition, missing.held)
            else:
                self.ledger.acknowledge(partition)
                return base, attempt
        raise AssertionError("a client asked twice")


def numel(patch: Patch) -> int:
    return sum(v.numel() for v in patch.dense.values()) + sum(s.numel for step in patch.steps for s in step.values())


def dense_numel() -> int:
    return sum(d_out * d_in for d_out, d_in in LAYERS.values())


EVENTS = st.sampled_from(["trains"] * 6 + ["absent"] * 5 + ["restarted", "lost its cache", "damaged its cache"])
ROUND = st.tuples(st.integers(1, 12), st.lists(EVENTS, min_size=3, max_size=3), st.booleans())


@settings(max_examples=200)
@given(st.lists(ROUND, min_size=1, max_size=12), st.integers(0, 10**6))
def test_base_of_every_participant_equals_the_servers_bit_for_bit(tmp_path_factory, schedule, seed):
    server, folder = Server(seed), tmp_path_factory.mktemp("bases")
    stores = [VersionStore(folder / str(k), limit_bytes=10**6) for k in range(3)]
    for inner, events, server_restarts in schedule:
        for k, event in enumerate(events):
            if event == "absent":
                continue
            if event != "trains":
                stores[k] = VersionStore(folder / str(k), limit_bytes=10**6)  # a new process
            for path in (folder / str(k)).glob("*"):
                if event == "lost its cache":
                    path.unlink()
                if event == "damaged its cache":
                    path.write_bytes(path.read_bytes()[:-1] + b"?")
            base, attempts = server.bring(k, stores[k])
            assert base.digest == server.ledger.base.digest == ResidualVersion(server.residual).digest
            assert all(torch.equal(base.residual[name], server.residual[name]) for name in server.residual)
            assert attempts == 1 or event != "trains"
            assert numel(server.ledger.patch(k)) == 0
        server.aggregate(inner=inner)
        if server_restarts:
            server.restart()
            for k, store in enumerate(stores):
                server.ledger.report(k, store.digests())


@given(st.lists(st.integers(1, 12), min_size=1, max_size=15), st.integers(0, 14))
def test_no_patch_is_larger_than_the_dense_residual_and_steps_are_sent_where_they_are_smaller(inners, last_seen):
    server = Server(0)
    for round_index, inner in enumerate(inners):
        if round_index == last_seen:
            server.ledger.acknowledge(0)
        server.aggregate(inner=inner)
    missed = inners[last_seen:] if last_seen < len(inners) else inners
    cheapest = sum(
        min(d_out * d_in, sum(m * (d_out + d_in) if pays(m, (d_out, d_in)) else d_out * d_in for m in missed))
        for d_out, d_in in LAYERS.values()
    )
    sent = numel(server.ledger.patch(0))
    assert sent <= dense_numel()
    # Steps that together are as large as the dense residual are forgotten, for all layers at once.
    assert sent == cheapest or cheapest > 0.6 * dense_numel()


def test_client_in_step_gets_the_last_step_alone():
    server = Server(1)
    for _ in range(4):
        server.aggregate(inner=2)
        server.ledger.acknowledge(7)
    server.aggregate(inner=3)
    assert numel(server.ledger.patch(7)) == 3 * sum(sum(shape) for shape in LAYERS.values())


def test_server_remembers_steps_only_while_they_are_worth_sending():
    server = Server(1)
    for _ in range(50):
        server.aggregate(inner=2)
    assert sum(step.numel for steps in server.ledger._steps for step in steps.values()) < dense_numel()


def test_clients_with_the_same_base_share_one_patch():
    server = Server(1)
    server.aggregate(inner=2)
    assert server.ledger.patch(0) is server.ledger.patch(1)


def test_run_without_a_residual_sends_nothing(tmp_path):
    ledger, store = Ledger({}), VersionStore(tmp_path / "bases", limit_bytes=10**6)
    ledger.advance({}, {})
    assert ledger.patch(0) == Patch((ZERO.digest,))
    assert store.reach(ledger.patch(0)).residual == {}
    assert not (tmp_path / "bases").exists()


def test_base_outlives_the_process(tmp_path):
    server = Server(2)
    server.aggregate(inner=2)
    server.bring(0, VersionStore(tmp_path, limit_bytes=10**6))
    server.aggregate(inner=2)
    base, attempts = server.bring(0, VersionStore(tmp_path, limit_bytes=10**6))
    assert (base.digest, attempts) == (server.ledger.base.digest, 1)


@pytest.mark.parametrize(
    "harm",
    [
        lambda path: path.write_bytes(path.read_bytes()[:-3]),
        lambda path: path.write_bytes(b"not safetensors"),
        lambda path: path.write_bytes(path.read_bytes()[:-1] + b"\x00"),
        lambda path: path.unlink(),
    ],
    ids=["cut short", "another format", "one byte changed", "gone"],
)
def test_client_whose_file_is_damaged_is_brought_back_in_the_same_exchange(tmp_path, harm):
    server = Server(3)
    server.aggregate(inner=2)
    server.aggregate(inner=11)  # steps from nothing are not worth sending any more
    server.bring(0, VersionStore(tmp_path, limit_bytes=10**6))
    server.aggregate(inner=2)
    (file,) = tmp_path.glob("*.safetensors")
    harm(file)
    base, attempts = server.bring(0, VersionStore(tmp_path, limit_bytes=10**6))
    assert (base.digest, attempts) == (server.ledger.base.digest, 2)


def test_base_of_another_run_is_never_taken_for_ours(tmp_path):
    ours, theirs = Server(4), Server(5)
    for server in (ours, theirs):
        server.aggregate(inner=2)
    theirs.bring(0, VersionStore(tmp_path, limit_bytes=10**6))
    base, _ = ours.bring(0, VersionStore(tmp_path, limit_bytes=10**6))
    assert base.digest == ours.ledger.base.digest


def test_a_step_that_leads_elsewhere_is_noticed_and_the_whole_base_asked_for(tmp_path):
    server, store = Server(6), VersionStore(tmp_path, limit_bytes=10**6)
    server.aggregate(inner=2)
    patch = server.ledger.patch(0)
    wrong = {name: Step(step.left * 2, step.right) for name, step in patch.steps[0].items()}
    with pytest.raises(VersionMissing, match="came to base") as missing:
        store.reach(Patch(patch.chain, (wrong,)))
    assert missing.value.held == []
    server.ledger.report(0, missing.value.held)
    assert set(server.ledger.patch(0).dense) == set(LAYERS)
    assert store.reach(server.ledger.patch(0)).digest == server.ledger.base.digest


def test_disk_stays_within_its_limit_but_for_the_last_two_bases(tmp_path):
    server, store = Server(7), VersionStore(tmp_path, limit_bytes=0)
    for _ in range(6):
        server.aggregate(inner=2)
        server.bring(0, store)
        assert len(list(tmp_path.glob("*"))) <= 2
    newest = max(tmp_path.glob("*"), key=lambda path: path.stat().st_mtime_ns)
    assert newest.stem == server.ledger.base.digest


def test_half_written_files_of_dead_processes_are_cleared_away(tmp_path):
    stale, fresh = tmp_path / ".a.safetensors.1.part", tmp_path / ".b.safetensors.2.part"
    for path in (stale, fresh):
        path.write_bytes(b"half")
    os.utime(stale, (time.time() - 7200,) * 2)
    server = Server(8)
    server.aggregate(inner=2)
    server.bring(0, VersionStore(tmp_path, limit_bytes=10**6))
    assert not stale.exists() and fresh.exists()


def test_folder_that_cannot_be_written_costs_the_cache_and_not_the_round(tmp_path, caplog):
    blocked = tmp_path / "bases"
    blocked.write_text("a file where the folder should be")
    server, store = Server(9), VersionStore(Path(blocked), limit_bytes=10**6)
    for _ in range(3):
        server.aggregate(inner=2)
        base, attempts = server.bring(0, store)
        assert (base.digest, attempts) == (server.ledger.base.digest, 1)
    assert "the base is not kept on disk" in caplog.text


def test_links_that_lead_nowhere_or_in_a_circle_cost_no_message(tmp_path):
    for name, target in (("a.safetensors", "a.safetensors"), ("b.safetensors", "gone"), (".c.part", ".c.part")):
        (tmp_path / name).symlink_to(target)
    store, base = VersionStore(tmp_path, limit_bytes=0), ResidualVersion({"x": torch.ones(2, 3)})
    store.reach(Patch((base.digest,), dense=base.residual))
    assert store.digests() == sorted({ZERO.digest, base.digest})


@pytest.fixture
def cache() -> Iterator[tuple[Path, Callable[[], None]]]:
    """A folder, and what makes it one that this process can read and not write; root becomes another user for it."""
    user = os.geteuid()
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)

        def close() -> None:
            for path in folder.iterdir():
                path.chmod(0o444)
            folder.chmod(0o555)
            os.seteuid(user or 65534)

        yield folder, close
        os.seteuid(user)
        folder.chmod(0o755)


@pytest.mark.parametrize(
    ("harm", "wanted", "told"),
    [
        pytest.param(lambda data: data, 1, "", id="whole"),
        pytest.param(lambda data: data[:-3], 2, "cannot be read", id="cut short"),
        pytest.param(lambda data: data[:-1] + b"\x00", 2, "is damaged", id="one byte changed"),
    ],
)
def test_folder_that_can_only_be_read_is_read_and_costs_no_round(cache, caplog, harm, wanted, told):
    folder, close = cache
    server = Server(3)
    server.aggregate(inner=2)
    server.aggregate(inner=11)  # steps from nothing are not worth sending any more
    server.bring(0, VersionStore(folder, limit_bytes=10**6))
    server.aggregate(inner=2)
    (file,) = folder.glob("*.safetensors")
    file.write_bytes(harm(file.read_bytes()))
    close()
    base, attempts = server.bring(0, VersionStore(folder, limit_bytes=10**6))
    assert (base.digest, attempts) == (server.ledger.base.digest, wanted)
    assert told in caplog.text and "the base is not kept on disk" in caplog.text
    assert list(folder.iterdir()) == [file]


def test_base_that_leads_elsewhere_is_given_up_though_its_file_cannot_be_removed(cache):
    folder, close = cache
    server = Server(6)
    server.aggregate(inner=2)
    server.bring(0, VersionStore(folder, limit_bytes=10**6))
    server.aggregate(inner=2)
    patch = server.ledger.patch(0)
    wrong = {name: Step(step.left * 2, step.right) for name, step in patch.steps[0].items()}
    close()
    with pytest.raises(VersionMissing, match="came to base"):
        VersionStore(folder, limit_bytes=10**6).reach(Patch(patch.chain, (wrong,)))
