"""The benchmark of embedding on few texts: what it writes adds up, and bad input is told."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest

from benchmarks.embed_speed import SIDES, texts_of
from tests import compiling


def benchmark(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.embed_speed", *map(str, arguments)]
    return subprocess.run(command, env=compiling.environment(), capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.multiprocess
def test_both_sides_are_measured_in_each_round(tmp_path):
    sizes = ("--words=5", "--dtypes=float32", "--texts=8", "--rounds=2")
    done = benchmark(*sizes, f"--out={tmp_path}")
    assert done.returncode == 0, done.stderr
    written = json.loads((tmp_path / "embed_speed.json").read_text())
    ((name, case),) = written["cases"].items()
    assert name == "5 words, float32" and written["settings"]["texts"] == 8
    for clock, ratio in (("wall", "ratio"), ("processor", "processor_ratio")):
        ours, theirs = (np.array(case[clock][side]) for side in SIDES)
        assert len(ours) == len(theirs) == 2 and (ours > 0).all() and (theirs > 0).all()
        assert case[ratio]["value"] == pytest.approx(np.median(theirs) / np.median(ours))
    assert (tmp_path / "embed_speed.md").read_text() in done.stdout


@pytest.mark.multiprocess
def test_an_unknown_dtype_is_told():
    done = benchmark("--dtypes=float16")
    assert (done.returncode, done.stdout) == (2, "")
    told = "--dtypes: unknown 'float16'. Did you mean 'bfloat16'?"
    assert told in done.stderr.strip().splitlines()[-1]


def test_texts_have_about_as_many_words_as_asked_for():
    counts = [len(text.split()) for text in texts_of(24, 200)]
    assert min(counts) == 18 and max(counts) == 30 and len(counts) == 200
