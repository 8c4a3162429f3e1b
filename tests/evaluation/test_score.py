from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import label_ranking_average_precision_score

from kafjax.core.records import Prediction
from kafjax.evaluation import score

# Exact match and F1 as torchmetrics 1.9's SQuAD metric gives them.
SQUAD = [
    ("Rome", ["Rome"], 1.0, 1.0),
    ("the Rome.", ["rome"], 1.0, 1.0),
    ("It is Rome", ["Rome"], 0.0, 0.5),
    ("Romeo", ["Rome"], 0.0, 0.0),
    ("New York City", ["York New"], 0.0, 0.8),
    ("Port-au-Prince", ["Port au Prince", "Portauprince"], 1.0, 1.0),
    ("N'Djamena", ["Ndjamena"], 1.0, 1.0),
    ("a a b b b", ["b b c"], 0.0, 0.666667),
    ("1,200", ["1200"], 1.0, 1.0),
    ("", ["Rome"], 0.0, 0.0),
    ("", ["The"], 1.0, 1.0),
    ("an", ["A"], 1.0, 1.0),
    ("theatre", ["the atre"], 0.0, 0.0),
    ("São Tomé", ["São  Tomé"], 1.0, 1.0),
    ("born in the city of Oslo", ["Oslo", "city of Oslo, Norway"], 0.0, 0.666667),
    ("“Oslo”", ["Oslo"], 0.0, 0.0),
]


@pytest.mark.parametrize(("reply", "answers", "exact", "f1"), SQUAD)
def test_exact_match_and_f1_equal_the_reference(reply, answers, exact, f1):
    assert score.exact_match(reply, answers) == exact
    assert score.token_f1(reply, answers) == pytest.approx(f1, abs=1e-6)


def test_composed_and_decomposed_accents_match():
    assert score.exact_match("São Tome\u0301", ["São Tomé"]) == 1.0


words = st.lists(
    st.sampled_from(["the", "A", "Rome", "rome,", "new", "York", "-", "42", "é"]), max_size=6
).map(" ".join)


@given(words, st.lists(words, min_size=1, max_size=3))
@settings(deadline=None)
def test_scores_are_ordered_and_bounded(reply, answers):
    exact, f1, contained = (
        metric(reply, answers) for metric in (score.exact_match, score.token_f1, score.contains)
    )
    assert 0 <= exact <= f1 <= 1
    assert exact <= contained
    assert not contained or f1 > 0


@given(words, st.lists(words, min_size=1, max_size=3))
@settings(deadline=None)
def test_an_answer_is_found_inside_any_sentence(prefix, answers):
    whole = [answer for answer in answers if score.normalise(answer)]
    if whole:
        assert score.contains(f"{prefix} {whole[0]} {prefix}", answers) == 1.0


@pytest.mark.parametrize(
    ("reply", "answers", "contained"),
    [
        ("She was born in Rome, Italy.", ["rome"], 1.0),
        ("Romeo", ["Rome"], 0.0),
        ("York in the new world", ["New York"], 0.0),
        ("new, the York", ["New York"], 1.0),
        ("1999", ["199"], 0.0),
        ("Milan", ["Rome", "Milan"], 1.0),
        ("Milan", ["The"], 0.0),
    ],
)
def test_contains_needs_whole_tokens_in_order(reply, answers, contained):
    assert score.contains(reply, answers) == contained


@pytest.mark.parametrize(
    ("reply", "answer", "contained"),
    [
        ("「東京」", "東京", 1.0),
        ("首都は東京です。", "東京", 1.0),
        ("東京、大阪", "京大", 0.0),
        ("ローマンです", "ローマ", 0.0),
        ("ローマです", "ローマ", 1.0),
        ("它建于１９３１年", "1931", 1.0),
        ("它建于11931年", "1931", 0.0),
        ("«Париж»", "париж", 1.0),
        ("Парижане", "Париж", 0.0),
        ("It was O\u2019Brien.", "O'Brien", 1.0),
        ("from 1990\u20131995", "1990-1995", 1.0),
        ("“Oslo”", "Oslo", 1.0),
        ("อยู่ที่กรุงเทพครับ", "กรุงเทพ", 1.0),
        ("กี", "ก", 0.0),
        ("هل هي القاهرة؟", "القاهرة", 1.0),
        ("दिल्ली।", "दिल्ली", 1.0),
        ("서울입니다.", "서울", 1.0),
        ("한서울", "서울", 0.0),
        ("می‌خواهم", "میخواهم", 1.0),
        ("STRASSE", "Straße", 1.0),
        ("…", "Rome", 0.0),
    ],
)
def test_contains_reads_any_script(reply, answer, contained):
    assert score.contains(reply, [answer]) == contained


@given(st.text(max_size=12), st.text(max_size=4), st.text(max_size=12))
@settings(deadline=None)
def test_what_matches_exactly_is_contained_whatever_the_script(before, answer, after):
    assert score.exact_match(answer + before, [answer]) <= score.contains(answer + before, [answer])
    assert score.contains(answer, [answer]) == 1.0
    if score.normalise_any(answer):
        assert (
            score.contains(f"{before} {answer} {after}", [answer]) == 1.0
            or not answer.strip().isascii()
        )


def test_reciprocal_rank_equals_ranking_precision_for_one_gold_passage():
    rng = np.random.default_rng(0)
    for _ in range(50):
        ranked = [f"p{i}" for i in rng.permutation(10)]
        gold = f"p{rng.integers(10)}"
        relevant = np.array([[passage == gold for passage in ranked]])
        expected = label_ranking_average_precision_score(relevant, -np.arange(10.0)[None])
        assert score.reciprocal_rank(ranked, [gold]) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("retrieved", "gold", "recall", "rank"),
    [
        (["a", "b", "c"], {"b", "c", "z"}, 1.0, 1 / 2),
        (["a", "b"], {"z"}, 0.0, 0.0),
        ([], {"z"}, 0.0, 0.0),
        (["z"], {"z"}, 1.0, 1.0),
    ],
)
def test_any_gold_passage_counts(retrieved, gold, recall, rank):
    assert score.recall_at_k(retrieved, gold) == recall
    assert score.reciprocal_rank(retrieved, gold) == rank


def prediction(**changes) -> Prediction:
    fields = {
        "id": "q",
        "method": "rag",
        "split": "seen",
        "question": "Where?",
        "answer": "Rome",
        "answers": ("Rome",),
    }
    return Prediction(**{**fields, **changes})


def test_only_the_first_line_is_scored():
    assert score.score(prediction(answer="\n Milan\nRome\nQuestion: ...")).correct is False
    assert score.score(prediction(answer=" It is Rome.\nMilan")).correct is True


def test_retrieval_is_scored_only_where_it_happened_and_gold_is_known():
    retrieval = {"recall_at_k", "mrr"}
    assert (
        retrieval <= score.score(prediction(passages=("a", "b"), gold_passages=("b",))).score.keys()
    )
    assert not retrieval & score.score(prediction(gold_passages=("b",))).score.keys()
    assert not retrieval & score.score(prediction(passages=("a",))).score.keys()


def test_a_question_without_answers_is_an_error_that_names_it():
    with pytest.raises(ValueError, match="'q' has no accepted answers"):
        score.score(prediction(answers=()))
