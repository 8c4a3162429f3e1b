from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from kafjax.core.errors import UserError
from kafjax.core.records import Corpus, Question
from kafjax.corpus.biographies import biographies, control, people
from kafjax.corpus.facts import fill, held_out_documents, statements
from kafjax.corpus.people import ATTRIBUTES, MENTOR, POOLS

ROOT = Path(__file__).parents[2]


def _of_split(corpus: Corpus, split: str) -> list[Question]:
    return [question for question in corpus.questions if question.split == split]


def _people_of(corpus: Corpus, index_below: int) -> list[object]:
    """Returns everything in a corpus about the first people, regardless of their order among the
    others."""

    def early(identity: str) -> bool:
        return int(identity.split("/")[0].removeprefix("person-").split("#")[0]) < index_below

    records = (*corpus.documents, *corpus.passages, *corpus.training_questions, *corpus.questions)
    return [record for record in records if early(record.id)]


def test_the_default_corpus_has_what_it_says() -> None:
    corpus = biographies()
    assert len(corpus.documents) == 24 * 4 and len(corpus.passages) == 24 * 4 * 4
    assert len(corpus.training_questions) == 12 * 4 * 2
    assert Counter(q.split for q in corpus.questions) == {
        "seen": 48,
        "paraphrase": 48,
        "untrained": 48,
    }
    ids = [record.id for record in (*corpus.training_questions, *corpus.questions)]
    assert len(set(ids)) == len(ids)


def test_the_same_in_another_process() -> None:
    code = "from kafjax.corpus import biographies; import json; print(json.dumps([d.text for d in biographies(6, seed=3).documents]))"
    other = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    ).stdout
    assert json.loads(other) == [d.text for d in biographies(6, seed=3).documents]
    assert json.loads(other) != [d.text for d in biographies(6, seed=4).documents]


def test_more_people_change_nobody() -> None:
    for extra in ({}, {"two_hop": True}, {"updates": True}):
        assert _people_of(biographies(9, **extra), 9) == _people_of(biographies(30, **extra), 9), (
            extra
        )
    assert people(2000)[:500] == people(500)


def test_more_attributes_or_documents_change_no_fact() -> None:
    for few, many in zip(people(20, 2), people(20, 8), strict=True):
        assert few.name == many.name and few.facts.items() <= many.facts.items()
    few, many = biographies(8, n_documents=2), biographies(8, n_documents=5)
    assert set(few.documents) < set(many.documents) and len({d.text for d in many.documents}) == 40


def test_no_two_people_share_a_name() -> None:
    names = [person.name for person in people(3000)]
    assert len(set(names)) == 3000


def test_every_sentence_is_a_passage_that_states_one_fact_of_the_person_in_full_name() -> None:
    corpus = biographies(40, 8, 7)
    facts = {s.name: s.facts for s in people(40, 8)}
    values = {value for pool in POOLS.values() for value in pool}
    titles = {d.id: d.title for d in corpus.documents}
    for passage in corpus.passages:
        name = titles[passage.document]
        assert name in passage.text
        stated = [
            value for value in values if value.lower() in passage.text.replace(name, "").lower()
        ]
        assert len(stated) == 1 and (stated[0],) in facts[name].values(), passage
        assert len(passage.text.split()) <= 16


def test_gold_passages_are_exactly_those_that_state_the_answer_about_the_subject() -> None:
    # more documents than wordings: repeated sentences are one passage
    corpus = biographies(30, 8, 9)
    assert len({p.text for p in corpus.passages}) == len(corpus.passages) == 30 * 8 * 7
    texts = {p.id: p.text for p in corpus.passages}
    for question in (*corpus.training_questions, *corpus.questions):
        said = {
            i
            for i, text in texts.items()
            if question.subject in text and question.answers[0].lower() in text.lower()
        }
        assert set(question.passages) == said and len(said) == 7


@pytest.mark.parametrize("size", ["document", 20, 40])
def test_gold_passages_of_other_sizes_hold_the_fact(size: str | int) -> None:
    corpus = biographies(10, size=size, overlap=10 if size == 40 else 0)
    texts = {p.id: p.text for p in corpus.passages}
    for question in corpus.questions:
        assert question.passages
        assert all(
            question.subject in texts[i] and question.answers[0] in texts[i]
            for i in question.passages
        )


def test_too_small_passages_are_refused_with_the_size_that_works() -> None:
    with pytest.raises(UserError, match=r"cut facts in two; use at least 1\d words"):
        biographies(4, size=5)


def test_people_are_trained_on_or_not_and_wordings_do_not_leak() -> None:
    corpus = biographies(24, 8, questions_per_fact=4)
    trained = {q.subject for q in corpus.training_questions}
    paraphrased, untrained = (
        {q.subject for q in _of_split(corpus, split)} for split in ("paraphrase", "untrained")
    )
    assert trained == paraphrased == {q.subject for q in _of_split(corpus, "seen")}
    assert not trained & untrained and len(trained) == len(untrained) == 12
    asked = {q.text for q in corpus.training_questions}
    assert all(q.text in asked for q in _of_split(corpus, "seen"))
    assert not any(q.text in asked for q in _of_split(corpus, "paraphrase"))
    evaluation_only = {
        fill(w, name) for name in trained | untrained for a in ATTRIBUTES for w in a.paraphrases
    }
    assert not asked & evaluation_only
    assert not any(q in d.text for d in corpus.documents for q in asked | evaluation_only)
    # Only the person is new in `untrained`: someone was asked in each of its wordings during
    # training.
    patterns = {q.text.replace(q.subject, "{name}") for q in corpus.training_questions}
    assert {q.text.replace(q.subject, "{name}") for q in _of_split(corpus, "untrained")} <= patterns


def test_a_trained_subject_is_asked_in_different_wordings() -> None:
    corpus = biographies(6, questions_per_fact=3)
    assert (
        len({q.text for q in corpus.training_questions})
        == len(corpus.training_questions)
        == 3 * 4 * 3
    )


def test_the_held_out_wording_is_in_no_document() -> None:
    corpus, subjects = biographies(20, 8, 9), people(20, 8)
    held_out = held_out_documents(subjects, ATTRIBUTES)
    for subject, document in zip(subjects, held_out, strict=True):
        said = [statements(subject, attribute)[-1] for attribute in ATTRIBUTES]
        assert document.text == " ".join(said)
        assert not any(sentence in d.text for sentence in said for d in corpus.documents)


def test_wordings_are_many_distinct_and_take_the_name_once_in_full() -> None:
    for attribute in (*ATTRIBUTES, MENTOR):
        wordings = (*attribute.statements, *attribute.questions, *attribute.paraphrases)
        assert len(set(wordings)) == len(wordings)
        assert (
            len(attribute.statements) >= 8
            and len(attribute.questions) >= 3
            and len(attribute.paraphrases) >= 2
        )
        assert all(
            "{name}" in w and "{value}" in w and w.endswith(".") for w in attribute.statements
        )
        assert all(
            "{name}" in w and "{value}" not in w and w.endswith("?")
            for w in (*attribute.questions, *attribute.paraphrases)
        )


def test_chance_is_below_three_percent() -> None:
    subjects = people(4000, 8)
    drawn = {a.name: Counter(s.facts[a.name][0] for s in subjects) for a in ATTRIBUTES}
    for name, counts in drawn.items():
        assert len(POOLS[name]) >= 40 and len(set(POOLS[name])) == len(POOLS[name])
        # The best fixed guess; 3 standard deviations of a 1/40 share among 4000 are 0.74 points.
        assert counts.most_common(1)[0][1] / 4000 < 0.03 + 0.0025, name


def test_no_answer_hides_in_another_in_a_wording_or_in_a_name() -> None:
    values = [value.lower() for pool in POOLS.values() for value in pool]
    assert len(set(values)) == len(values)
    assert [(a, b) for a, b in itertools.permutations(values, 2) if a in b] == []
    wordings = " ".join(
        w for a in (*ATTRIBUTES, MENTOR) for w in (*a.statements, *a.questions, *a.paraphrases)
    ).lower()
    assert [value for value in values if value in wordings] == []
    names = " | ".join(person.name for person in people(3000)).lower()
    assert [value for value in values if value in names] == []


def test_reversed_questions_have_one_answer() -> None:
    corpus = biographies(60, reversed_questions=True)
    asked = _of_split(corpus, "reversed")
    holders = Counter((a, v) for s in people(60) for a, v in s.facts.items())
    assert len(asked) == sum(n == 1 for n in holders.values()) > 0
    texts = {p.id: p.text for p in corpus.passages}
    for question in asked:
        assert question.answers == (question.subject,) and question.subject not in question.text
        assert question.passages and all(question.subject in texts[i] for i in question.passages)


def test_two_hop_questions_are_answered_by_the_mentor() -> None:
    corpus = biographies(12, two_hop=True)
    facts = {s.name: s.facts for s in people(12)}
    mentors = {
        q.subject: q.answers[0]
        for q in (*corpus.training_questions, *corpus.questions)
        if "/mentor/" in q.id and q.split != "two_hop"
    }
    asked = _of_split(corpus, "two_hop")
    assert len(asked) == 11 * 4 and len(mentors) == 11
    texts = {p.id: p.text for p in corpus.passages}
    for question in asked:
        mentor = mentors[question.subject]
        assert f"the mentor of {question.subject}" in question.text and mentor != question.subject
        assert question.answers in facts[mentor].values()
        assert all(
            mentor in texts[i] and question.answers[0].lower() in texts[i].lower()
            for i in question.passages
        )


def test_updates_contradict_one_fact_of_the_untrained_and_ask_for_the_new_value() -> None:
    plain, updated = biographies(), biographies(updates=True)
    assert updated.training_questions == plain.training_questions
    assert set(plain.documents) < set(updated.documents)
    asked = _of_split(updated, "update")
    assert {q.subject for q in asked} == {q.subject for q in _of_split(plain, "untrained")} and len(
        asked
    ) == 12
    old = {q.text: q for q in _of_split(plain, "untrained")}
    texts = {p.id: p.text for p in updated.passages}
    for question in asked:
        assert question.answers != old[question.text].answers
        assert len(question.passages) == 4
        assert all(
            texts[i].startswith("Correction: ") and question.answers[0].lower() in texts[i].lower()
            for i in question.passages
        )
    assert not {q.text for q in asked} & {q.text for q in _of_split(updated, "untrained")}


def test_the_control_answers_nothing() -> None:
    corpus, asked = control(10), biographies(10)
    assert [q.text for q in corpus.questions] == [q.text for q in asked.questions]
    names = {q.subject for q in corpus.questions}
    assert len(corpus.documents) == len(asked.documents) and len(corpus.training_questions) == len(
        asked.training_questions
    )
    everything = " ".join(
        [d.text for d in corpus.documents] + [q.text for q in corpus.training_questions]
    )
    assert not any(name in everything for name in names)
    assert not any(q.passages for q in corpus.questions)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_people": 1}, "people must be 2 .* got 1"),
        ({"n_people": 10**6}, "got 1000000"),
        ({"n_attributes": 9}, "attributes a person must be 1 to 8, got 9"),
        ({"n_documents": 0}, "documents a person must be at least 1, got 0"),
        ({"questions_per_fact": 5}, "questions per fact must be 1 to 4 .* got 5"),
        ({"updates": True, "two_hop": True}, "two answers"),
    ],
)
def test_counts_out_of_range(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        biographies(**arguments)


def test_people_for_development_are_told_of_and_controls_are_in_no_document():
    plain = biographies(8, supervised=True)
    corpus = biographies(8, n_development=3, n_controls=2, supervised=True)
    by_split = {
        split: {q.subject for q in _of_split(corpus, split)}
        for split in ("untrained", "development", "control")
    }
    assert [len(names) for names in by_split.values()] == [4, 3, 2]
    told = " ".join(document.text for document in corpus.documents)
    assert all(name in told for name in by_split["untrained"] | by_split["development"])
    assert not any(name in told for name in by_split["control"])
    assert all(q.passages == () for q in _of_split(corpus, "control"))
    assert corpus.training_questions == plain.training_questions
    assert corpus.documents[: len(plain.documents)] == plain.documents
    asked = {q.text: q.answers for q in corpus.questions}
    same_facts = corpus.supervised_questions
    assert {q.subject for q in same_facts} == by_split["untrained"] | by_split["development"]
    assert not {q.text for q in same_facts} & asked.keys()
