"""Summaries of ways to follow changes, by hand."""

from __future__ import annotations

import math

import pytest

from kafjax.core.records import Prediction
from kafjax.evaluation import evolve, table


def answer(id: str, split: str, correct: bool, **score: float) -> Prediction:
    return Prediction(
        id=id,
        method="w",
        split=split,
        question=f"{id}?",
        answer="",
        answers=("x",),
        correct=correct,
        score=score,
        subject=id.split("/")[0],
    )


def cost(seconds: float, latencies: tuple[float, ...] = (1.0,)) -> dict:
    return {
        "seconds": seconds,
        "tokens": 10,
        "flops": 1e12,
        "bytes_written": 100,
        "latencies": list(latencies),
    }


STEPS = [
    [answer("a/x", "old", True), answer("b/x", "old", True), answer("c/x", "old", True)],
    [
        answer("a/x", "new", True, stale=0.0),
        answer("b/x", "old", False),
        answer("c/x", "deleted", True, weighed=1.0),
        answer("d/x", "new", True),
    ],
    [
        answer("a/x", "new", False, stale=1.0),
        answer("b/x", "old", False),
        answer("c/x", "deleted", False, weighed=0.5),
        answer("d/x", "earlier", True, stale=0.0),
    ],
]
COSTS = [cost(50.0, ()), cost(10.0, (1.0, 3.0, 2.0)), cost(20.0)]


@pytest.fixture(scope="module")
def results():
    return evolve.collect({"w": {0: STEPS}}, {"w": {0: COSTS}})


def test_measures_over_all_steps_leave_out_what_was_before(results):
    overall = results["w"]["overall"]
    value = {name: overall[name]["value"] for name in evolve.MEASURES}
    assert value == {
        "new": pytest.approx(2 / 3),
        "earlier": 1.0,
        "old": 0.0,
        "stale": pytest.approx(1 / 3),
        "told": 0.5,
        "weighed": 0.75,
    }
    assert overall["new"]["n"] == 2  # subjects
    assert overall["forgotten"]["value"] == -1.0  # b, which was never changed
    assert overall["update"]["seconds"]["value"] == 15.0


def test_seconds_until_right_are_the_update_and_a_query_and_never_for_a_wrong_answer(results):
    # 12, 12 and never
    assert results["w"]["overall"]["until_right"] == 12.0
    wrong = [[*STEPS[0]], [answer("a/x", "new", False), answer("d/x", "new", True)]]
    found = evolve.collect({"w": {0: wrong}}, {"w": {0: COSTS[:2]}})
    assert found["w"]["overall"]["until_right"] is None


def test_seeds_are_pooled_and_a_seed_without_a_measure_is_left_out():
    other = [STEPS[0], [answer("a/x", "new", True)], STEPS[2][:1]]
    found = evolve.collect({"w": {0: STEPS, 1: other}}, {"w": {0: COSTS, 1: COSTS}})
    assert found["w"]["overall"]["new"]["value"] == pytest.approx(3 / 5)
    assert found["w"]["overall"]["told"]["value"] == 0.5
    assert found["w"]["overall"]["update"]["seconds"]["n"] == 4


def test_tables_and_figure_show_every_way_and_step(results, tmp_path):
    nothing = evolve.collect({"v": {0: [STEPS[0], []]}}, {"v": {0: COSTS[:2]}})
    both = {**results, **nothing}
    text = table.render(evolve.tables(both))
    assert "w, step 2" in text and "v, step 1" in text and "0.75" in text and "66.7" in text
    assert not any(math.isnan(float(w)) for w in text.split() if w == "nan")
    assert evolve.draw(both, tmp_path / "evolve.png").stat().st_size > 10_000
