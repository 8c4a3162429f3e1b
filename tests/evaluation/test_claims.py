"""Claims are shown, not shown or contradicted as their intervals lie; raw results score as what was
written."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from kafjax.core.errors import UserError
from kafjax.core.records import Prediction
from kafjax.evaluation import raw
from kafjax.evaluation.arms import Arm, Trial, arms_of
from kafjax.evaluation.claims import (
    CONTRADICTED,
    NOT_SHOWN,
    SHOWN,
    Pair,
    at_least,
    between,
    equal,
    greater,
    judge,
    verdict_table,
)
from kafjax.evaluation.intervals import Interval

SUBJECTS = 16


def trial(method: str, right: Sequence[int], seed: int = 0) -> Trial:
    """Answers two questions a subject; `right` says how many of them are right."""
    predictions = [
        Prediction(
            id=f"{subject}/{k}",
            method=method,
            split="untrained",
            question=f"question {k} about {subject}?",
            answer="",
            answers=("x",),
            subject=f"subject {subject}",
            correct=k < n,
        )
        for subject, n in enumerate(right)
        for k in range(2)
    ]
    return Trial({"method": method}, seed, predictions, 0.25, "here", Path(), numbers={"bits": 3.5})


def arms() -> list[Arm]:
    found = {
        "all": [2] * SUBJECTS,
        "most": [2] * (SUBJECTS - 1) + [1],
        "half": [1] * SUBJECTS,
        "some": [2, 0] * (SUBJECTS // 2),
        "none": [0] * SUBJECTS,
    }
    return arms_of([trial(name, right, seed) for name, right in found.items() for seed in (0, 1)])


def pair(a: str, b: str):
    def measured(found: Sequence[Arm]) -> Pair:
        by_name = {arm.settings["method"]: arm.cells("untrained") for arm in found}
        return by_name[a], by_name[b]

    return measured


@pytest.mark.parametrize(
    "claim, how",
    [
        (greater("", pair("all", "none")), SHOWN),
        (greater("", pair("none", "all")), CONTRADICTED),
        (greater("", pair("some", "half")), NOT_SHOWN),
        (greater("", pair("half", "half")), NOT_SHOWN),
        (equal("", pair("all", "most"), 0.1), SHOWN),
        (equal("", pair("all", "half"), 0.1), CONTRADICTED),
        (equal("", pair("some", "half"), 0.1), NOT_SHOWN),
        (at_least("", pair("all", "none"), 0.1), SHOWN),
        (at_least("", pair("none", "all"), 0.1), CONTRADICTED),
        (between("", lambda _: Interval(9.8, 6.0, 12.0, 3), 4, 25), SHOWN),
        (between("", lambda _: Interval(2.0, 1.0, 3.0, 3), 4, 25), CONTRADICTED),
        (between("", lambda _: Interval(5.0, 3.0, 7.0, 3), 4, 25), NOT_SHOWN),
        (between("", lambda _: Interval(9.8, None, None, 1), 4, 25), NOT_SHOWN),
    ],
)
def test_an_interval_decides_whether_a_claim_is_shown(claim, how):
    (verdict,) = judge([claim], arms())
    assert verdict.how == how


def test_holm_corrects_over_all_differences_of_a_card():
    alone = judge([greater("", pair("most", "some"))], arms())[0].p_holm
    beside = judge(
        [greater("", pair("most", "some")), *[greater("", pair("some", "half"))] * 9], arms()
    )[0].p_holm
    assert beside == pytest.approx(10 * alone)


def test_raw_results_are_judged_as_the_runs_were(tmp_path):
    claims = [greater("a", pair("all", "some")), equal("b", pair("all", "most"), 0.1)]
    raw.write(tmp_path / "raw.jsonl.gz", arms())
    again = raw.read(tmp_path / "raw.jsonl.gz")
    for one, other in zip(judge(claims, arms()), judge(claims, again), strict=True):
        assert (one.interval, one.p_holm, one.how) == (other.interval, other.p_holm, other.how)
    assert again[0].trials[1].numbers == {"bits": 3.5} and again[0].losses == [0.25, 0.25]


def test_a_broken_raw_file_is_named(tmp_path):
    (tmp_path / "raw.jsonl.gz").write_text('{"settings": {}}')
    with pytest.raises(UserError, match=r"raw\.jsonl"):
        raw.read(tmp_path / "raw.jsonl.gz")


def test_the_table_names_claim_need_and_verdict():
    found = verdict_table(judge([equal("ranks are equal", pair("all", "most"), 0.1)], arms()))
    assert found.headers[-1] == "verdict" and found.rows[0][0] == "ranks are equal"
    assert found.rows[0][2] == "-0.1 to 0.1" and found.rows[0][-1] == SHOWN
