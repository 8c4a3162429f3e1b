from __future__ import annotations

import shutil
import subprocess
import sys
import textwrap
import time
import types
import uuid

import absl.logging
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kafjax.core import paths
from kafjax.core.errors import UserError
from kafjax.core.paths import as_path
from kafjax.training import checkpoint
from kafjax.training.checkpoint import _JOURNAL, Checkpoints
from kafjax.training.config import TrainConfig
from kafjax.training.loop import refuse_checkpoints
from kafjax.training.step import TrainState


def state(step: int) -> TrainState:
    noise = np.random.default_rng(step).standard_normal((64, 64)).astype(np.float32)
    return TrainState(
        jnp.int32(step),
        {"layers/q_proj/kernel": {"a": jnp.asarray(noise)}},
        (jnp.full((8,), float(step)), ()),
    )


def abstract() -> TrainState:
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state(0)
    )


def same(a, b) -> bool:
    return jax.tree.structure(a) == jax.tree.structure(b) and jax.tree.all(
        jax.tree.map(np.array_equal, a, b)
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Checkpoints of steps 1, 2 and 3, of which the last two are kept."""
    folder = tmp_path_factory.mktemp("saved") / "checkpoints"
    with Checkpoints(folder, "fingerprint") as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, state(step), {"losses": [0.1] * step})
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "checkpoints")


def test_round_trip_keeps_the_last_two(folder):
    with Checkpoints(folder, "fingerprint") as checkpoints:
        assert checkpoints.steps() == [2, 3]
        found, history = checkpoints.restore(abstract())
    assert same(found, state(3)) and history == {"losses": [0.1] * 3}


def test_nothing_saved_nothing_found(tmp_path):
    with Checkpoints(tmp_path / "new", "fingerprint") as checkpoints:
        assert checkpoints.restore(abstract()) is None


def largest_file(folder):
    return max(
        (path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size
    )


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "array cut short": lambda folder: truncate(largest_file(folder)),
    "one bit of an array": lambda folder: flip_a_bit(largest_file(folder)),
    "array missing": lambda folder: largest_file(folder).unlink(),
    "manifest cut short": lambda folder: truncate(folder / "state" / "manifest.ocdbt"),
    "notes cut short": lambda folder: truncate(folder / "notes" / "metadata"),
    "of another step": lambda folder: (
        shutil.rmtree(folder),
        shutil.copytree(folder.with_name("2"), folder),
    ),
    "emptied": lambda folder: [path.unlink() for path in folder.rglob("*") if path.is_file()],
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_damaged_checkpoint_is_told_set_aside_and_passed_over(folder, damage, capsys):
    damage(folder / "3")
    with Checkpoints(folder, "fingerprint") as checkpoints:
        found, history = checkpoints.restore(abstract())
        assert same(found, state(2)) and len(history["losses"]) == 2
        told = capsys.readouterr().err.splitlines()
        assert len(told) == 1 and "step 3 is damaged" in told[0]
        checkpoints.save(3, state(3), history)  # the step can be saved again
        assert same(checkpoints.restore(abstract())[0], state(3))
    assert list((folder.parent / "checkpoints-damaged").iterdir())


def test_another_fingerprint_is_refused_and_nothing_is_moved(folder):
    with (
        Checkpoints(folder, "other") as checkpoints,
        pytest.raises(UserError, match="another model, settings or data"),
    ):
        checkpoints.restore(abstract())
    with Checkpoints(folder, "fingerprint") as checkpoints:
        assert checkpoints.steps() == [2, 3]


SAVE_FOREVER = """
    import sys, pathlib, jax.numpy as jnp
    from kafjax.training.checkpoint import Checkpoints
    from kafjax.training.step import TrainState

    with Checkpoints(pathlib.Path(sys.argv[1]), "fingerprint") as checkpoints:
        for step in range(1, 1000):
            checkpoints.save(step, TrainState(jnp.int32(step), {"w": jnp.full((4_000_000,), float(step))}, ()), {})
"""


@pytest.mark.multiprocess
def test_kill_in_the_middle_of_a_save_leaves_the_one_before(tmp_path):
    folder = tmp_path / "checkpoints"
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(SAVE_FOREVER), str(folder)])
    try:
        deadline = time.monotonic() + 120
        while not (folder / "2").exists() or not (unfinished := list(folder.glob("*tmp*"))):
            assert time.monotonic() < deadline and process.poll() is None
        process.kill()
    finally:
        process.kill()
        process.wait()
    assert unfinished
    shape = TrainState(jnp.int32(0), {"w": jnp.zeros(4_000_000)}, ())
    with Checkpoints(folder, "fingerprint") as checkpoints:
        steps = checkpoints.steps()
        found, _ = checkpoints.restore(
            jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), shape
            )
        )
    assert int(found.step) == steps[-1] >= 2
    assert (found.trainable["w"] == float(steps[-1])).all()


SAVE_ON_A_FULL_DISK = """
    import resource, sys, pathlib, numpy as np, jax.numpy as jnp
    from kafjax.core.errors import UserError
    from kafjax.training.checkpoint import Checkpoints
    from kafjax.training.step import TrainState

    noise = np.random.default_rng(0).standard_normal(500_000).astype(np.float32)
    state = lambda step: TrainState(jnp.int32(step), {"w": jnp.asarray(noise) + step}, ())
    with Checkpoints(pathlib.Path(sys.argv[1]), "fingerprint") as checkpoints:
        checkpoints.save(1, state(1), {})
        checkpoints.wait()
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # from here on no file can grow past this
        try:
            checkpoints.save(2, state(2), {})
            checkpoints.wait()
        except UserError as error:
            print(error)
    """


@pytest.mark.multiprocess
def test_full_disk_leaves_the_one_before_and_is_told_in_a_line(tmp_path):
    folder = tmp_path / "checkpoints"
    script = [sys.executable, "-c", textwrap.dedent(SAVE_ON_A_FULL_DISK), str(folder)]
    done = subprocess.run(script, capture_output=True, text=True, timeout=300)
    told = done.stdout.splitlines()
    assert (
        len(told) == 1
        and "cannot save the checkpoint of step 2" in told[0]
        and "step 1 is still good" in told[0]
    ), done
    shape = TrainState(jnp.int32(0), {"w": jnp.zeros(500_000)}, ())
    with Checkpoints(folder, "fingerprint") as checkpoints:
        found, _ = checkpoints.restore(
            jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), shape
            )
        )
    assert int(found.step) == 1


def test_a_folder_that_cannot_be_made_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write checkpoints"):
        Checkpoints(tmp_path / "file" / "checkpoints", "fingerprint")


def test_a_save_writes_what_has_been_added_to_the_history(tmp_path):
    curve = [{"step": step, "loss": 1 / step} for step in range(1, 2001)]
    with Checkpoints(tmp_path / "checkpoints", "fingerprint") as checkpoints:
        for step in (10, 2000):
            checkpoints.save(step, state(1), {"seconds": 1.5, "curve": curve[:step]})
        checkpoints.wait()
        small, large = (
            (tmp_path / "checkpoints" / str(step) / "notes" / "metadata").stat().st_size
            for step in (10, 2000)
        )
        assert large - small < 20
        assert len((tmp_path / "checkpoints" / "history.jsonl").read_text().splitlines()) == 2000
    with Checkpoints(tmp_path / "checkpoints", "fingerprint") as checkpoints:
        assert checkpoints.restore(abstract())[1] == {"seconds": 1.5, "curve": curve}


def test_going_on_from_an_earlier_checkpoint_forgets_the_lines_behind_it(folder):
    shutil.rmtree(folder / "3")
    with Checkpoints(folder, "fingerprint") as checkpoints:
        _, history = checkpoints.restore(abstract())
        assert history == {"losses": [0.1] * 2}
        checkpoints.save(3, state(3), {"losses": [0.1, 0.1, 0.7]})
    with Checkpoints(folder, "fingerprint") as checkpoints:
        assert checkpoints.restore(abstract())[1] == {"losses": [0.1, 0.1, 0.7]}


def test_a_history_that_is_cut_short_falls_back_to_what_it_still_holds(folder, capsys):
    journal = folder / "history.jsonl"
    journal.write_bytes(journal.read_bytes()[:-3])
    with Checkpoints(folder, "fingerprint") as checkpoints:
        found, history = checkpoints.restore(abstract())
        assert same(found, state(2)) and history == {"losses": [0.1] * 2}
    assert (
        "the checkpoint of step 3 is damaged (history.jsonl does not hold what it refers to)"
        in capsys.readouterr().err
    )


SAVE_WHERE_THE_FOLDER_IS_GONE = """
    import contextlib, pathlib, shutil, sys, jax.numpy as jnp
    from kafjax.core.errors import run_main
    from kafjax.training.checkpoint import Checkpoints
    from kafjax.training.step import TrainState

    def main(_):
        folder = pathlib.Path(sys.argv[0])
        with Checkpoints(folder, "fingerprint") as checkpoints:
            for step in (1, 2, 3):
                checkpoints.save(step, TrainState(jnp.int32(step), {f"w{i}": jnp.ones((50, 50)) for i in range(60)}, ()), {})
                while step == 2 and not folder.is_file():  # the save that is running may make it anew
                    shutil.rmtree(folder, ignore_errors=True)
                    with contextlib.suppress(IsADirectoryError):
                        folder.write_text("a file")

    sys.argv = sys.argv[1:]
    run_main(main)
    """


@pytest.mark.multiprocess
def test_the_process_of_a_failed_save_ends_with_its_one_line(tmp_path):
    """Many arrays are still being written when the first one fails."""
    script = [
        sys.executable,
        "-W",
        "ignore",
        "-c",
        textwrap.dedent(SAVE_WHERE_THE_FOLDER_IS_GONE),
        str(tmp_path / "checkpoints"),
    ]
    done = subprocess.run(script, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2, done
    told = done.stderr.splitlines()
    assert len(told) == 1 and told[0].startswith("error: cannot save the checkpoint of step"), (
        done.stderr
    )


def test_late_writes_of_a_failed_save_are_silent_and_other_errors_are_not(monkeypatch):
    told = []
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: told.append(unraisable.exc_value))
    checkpoint._silence_late_writes.__wrapped__()
    late, other, another = (
        RuntimeError("Event loop is closed"),
        RuntimeError("other"),
        ValueError("Event loop is closed"),
    )
    for error in (late, other, another):
        sys.unraisablehook(types.SimpleNamespace(exc_type=type(error), exc_value=error))
    assert told == [other, another]


def test_warnings_of_this_project_are_heard_beside_silent_saves(tmp_path, caplog):
    with Checkpoints(tmp_path / "checkpoints", "fingerprint"):
        caplog.clear()
        absl.logging.warning("heard")
    assert "heard" in caplog.text and "orbax" not in caplog.text


def test_checkpoint_in_a_bucket_that_orbax_does_not_know_counts_once_it_is_whole(amazon):
    folder = as_path(f"{amazon}/{uuid.uuid4().hex}/checkpoints")
    with Checkpoints(folder, "fingerprint") as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, state(step), {"losses": [0.1] * step})
    held = paths.files_under(folder)
    assert {name.partition("/")[0] for name in held} == {"2", "3", _JOURNAL}
    with Checkpoints(folder, "fingerprint") as checkpoints:
        found = checkpoints.restore(abstract())
        assert found is not None and same(found[0], state(3)) and found[1]["losses"] == [0.1] * 3
    # as after a kill in the upload of step 3
    paths.delete(folder / "3" / "_CHECKPOINT_METADATA")
    with Checkpoints(folder, "fingerprint") as checkpoints:
        assert checkpoints.steps() == [2]
        found = checkpoints.restore(abstract())
        assert found is not None and same(found[0], state(2)) and found[1]["losses"] == [0.1] * 2
        checkpoints.save(3, state(3), {"losses": [0.1] * 3})
    assert {name.partition("/")[0] for name in paths.files_under(folder)} == {"2", "3", _JOURNAL}


@pytest.mark.parametrize("place", ["google", "amazon"], indirect=True)
def test_damaged_checkpoint_of_a_bucket_is_set_aside(place, capsys):
    folder = as_path(f"{place}/checkpoints")
    with Checkpoints(folder, "fingerprint") as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, state(step), {"losses": [0.1] * step})
    paths.write(folder / "2" / "notes" / "metadata", b"{")
    with Checkpoints(folder, "fingerprint") as checkpoints:
        found = checkpoints.restore(abstract())
        assert found is not None and same(found[0], state(1))
        checkpoints.save(2, state(2), {"losses": [0.1] * 2})
    assert "step 2 is damaged" in capsys.readouterr().err
    aside = paths.files_under(folder.parent / "checkpoints-damaged")
    assert any(name.endswith("/notes/metadata") for name in aside)
    assert "2/_CHECKPOINT_METADATA" in paths.files_under(folder)


def test_checkpoints_of_many_processes_in_such_a_bucket_are_refused(amazon, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    runs = as_path(f"{amazon}/runs")
    with pytest.raises(UserError, match="of many processes are not written to s3://bucket/runs"):
        refuse_checkpoints(runs, TrainConfig(checkpoint_every=2))
    refuse_checkpoints(runs, TrainConfig(checkpoint_every=0))
