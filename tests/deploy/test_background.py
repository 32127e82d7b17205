"""What runs in the background is started again when it ends, until it is stopped or does not stay up."""

import fcntl
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Thread

import psutil
import pytest

from fedtalora_flwr.deploy.background import Patience, keep, start
from fedtalora_flwr.deploy.folder import DeployError, FederationFolder
from fedtalora_flwr.deploy.processes import claim, pid_of, state_of, stop, tail

NAME = "site0"
QUICK = Patience(pause=0.3, longest=0.3)
STAYS = "echo up; sleep 600 & wait"  # with a process of its own below it, as Flower has


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[FederationFolder]:
    made = FederationFolder(tmp_path)
    made.make()
    yield made
    stop(made, NAME, seconds=1)
    assert not naming(tmp_path)


def naming(root: Path) -> list[str]:
    found = psutil.process_iter(["cmdline", "cwd"])
    return [" ".join(p.info["cmdline"]) for p in found if (p.info["cwd"] or "").startswith(str(root))]


def begin(folder: FederationFolder, script: str, patience: Patience = QUICK) -> int:
    start(folder, NAME, ["sh", "-c", script], dict(os.environ), ready=lambda: ups(folder) > 0, patience=patience)
    return pid_of(folder, NAME)


def ups(folder: FederationFolder) -> int:
    return tail(folder, NAME, num_lines=100).splitlines().count("up")


def eventually(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 60
    while not (held := condition()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return held


def test_what_is_killed_starts_again_without_what_it_left_behind(folder):
    first = begin(folder, STAYS)
    (left,) = psutil.Process(first).children()
    os.kill(first, signal.SIGKILL)
    assert eventually(lambda: ups(folder) == 2)
    assert pid_of(folder, NAME) not in (None, first) and not left.is_running()
    assert "fedtalora: it was killed by signal 9. It starts again" in tail(folder, NAME, num_lines=100)


def test_an_end_with_status_0_is_no_reason_to_stay_away_and_its_meaning_is_told(folder):
    begin(folder, f"test -e ended && {{ {STAYS}; }}; echo up; sleep 0.5; echo '[code: 2004]'; touch ended")
    assert eventually(lambda: ups(folder) == 2)
    (note,) = (line for line in tail(folder, NAME, num_lines=100).splitlines() if line.startswith("fedtalora: "))
    assert "it ended with status 0: the server does not accept this node's key" in note


def test_a_log_that_was_taken_away_is_no_reason_to_stay_away(folder):
    begin(folder, f"test -e ended && {{ {STAYS}; }}; echo up; until test -e go; do sleep 0.1; done; touch ended")
    folder.log(NAME).unlink()
    (folder.working_directory / "go").touch()
    assert eventually(lambda: (folder.working_directory / "ended").exists() and "starts again" in tail_of(folder))
    assert eventually(lambda: state_of(folder, NAME).startswith("running"))


def tail_of(folder: FederationFolder) -> str:
    return tail(folder, NAME, num_lines=100)


def test_what_is_stopped_stays_away_also_between_an_end_and_the_next_start(folder):
    begin(folder, STAYS)
    assert stop(folder, NAME, seconds=1) and pid_of(folder, NAME) is None
    killed = begin(folder, STAYS, Patience(pause=600))
    os.kill(killed, signal.SIGKILL)
    assert eventually(lambda: state_of(folder, NAME).startswith("waiting"))
    assert stop(folder, NAME, seconds=1) and pid_of(folder, NAME) is None and ups(folder) == 1


def test_pauses_grow_for_what_does_not_stay_up_and_not_for_what_does(folder):
    begin(folder, "echo up; sleep 0.3", Patience(pause=0.1, longest=0.4, steady=60))
    assert eventually(lambda: len(pauses(folder)) >= 7)
    found = pauses(folder)
    assert found == sorted(found) and found[0] == 0.1 and found[-1] == 0.4
    stop(folder, NAME, seconds=1)
    begin(folder, "echo up; sleep 0.3", Patience(pause=0.1, longest=0.4, steady=0.1))
    assert eventually(lambda: len(pauses(folder)) >= 7)
    assert set(pauses(folder)) == {0.1}


def pauses(folder: FederationFolder) -> list[float]:
    return [float(found) for found in re.findall(r"starts again in (\S+) s", tail(folder, NAME, num_lines=100))]


def test_what_cannot_be_started_any_more_is_tried_again(folder, tmp_path):
    program = tmp_path / "program"
    program.write_text(f"#!/bin/sh\n{STAYS}\n")
    program.chmod(0o755)
    start(folder, NAME, [str(program)], dict(os.environ), ready=lambda: ups(folder) > 0, patience=QUICK)
    program.rename(tmp_path / "moved")
    os.kill(pid_of(folder, NAME), signal.SIGKILL)
    assert eventually(lambda: "could not be started (No such file or directory)" in tail(folder, NAME, num_lines=9))
    (tmp_path / "moved").rename(program)
    assert eventually(lambda: ups(folder) == 2)


def test_what_an_orphan_leaves_is_collected(folder):
    process = psutil.Process(begin(folder, "(sleep 0.2 &) ; " + STAYS))
    supervisor = process.parent()
    assert eventually(lambda: [child.pid for child in supervisor.children()] == [process.pid])


def test_who_asks_again_after_the_starter_was_killed_has_it_kept(folder):
    killed = begin(folder, STAYS)
    folder.kept(NAME).unlink()  # as if the starter had not come that far
    keep(folder, NAME)
    os.kill(killed, signal.SIGKILL)
    assert eventually(lambda: ups(folder) == 2)


def test_what_ends_before_it_is_ready_is_an_error_and_is_not_started_again(folder):
    with pytest.raises(DeployError, match=r"did not come up: .*its port on 127.0.0.1 is taken"):
        begin(folder, "echo address already in use")
    assert pid_of(folder, NAME) is None


def test_what_is_not_ready_in_time_is_stopped(folder):
    with pytest.raises(DeployError, match="not up within 1 s and was stopped; its log ends:\nslow"):
        start(folder, NAME, ["sh", "-c", "echo slow; exec sleep 600"], dict(os.environ), ready=lambda: False, seconds=1)
    assert pid_of(folder, NAME) is None


def test_who_looks_hinders_neither_others_who_look_nor_a_start(folder):
    os.close(claim(folder, NAME, 1234))  # it has ended, and its number is still in the file
    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(lambda _: pid_of(folder, NAME), range(4000))) == {None}
        looking = pool.submit(lambda: [pid_of(folder, NAME) for _ in range(4000)])
        while not looking.done():
            os.close(claim(folder, NAME, 1234))


def test_what_ends_before_its_lock_names_it_is_not_waited_for(folder):
    handle = os.open(folder.lock(NAME), os.O_RDWR | os.O_CREAT)
    fcntl.flock(handle, fcntl.LOCK_EX)
    looking = Thread(target=pid_of, args=(folder, NAME), daemon=True)
    looking.start()
    time.sleep(0.1)
    os.close(handle)
    looking.join(10)
    assert not looking.is_alive()


def test_a_process_whose_supervisor_was_killed_runs_on_and_can_be_stopped(folder):
    process = begin(folder, STAYS)
    psutil.Process(process).parent().kill()
    with pytest.raises(DeployError, match=f"runs already, as process {process}"):
        begin(folder, STAYS)
    assert stop(folder, NAME, seconds=1) and pid_of(folder, NAME) is None
