"""Files of disks and objects of buckets behave alike, against servers of both protocols on
loopback."""

from __future__ import annotations

import dataclasses
import http.server
import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from kafjax.core import bucket_lock, paths, rundir
from kafjax.core.config import Config, option
from kafjax.core.errors import UserError
from kafjax.core.lock import hold
from kafjax.core.paths import as_path

ROOT = Path(__file__).parents[2]


def test_files_are_written_read_and_deleted(place):
    folder = as_path(place) / "runs"
    file = folder / "a" / "config.json"
    assert not file.exists() and not folder.is_dir()
    rundir.write_json(file, {"rank": 4})
    assert rundir.read_object(file) == {"rank": 4} and file.is_file() and folder.is_dir()
    rundir.write_json(file, {"rank": 5})
    assert rundir.read_object(file) == {"rank": 5}
    assert [str(one) for one in folder.glob("*/config.json")] == [f"{place}/runs/a/config.json"]
    assert paths.size(file) == len(paths.read(file))
    with pytest.raises(UserError, match="larger than the 0 MB"):
        rundir.read_bytes(file, most=3)
    with paths.local(file) as here:
        assert here.read_bytes() == paths.read(file)
    paths.delete(folder / "a")
    paths.delete(folder / "nothing")
    assert not file.exists()
    with pytest.raises(UserError, match="cannot read"):
        rundir.read_object(file)


def test_one_of_many_makes_a_file(place):
    folder, made = as_path(place), []
    paths.make_folder(folder)
    barrier = threading.Barrier(8)

    def race(number: int) -> None:
        barrier.wait()
        for name in range(3):
            if paths.create(folder / str(name), b"%d" % number):
                made.append((name, number))

    threads = [threading.Thread(target=race, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(name for name, _ in made) == [0, 1, 2]
    assert all(paths.read(folder / str(name)) == b"%d" % number for name, number in made)


@pytest.mark.parametrize("place", ["google", "amazon"], indirect=True)
def test_object_is_replaced_only_if_it_is_the_one_that_was_read(place):
    file = as_path(place) / "lease"
    assert paths.version(file) is None and not paths.swap(file, "1", b"x")
    assert paths.swap(file, None, b"one") and not paths.swap(file, None, b"two")
    seen = paths.version(file)
    assert paths.swap(file, seen, b"two") and not paths.swap(file, seen, b"three")
    assert paths.read(file) == b"two"


def test_rows_are_there_before_what_is_written_after_them(place, monkeypatch):
    monkeypatch.setattr(paths, "FLUSH_SECONDS", 60.0)
    folder = as_path(place)
    for step in range(3):
        rundir.append_jsonl(folder / "metrics.jsonl", {"step": step})
    assert (folder / "metrics.jsonl").exists() == (not paths.is_address(folder))
    rundir.write_json(folder / "result.json", {})
    assert len(folder.joinpath("metrics.jsonl").read_text().splitlines()) == 3
    rundir.append_jsonl(folder / "metrics.jsonl", {"step": 3})
    # who reads here sees what waits, and whoever writes next goes on behind it
    assert [row["step"] for row in rundir.read_jsonl(folder / "metrics.jsonl")] == [0, 1, 2, 3]
    paths.forget(folder)
    rundir.append_jsonl(folder / "metrics.jsonl", {"step": 4})
    assert len(rundir.read_jsonl(folder / "metrics.jsonl")) == 5


def test_rows_of_a_killed_process_end_with_a_whole_line(google, tmp_path):
    address = f"{google}/cut/metrics.jsonl"
    code = (
        "import os, signal, time\nfrom kafjax.core import paths, rundir\n"
        f"paths.FLUSH_SECONDS = 0.1\nfile = paths.as_path({address!r})\n"
        "for step in range(3): rundir.append_jsonl(file, {'step': step})\n"
        "time.sleep(1)\nrundir.append_jsonl(file, {'step': 3})\nos.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == -9
    rows = rundir.read_jsonl(as_path(address))
    assert [row["step"] for row in rows] in ([0, 1, 2], [0, 1, 2, 3])


@pytest.mark.parametrize("place", ["google", "amazon"], indirect=True)
def test_one_writer_a_folder_and_a_dead_one_is_succeeded(place, monkeypatch):
    monkeypatch.setattr(bucket_lock, "SILENCE", 0.6)
    monkeypatch.setattr(bucket_lock, "BEAT", 0.1)
    monkeypatch.setattr(bucket_lock, "_LOOK", 0.1)
    folder = as_path(place) / "run"
    code = (
        "import sys\nfrom kafjax.core import bucket_lock\nbucket_lock.BEAT = 0.1\n"
        "from kafjax.core.lock import hold\n"
        f"with hold({str(folder)!r}): print('held', flush=True); sys.stdin.read()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert other.stdout.readline() == "held\n"
    with pytest.raises(UserError, match=f"is being written by process {other.pid} on"):
        hold(folder)
    other.kill()
    other.communicate()
    with hold(folder) as lock, hold(folder):
        time.sleep(0.3)
    lock.release()
    with hold(folder):  # free at once: it was given back
        pass


def test_holder_that_was_thought_dead_ends_when_it_finds_out(google):
    folder = f"{google}/frozen/run"
    code = (
        "import time\nfrom kafjax.core import bucket_lock\nbucket_lock.BEAT = 0.2\n"
        "from kafjax.core.lock import hold\n"
        f"with hold({folder!r}): print('held', flush=True); time.sleep(60)"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert other.stdout.readline() == "held\n"
    where = as_path(f"{google}/frozen/.run.lock")
    while not paths.swap(where, paths.version(where), b'{"pid": 7, "host": "elsewhere"}'):
        pass
    _, told = other.communicate(timeout=30)
    assert other.returncode == bucket_lock.TAKEN_OVER
    assert "was taken over by process 7 on elsewhere" in told


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("gs://no-such-bucket/runs", "cannot open gs://no-such-bucket .*gcloud auth"),
        ("s3://no-such-bucket/runs", "cannot open s3://no-such-bucket .*does not exist.*aws"),
        ("hf://x/y", "hf:// is not read or written here"),
        ("gs://", "names no bucket"),
    ],
)
def test_bucket_that_cannot_be_opened_is_told(address, message, google, amazon):
    with pytest.raises(UserError, match=message):
        as_path(address)


def test_bucket_that_does_not_answer_is_told(google, monkeypatch):
    monkeypatch.setattr(paths, "REACH_SECONDS", 0.2)
    monkeypatch.setattr(paths, "_filesystem", lambda scheme: time.sleep(1))
    with pytest.raises(UserError, match=r"gs://silent does not answer within 0\.2 s"):
        as_path("gs://silent/x")


def test_missing_package_is_told(monkeypatch):
    monkeypatch.setattr(paths.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"gs:// needs gcsfs: pip install 'kafjax\[gcs\]'"):
        as_path("gs://bucket/x")


def test_bucket_that_wants_credentials_says_how_to_get_them(google, monkeypatch):
    """Serves what Google answers a caller without any."""
    reason = "Anonymous caller does not have storage.objects.list access to the bucket."
    told = {"error": {"code": 401, "message": reason, "errors": [{"reason": "required"}]}}

    class Refuses(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(401)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(json.dumps(told).encode())

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refuses)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(paths, "_filesystem", paths._filesystem.__wrapped__)
    paths._reach.cache_clear()
    with pytest.raises(UserError, match=r"Anonymous caller does not have .*gcloud auth") as told_us:
        as_path("gs://private/x")
    assert "\n" not in str(told_us.value)
    server.shutdown()


def test_folders_that_are_renamed_are_refused_on_buckets(google):
    with pytest.raises(UserError, match="is renamed when it is whole, which a bucket cannot"):
        with rundir.new_folder(as_path(f"{google}/x")):
            raise AssertionError("entered")


def test_settings_say_which_folders_may_be_addresses():
    @dataclasses.dataclass(frozen=True)
    class Folders(Config):
        runs: str = option("runs", "May be.", path=True, bucket=True)
        index: str = option("index", "May not.", path=True)

    assert Folders(runs="gs://b/r").runs == "gs://b/r"
    with pytest.raises(UserError, match="copy it to a folder of this machine"):
        Folders(index="gs://b/r")
