"""The ledger, with real processes: done is skipped; failed, preempted and dead are told apart;
workers that race share the runs."""

from __future__ import annotations

import dataclasses
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from kafjax.core.errors import UserError
from kafjax.core.rundir import read_json, read_jsonl, write_json
from launch import sweep
from launch.config import Launch
from launch.ledger import Ledger, Pulse
from launch.spec import Points, Sweep, product
from launch.worker import Pool, Slot, slots
from tests.launch import killed
from tests.launch.toy import Toy
from tests.multiprocess.launch import Crowd

ROOT = Path(__file__).parents[2]
TOY = "tests.launch.toy"
FAST = {"lease_seconds": 1.0, "retries": 2}


@pytest.fixture(autouse=True)
def _from_the_checkout(monkeypatch):
    """Toys are started by `python -m tests.launch.toy`."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


def toys(folder: Path, points: Points, **base: object) -> Ledger:
    ledger = Ledger(folder, Sweep(dataclasses.replace(Toy(), **base), points, TOY).runs())
    ledger.check()
    return ledger


def run(folder: Path, **settings: object) -> None:
    sweep.run(Launch(folder=str(folder), **{"cores_per_run": 1, **FAST, **settings}))


def starts(ledger: Ledger, index: int = 0) -> list[dict]:
    file = ledger.run_folders / ledger.runs[index].id / "starts.jsonl"
    return read_jsonl(file) if file.exists() else []


@pytest.fixture
def worker(start_sweep) -> Callable[..., Crowd]:
    def worker(folder: Path, *flags: str) -> Crowd:
        return start_sweep(f"--folder={folder}", "--lease_seconds=2", "--cores=1", *flags)

    return worker


def until(true: Callable[[], object], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.05)


def names(ledger: Ledger, retries: int = 2) -> list[str]:
    return [ledger.state(run, retries).name for run in ledger.runs]


def test_runs_once_and_never_again(tmp_path, capfd):
    ledger = toys(tmp_path, product(rank=[1, 2], lr=[0.5]), text="; touch x $(touch y)")
    ledger.create()
    run(tmp_path)
    run(tmp_path)
    assert [len(starts(ledger, index)) for index in range(2)] == [1, 1] and names(ledger) == [
        "done",
        "done",
    ]
    result = read_json(ledger.run_folders / ledger.runs[1].id / "result.json")
    # no shell has read it
    assert result["final_loss"] == 1.0 and result["text"] == "; touch x $(touch y)"
    assert "2 runs: 2 done." in capfd.readouterr().out


def test_failed_are_retried_and_preempted_not_counted(tmp_path, capfd):
    ledger = toys(tmp_path, product(fails=[2, 9], preempts=[4]))
    ledger.create()
    with pytest.raises(UserError, match="1 of 2 runs failed"):
        run(tmp_path)
    assert names(ledger) == ["done", "failed"]
    first, second = (ledger.state(one, 2) for one in ledger.runs)
    assert [first.count(how) for how in ("failed", "preempted", "done")] == [2, 4, 1]
    assert (
        second.count("failed") == 3
        and "failed 3 times; error: told to fail at start 3" in second.told
    )
    told = capfd.readouterr()
    assert (
        "attempt 3 failed: error: told to fail at start 3" in told.err
        and "told to fail at start 3" in told.out
    )
    with pytest.raises(UserError):
        run(tmp_path)
    assert len(starts(ledger, 1)) == 3  # no more than the retries allow
    with pytest.raises(UserError):
        run(tmp_path, retries=3)
    assert len(starts(ledger, 1)) == 4


def test_fail_fast_starts_nothing_more(tmp_path):
    ledger = toys(tmp_path, product(fails=[9, 0]))
    ledger.create()
    with pytest.raises(UserError, match="1 of 2 runs failed"):
        run(tmp_path, fail_fast=True, retries=0, cores=1)
    assert names(ledger, 0) == ["failed", "pending"] and not starts(ledger, 1)


def test_one_of_many_claims_a_run(tmp_path):
    ledger = toys(tmp_path, product(rank=range(1, 6)))
    ledger.create()
    won: list[tuple[str, int]] = []
    barrier = threading.Barrier(8)

    def race(number: int) -> None:
        mine, pulse = Ledger.read(tmp_path), Pulse()
        barrier.wait()
        won.extend(
            (one.id, number)
            for one in mine.runs
            if mine.claim(one, pulse, retries=0, lease_seconds=60)
        )

    threads = [threading.Thread(target=race, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(id for id, _ in won) == sorted(one.id for one in ledger.runs)


def test_silent_lease_expires_and_its_worker_gives_up(tmp_path):
    ledger = toys(tmp_path, product(rank=[1]))
    ledger.create()
    (one,) = ledger.runs
    first = ledger.claim(one, Pulse(), retries=0, lease_seconds=0.3)
    other = Pulse()
    assert ledger.claim(one, other, retries=0, lease_seconds=0.3) is None
    time.sleep(0.2)
    # it lives
    assert first.beat(1) and ledger.claim(one, other, retries=0, lease_seconds=0.3) is None
    time.sleep(0.2)
    # 0.2 s since its last sign
    assert ledger.claim(one, other, retries=0, lease_seconds=0.3) is None
    time.sleep(0.4)
    second = ledger.claim(one, other, retries=0, lease_seconds=0.3)
    assert second.number == 2 and not first.beat(2) and second.beat(1)


def test_lease_that_was_never_filled_expires_too(tmp_path, monkeypatch):
    ledger = toys(tmp_path, product(rank=[1]))
    ledger.create()
    (one,) = ledger.runs
    (ledger.entry(one) / "attempt-0001.json").touch()  # killed between making and writing it
    pulse, now = Pulse(), time.monotonic()
    assert (
        "an unknown machine" in ledger.state(one, 0).told
        and ledger.claim(one, pulse, retries=0, lease_seconds=1) is None
    )
    monkeypatch.setattr(time, "monotonic", lambda: now + 61)
    assert ledger.claim(one, pulse, retries=0, lease_seconds=1).number == 2


def test_other_sweep_in_a_folder_is_refused_and_a_grown_one_goes_on(tmp_path):
    ledger = toys(tmp_path, product(rank=[1, 2]))
    ledger.create()
    run(tmp_path)
    with pytest.raises(UserError, match="holds another sweep: 1 of its 2 runs are not in this one"):
        toys(tmp_path, product(rank=[2, 3]))
    grown = toys(tmp_path, product(rank=[1, 2, 3]))
    grown.create()
    run(tmp_path)
    assert [len(starts(grown, index)) for index in range(3)] == [1, 1, 1]


def test_looking_writes_nothing(tmp_path, capsys):
    spec = tmp_path / "mine.py"
    spec.write_text(
        "from launch.spec import *\nfrom tests.launch.toy import Toy\n"
        "sweep = Sweep(Toy(fails=9), product(rank=[1, 2]), 'tests.launch.toy')\n"
    )
    folder = tmp_path / "folder"
    sweep.run(Launch(spec=str(spec), folder=str(folder), dry_run=True))
    assert "2 of 2 runs are left" in capsys.readouterr().out and not folder.exists()
    with pytest.raises(UserError, match="2 of 2 runs failed"):
        sweep.run(Launch(spec=str(spec), folder=str(folder), retries=0))
    before = sorted((path, path.stat().st_mtime_ns) for path in folder.rglob("*"))
    sweep.run(Launch(folder=str(folder), watch=True, retries=0))
    sweep.run(Launch(folder=str(folder), dry_run=True, retries=0))
    assert "failed once; error: told to fail at start 1" in capsys.readouterr().out
    assert before == sorted((path, path.stat().st_mtime_ns) for path in folder.rglob("*"))


def test_difference_of_code_or_weights_is_told(tmp_path, capsys):
    ledger = toys(tmp_path, product(rank=[1, 2, 3]))
    ledger.create()
    Pool(ledger, Launch(**FAST), [Slot((0,))], git_sha="0123abc").run(lambda: None)
    for one, weights in zip(ledger.runs, ("aa", "aa", "bb"), strict=True):
        file = ledger.run_folders / one.id / "result.json"
        write_json(file, {**read_json(file), "environment": {"weights": weights}})
    sweep.run(Launch(folder=str(tmp_path), dry_run=True))
    out = capsys.readouterr().out
    assert "3 runs were computed by commit 0123abc, and this is " in out
    assert "Finished runs began from different weights: 2 from aa, 1 from bb." in out


def test_slots_keep_the_budget(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    assert [slot.cores for slot in slots(Launch(cores=6, cores_per_run=2))] == [
        (0, 1),
        (2, 3),
        (4, 5),
    ]
    assert [slot.devices for slot in slots(Launch(devices=(0, 1, 2, 3), devices_per_run=2))] == [
        (0, 1),
        (2, 3),
    ]
    assert [len(slot.cores) for slot in slots(Launch(devices=(4, 5)))] == [4, 4] and len(
        slots(Launch())
    ) == 1
    assert slots(Launch(devices=(4, 5)))[1].environment()["CUDA_VISIBLE_DEVICES"] == "5"
    for bad, message in (
        ({"cores": 9}, "this machine has 8"),
        ({"cores": 2, "cores_per_run": 3}, "the budget is 2 cores"),
        ({"devices": (1, 1)}, "names a device twice"),
        ({"devices": (1,), "devices_per_run": 2}, "--devices names 1"),
    ):
        with pytest.raises(UserError, match=message):
            slots(Launch(**bad))


def test_run_sees_only_what_its_slot_has(tmp_path):
    ledger = toys(tmp_path, product(rank=[1, 2, 3]), seconds=0.3)
    ledger.create()
    cores = sorted(os.sched_getaffinity(0))
    places = [Slot((cores[0],), (4,)), Slot((cores[-1],), (5,))]
    Pool(ledger, Launch(**FAST), places).run(lambda: None)
    seen = [starts(ledger, index)[0] for index in range(3)]
    assert {(tuple(one["cores"]), one["devices"]) for one in seen} == {
        ((cores[0],), "4"),
        ((cores[-1],), "5"),
    }
    ends = [read_json(ledger.run_folders / one.id / "result.json")["ended"] for one in ledger.runs]
    assert sorted(one["began"] for one in seen)[2] > min(ends)  # never three at a time


@pytest.mark.multiprocess
def test_racing_workers_share_the_runs(worker, tmp_path):
    ledger = toys(tmp_path, product(rank=range(1, 13)), seconds=0.2)
    ledger.create()
    workers = [worker(tmp_path) for _ in range(3)]
    ended = [outcome for one in workers for outcome in one.ended()]
    assert [outcome.code for outcome in ended] == [0, 0, 0], ended
    assert [len(starts(ledger, index)) for index in range(12)] == [1] * 12
    # not one of them did all
    assert len({ledger.state(one, 0).attempts[0].pid for one in ledger.runs}) > 1
    assert all("12 runs: 12 done." in outcome.out for outcome in ended)


@pytest.mark.multiprocess
def test_sweep_killed_twenty_times_and_raced_equals_one_left_alone(tmp_path):
    points = product(rank=range(1, 7), seed=range(4))
    whole, other = (toys(tmp_path / name, points, steps=2, seconds=0.3) for name in ("a", "b"))
    for ledger in (whole, other):
        ledger.create()
    Pool(whole, Launch(**FAST), [Slot((core,)) for core in os.sched_getaffinity(0)]).run(
        lambda: None
    )
    ended = killed.disturb(other.folder, killed.N_KILLS, (0.2, 1.2), lanes=1)
    assert len(other.runs) == killed.N_RUNS and ended.total() >= killed.N_KILLS - 2
    assert len(ended) == 3 and names(other) == ["done"] * killed.N_RUNS
    told = killed.attempts(other)
    assert told["done"] == killed.N_RUNS and told["failed"] == 0 and told["lost"] > 0
    assert 0 < told["preempted"] <= ended["preempted"]
    for run in other.runs:
        results, steps = [], []
        for ledger in (whole, other):
            folder = ledger.run_folders / run.id
            results.append({**read_json(folder / "result.json"), "ended": None})
            steps.append([row["step"] for row in read_jsonl(folder / "metrics.jsonl")])
        assert results[0] == results[1] and steps[0] == steps[1] == [0, 1]


@pytest.mark.multiprocess
def test_run_of_a_killed_worker_is_taken_over_when_its_orphan_is_done(worker, tmp_path):
    ledger = toys(tmp_path, product(rank=[1]), steps=8, seconds=0.5)
    ledger.create()
    first = worker(tmp_path)
    until(lambda: starts(ledger))
    first.kill()
    first.ended()
    # the lease expires after 2 s, the orphan writes for 4
    (second,) = worker(tmp_path).ended()
    assert second.code == 0, second
    steps = read_jsonl(ledger.run_folders / ledger.runs[0].id / "metrics.jsonl")
    assert [row["step"] for row in steps] == list(range(8))  # nobody wrote beside it
    assert [attempt.outcome is None for attempt in ledger.state(ledger.runs[0], 0).attempts] == [
        True,
        False,
    ]
    assert len(starts(ledger)) == 2 and "failed" not in second.out + second.err


@pytest.mark.multiprocess
def test_sigterm_leaves_the_run_open_and_the_next_start_goes_on(worker, tmp_path):
    ledger = toys(tmp_path, product(rank=[1, 2]), steps=8, seconds=0.3)
    ledger.create()
    first = worker(tmp_path)
    until(lambda: (ledger.run_folders / ledger.runs[0].id / "metrics.jsonl").exists())
    first.signal(0, signal.SIGTERM)
    (outcome,) = first.ended()
    assert outcome.code == 143 and "stopped by SIGTERM" in outcome.err, outcome
    assert (
        names(ledger, 0) == ["pending", "pending"]
        and ledger.state(ledger.runs[0], 0).told == "preempted once"
    )
    assert not starts(ledger, 1)
    (second,) = worker(tmp_path, "--retries=0").ended()
    assert second.code == 0, second
    steps = read_jsonl(ledger.run_folders / ledger.runs[0].id / "metrics.jsonl")
    assert [row["step"] for row in steps] == list(range(8))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give a SPEC"),
        (["--folder=nowhere"], "nowhere holds no sweep"),
        (["rank_rate_sed"], "Did you mean 'rank_rate_seed'?"),
        (["rank_rate_seed", "--folder=hf://b/r"], "hf:// is not read or written here"),
        (["rank_rate_seed", "depth_retriever"], "unexpected argument 'depth_retriever'"),
        (["rank_rate_seed", "--retry=3"], "Unknown command line flag 'retry'"),
    ],
)
def test_bad_commands_are_told_in_a_line(start_sweep, arguments, message):
    (outcome,) = start_sweep(*arguments).ended()
    assert outcome.code == 2
    assert message in outcome.err and outcome.err.startswith("error:")
    assert outcome.err.count("\n") == 1
