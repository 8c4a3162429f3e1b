from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kafjax.core.records import Prediction
from kafjax.evaluation import error_budget as budget


def prediction(
    id_: str, correct: bool, passages: tuple[str, ...] = (), gold: tuple[str, ...] = ("g",)
) -> Prediction:
    return Prediction(
        id_,
        "arm",
        "seen",
        "Where?",
        "",
        ("Rome",),
        passages=passages,
        gold_passages=gold,
        correct=correct,
    )


ORACLE = [prediction("read", True, ("g",)), prediction("unread", False, ("g",))]


@pytest.mark.parametrize(
    ("id_", "correct", "passages", "cause"),
    [
        ("read", True, ("x", "g"), budget.FROM_PASSAGES),
        ("read", True, ("x", "y"), budget.FROM_WEIGHTS),
        ("read", False, ("x", "y"), budget.RETRIEVAL_MISS),
        ("read", False, (), budget.RETRIEVAL_MISS),
        ("read", False, ("x", "g"), budget.DISTRACTOR_HARM),
        ("unread", False, ("x", "g"), budget.READER_MISS),
        ("unasked", False, ("x", "g"), budget.GOLD_UNUSED),
    ],
)
def test_each_cause_in_a_retrieving_arm(id_, correct, passages, cause):
    arm = [prediction(id_, correct, passages), prediction("other", True, ("g",))]
    assert budget.attribute(arm, ORACLE)[id_] == cause


def test_a_closed_book_arm_knows_or_has_not_learned():
    arm = [prediction("a", True), prediction("b", False), prediction("c", False, gold=())]
    assert budget.attribute(arm, ORACLE) == {
        "a": budget.FROM_WEIGHTS,
        "b": budget.NOT_LEARNED,
        "c": budget.NOT_LEARNED,
    }


questions = st.lists(
    st.tuples(
        st.booleans(),
        st.lists(st.sampled_from("gxy"), max_size=3, unique=True),
        st.sampled_from([True, False, None]),
    ),
    max_size=30,
)


@given(questions)
@settings(deadline=None)
def test_the_parts_sum_to_one_and_cover_every_question(rows):
    arm = [
        prediction(str(i), correct, tuple(passages))
        for i, (correct, passages, _) in enumerate(rows)
    ]
    oracle = [
        prediction(str(i), right, ("g",))
        for i, (_, _, right) in enumerate(rows)
        if right is not None
    ]
    shares = budget.error_budget(arm, oracle)
    assert budget.attribute(arm, oracle).keys() == {p.id for p in arm}
    if arm:
        assert sum(share.value for share in shares.values()) == pytest.approx(1)
        right = shares[budget.FROM_WEIGHTS].value + (
            shares[budget.FROM_PASSAGES].value if budget.FROM_PASSAGES in shares else 0
        )
        assert right == pytest.approx(sum(p.correct for p in arm) / len(arm))


def test_questions_without_known_gold_passages_are_left_out_of_a_retrieving_arm():
    arm = [prediction("a", True, ("g",)), prediction("b", False, ("x",), gold=())]
    assert budget.attribute(arm, ORACLE).keys() == {"a"}


def test_a_question_asked_twice_is_an_error_that_names_it():
    with pytest.raises(ValueError, match="'a' occurs more than once"):
        budget.attribute([prediction("a", True), prediction("a", False)])
