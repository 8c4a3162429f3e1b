"""One writer a folder, in threads, processes and on machines whose kernels do not see each other's
locks."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from kafjax.core import lock
from kafjax.core.errors import UserError
from kafjax.core.lock import hold

ROOT = Path(__file__).parents[2]
HOLD = """
import sys, time
from kafjax.core import lock
lock.BEAT = 0.2
held = lock.hold(sys.argv[1])
print("held", flush=True)
time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    """A process that holds the lock of `tmp_path / "run"`."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, tmp_path / "run"], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(lock, "BEAT", 0.05)
    monkeypatch.setattr(lock, "SILENCE", 0.4)
    monkeypatch.setattr(lock, "_LOOK", 0.02)


def test_a_second_process_is_refused_and_told_who_holds_it(holder, tmp_path):
    with pytest.raises(
        UserError,
        match=rf"run is being written by process {holder.pid} on {socket.gethostname()}; wait until",
    ):
        hold(tmp_path / "run")
    hold(tmp_path / "other").release()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_lock_whose_holder_dies_is_free_at_once(holder, tmp_path, number):
    holder.send_signal(number)
    holder.wait()
    with hold(tmp_path / "run"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_waiting_ends_when_the_holder_does(holder, tmp_path):
    threading.Timer(0.5, holder.kill).start()
    with hold(tmp_path / "run", wait_seconds=60):
        assert holder.wait() == -signal.SIGKILL


def test_a_thread_may_hold_twice_and_another_thread_not(tmp_path):
    refused: list[str] = []

    def other() -> None:
        try:
            hold(tmp_path / "run").release()
        except UserError as error:
            refused.append(str(error))

    def ask() -> None:
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()

    (tmp_path / "link").symlink_to(tmp_path / "run")
    with hold(tmp_path / "run"), hold(tmp_path / "link"):
        ask()
    assert len(refused) == 1 and "another thread of this process" in refused[0]
    ask()
    assert len(refused) == 1


def test_a_dropped_lock_is_released(tmp_path):
    held = hold(tmp_path / "run")
    assert (tmp_path / ".run.lock").exists()
    del held
    assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("ignore:os.fork:RuntimeWarning")  # the child computes nothing
def test_the_end_of_a_forked_child_leaves_the_lock_to_its_parent(tmp_path):
    with hold(tmp_path / "run") as held:
        child = os.fork()
        if child == 0:
            held.release()
            os._exit(0)
        os.waitpid(child, 0)
        assert (tmp_path / ".run.lock").exists()
        done = subprocess.run(
            [sys.executable, "-c", HOLD, tmp_path / "run"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert f"process {os.getpid()} on" in done.stderr


COUNT = """
import sys
from pathlib import Path
from kafjax.core.lock import hold
counter = Path(sys.argv[1])
for _ in range(int(sys.argv[2])):
    with hold(counter, wait_seconds=60):
        counter.write_text(str(int(counter.read_text()) + 1))
"""


def test_no_count_is_lost_between_processes_that_take_turns(tmp_path):
    (tmp_path / "counter").write_text("0")
    script = [
        sys.executable,
        "-c",
        COUNT.replace(
            "import sys", "import sys; from kafjax.core import lock; lock._LOOK = 0.001", 1
        ),
    ]
    many = [subprocess.Popen([*script, tmp_path / "counter", "60"], cwd=ROOT) for _ in range(4)]
    assert [process.wait(timeout=120) for process in many] == [0] * 4
    assert (tmp_path / "counter").read_text() == "240"


def foreign(folder: Path, beat: int = 0) -> None:
    record = {"host": "far", "pid": 7, "machine": "another kernel", "beat": beat}
    (folder / ".run.lock").write_text(json.dumps(record))


def test_a_silent_lock_of_another_machine_is_taken_over_after_it_was_watched(
    tmp_path, impatient, capsys
):
    foreign(tmp_path)
    began = time.monotonic()
    with hold(tmp_path / "run"):
        assert time.monotonic() - began >= lock.SILENCE
    assert "whether process 7 on far is alive" in capsys.readouterr().err


def test_a_lock_of_another_machine_that_shows_life_is_refused(tmp_path, impatient):
    foreign(tmp_path)
    threading.Timer(0.1, foreign, (tmp_path, 1)).start()
    with pytest.raises(UserError, match="written by process 7 on far"):
        hold(tmp_path / "run")
    assert (tmp_path / ".run.lock").exists()


def test_without_flock_a_lock_is_still_known_by_its_signs_of_life(
    holder, tmp_path, impatient, monkeypatch
):
    def none(*_):
        raise OSError(errno.ENOSYS, "no flock")

    monkeypatch.setattr(fcntl, "flock", none)
    monkeypatch.setattr(lock, "SILENCE", 5.0)
    with pytest.raises(UserError, match=f"written by process {holder.pid} on"):
        hold(tmp_path / "run")
    holder.kill()
    holder.wait()
    monkeypatch.setattr(lock, "SILENCE", 0.4)
    with hold(tmp_path / "run"), hold(tmp_path / "free"):
        pass


@pytest.mark.parametrize(
    ("address", "message"),
    [
        (Path("gs://bucket/runs"), "is an address"),
        ("file:///tmp/x", "file:// is not read or written"),
    ],
)
def test_addresses_are_no_local_folders(address, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        hold(address)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*file/run"):
        hold(tmp_path / "file" / "run")
