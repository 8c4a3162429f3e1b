"""Cells of a sweep: quality over questions and seeds, and what diverged."""

from __future__ import annotations

import numpy as np
import pytest

from kafjax.core.records import Prediction
from kafjax.evaluation import sweep
from kafjax.evaluation.intervals import wilson


def trial(rank, seed, correct, ending="finished", loss=0.5, split="paraphrase"):
    predictions = [
        Prediction(f"q{i}", "m", split, "?", "", ("a",), correct=bool(c))
        for i, c in enumerate(correct)
    ]
    return sweep.Trial(
        f"r{rank}-s{seed}", {"rank": rank, "learning rate": 1e-3}, seed, ending, loss, predictions
    )


def test_one_seed_has_wilsons_interval():
    assert sweep.crossed_mean([[1, 0, 1, 1]]) == wilson(3, 4)
    assert sweep.crossed_mean(np.ones((3, 8))) == wilson(8, 8)
    assert sweep.crossed_mean(np.ones((0, 8))).value is None


def test_the_interval_covers_the_mean_of_crossed_draws():
    """Seeds and questions both vary: the bootstrap covers the true mean about as often as it says,
    an interval over questions does not."""
    rng, covered, narrow = np.random.default_rng(0), 0, 0
    for _ in range(60):
        chance_SxQ = np.clip(
            0.5 + 0.15 * rng.standard_normal((8, 1)) + 0.15 * rng.standard_normal((1, 40)), 0, 1
        )
        scores_SxQ = (rng.random((8, 40)) < chance_SxQ).astype(float)
        interval, flat = sweep.crossed_mean(scores_SxQ), wilson(scores_SxQ.sum(), scores_SxQ.size)
        covered += interval.low <= 0.5 <= interval.high
        narrow += flat.low <= 0.5 <= flat.high
    assert covered >= 54 > narrow


def test_cells_pool_seeds_and_leave_diverged_ones_out():
    trials = [
        trial(2, 0, [1, 1, 0, 0], loss=0.4),
        trial(2, 1, [1, 0, 0, 0], loss=0.6),
        trial(4, 0, [1, 1, 1, 1]),
        trial(4, 1, [], ending="diverged", loss=None),
        trial(8, 0, [], ending="diverged", loss=None),
    ]
    two, four, eight = sweep.cells(trials)
    assert two["quality"]["paraphrase"]["value"] == 3 / 8 and two["seeds"] == [0, 1]
    assert (two["final_loss"]["value"], two["final_loss"]["low"], two["final_loss"]["high"]) == (
        0.5,
        0.4,
        0.6,
    )
    assert (four["quality"]["paraphrase"]["value"], four["diverged"]) == (1, 1)
    assert (eight["quality"], eight["final_loss"]["value"], eight["diverged"]) == ({}, None, 1)
    assert sweep.best([two, four, eight]) is four and sweep.best([eight]) is None
    base = sweep.base_cell([Prediction("q0", "base", "paraphrase", "?", "", ("a",))])
    shown = sweep.ablation_table([base, two, four, eight])
    assert [row[0] for row in shown.rows] == ["base", "2", "4", "8"] and shown.rows[2][
        2
    ] == "1, 1 diverged"
    assert all(len(row) == len(shown.headers) for row in shown.rows)


@pytest.mark.parametrize("n_ranks", [1, 3])
def test_figures_are_drawn(tmp_path, n_ranks):
    trials = [trial(2**i, seed, [1, 0, seed, 1]) for i in range(n_ranks) for seed in (0, 1)]
    paths = sweep.draw(sweep.cells(trials), tmp_path)
    assert [path.name for path in paths] == ["quality.png", "loss.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)
    assert sweep.draw(sweep.cells([trial(2, 0, [], "diverged", None)]), tmp_path) == []
