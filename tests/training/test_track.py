"""The mirror of a run to wandb, offline: its id outlives resumes and folders, and figures and
tables are in it."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from kafjax.core.errors import UserError
from kafjax.core.paths import as_path
from kafjax.training.track import tracker

# the log is compressed: what repeats nothing before it stands there as it is
GROUP = "qzvkxw"
CONFIG = {"rank": 4, "seed": 0}


def ids(folder: Path) -> set[str]:
    return {file.name.rpartition("-")[2] for file in folder.glob("wandb/offline-run-*")}


def test_id_and_group_are_the_same_after_a_resume_and_elsewhere(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_RUN_GROUP", GROUP)
    png = bytes.fromhex(
        "89504e470d0a1a0a0000000d49484452000000010000000108000000003a7e9b55"
        "0000000a49444154789c63f80f00010101001bb6ee560000000049454e44ae426082"
    )
    for folder in (tmp_path / "a" / "run", tmp_path / "a" / "run", tmp_path / "b" / "run"):
        with tracker(folder, "offline", CONFIG) as track:
            track(label="lora", step=1, loss=2.0)
            track.figure("loss", png)
            track.table("answers", ("question", "model"), [("Who?", "Mira")])
            track.summary({"final_loss": 2.0, "environment": {}})
    first, second = ids(tmp_path / "a" / "run"), ids(tmp_path / "b" / "run")
    assert first == second and len(first) == 1
    with tracker(tmp_path / "c" / "run", "offline", {**CONFIG, "seed": 1}) as track:
        pass
    assert ids(tmp_path / "c" / "run") != first
    (media,) = tmp_path.glob("b/run/wandb/offline-run-*/files/media")
    assert list(media.rglob("*.png"))
    (table,) = media.rglob("*.table.json")
    assert json.loads(table.read_text())["data"] == [["Who?", "Mira"]]
    log = next(tmp_path.glob("b/run/wandb/offline-run-*/*.wandb")).read_bytes()
    assert GROUP.encode() in log


def test_two_runs_of_one_process_are_two(tmp_path):
    with (
        tracker(tmp_path / "a", "offline", CONFIG) as one,
        tracker(tmp_path / "b", "offline", CONFIG) as other,
    ):
        one(label="lora", step=1, loss=1.0)
        other(label="lora", step=1, loss=2.0)
    assert (
        ids(tmp_path / "a") and ids(tmp_path / "b") and ids(tmp_path / "a") != ids(tmp_path / "b")
    )


def test_off_does_nothing_and_refusals_are_told(tmp_path, monkeypatch, google):
    with tracker(tmp_path / "run", "off", CONFIG) as track:
        track(label="lora", step=1, loss=1.0)
        track.table("answers", ("question",), [("Who?",)])
        track.figure("loss", b"")
    assert not list(tmp_path.iterdir())
    with pytest.raises(UserError, match="give --wandb=online"):
        with tracker(as_path(f"{google}/run"), "offline", CONFIG):
            pass
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="pip install wandb"):
        with tracker(tmp_path / "run", "online", CONFIG):
            pass
    assert os.listdir(tmp_path) == []
