"""Arms of a comparison that an earlier start has finished."""

from __future__ import annotations

import pytest

from experiments.comparison import load_arm, refuse_other_questions, save_arm
from kafjax.core.errors import UserError
from kafjax.core.records import Corpus, Prediction, Question
from kafjax.core.rundir import Run
from kafjax.evaluation.cost import Cost
from kafjax.evaluation.results import Arm

ASKED = Question(
    "p/home/paraphrase", "In what town did the life of Ada begin?", ("Bergen",), "paraphrase"
)


def test_an_arm_that_answered_other_questions_is_not_mixed_with_todays(tmp_path):
    run = Run(tmp_path)
    answer = Prediction(ASKED.id, "rag", "paraphrase", ASKED.text, "Bergen", ASKED.answers)
    save_arm(run, "rag", Arm([answer], Cost()))
    arm = load_arm(run, "rag")
    assert arm is not None
    corpus = Corpus("c", (), (), (), (ASKED,))
    refuse_other_questions(run, {"rag": arm}, corpus)
    for other in (
        Question(ASKED.id, "Where was Ada born?", ("Bergen",), "seen"),
        Question("q", "?", (), "seen"),
    ):
        with pytest.raises(UserError, match=r"rag has answered 'In what town .*another --name"):
            refuse_other_questions(run, {"rag": arm}, Corpus("c", (), (), (), (other,)))
