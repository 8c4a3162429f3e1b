"""The corpus as training examples: nothing left out, replay in its share, and nothing that the
evaluation asks."""

from __future__ import annotations

import dataclasses
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from kafjax.core.errors import UserError
from kafjax.core.records import Corpus, Document, Question
from kafjax.corpus import biographies
from kafjax.methods.examples import training_examples
from kafjax.methods.regimes import in_regime
from kafjax.methods.settings import Settings
from kafjax.prompts import prompt

EOS = 256


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """A token a byte, so that tokens can be read back exactly."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(
        models.BPE(vocab={piece: i for i, piece in enumerate(alphabet)}, merges=[])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def made_up(n_documents: int, n_questions: int, n_replay: int) -> Corpus:
    return Corpus(
        name="made up",
        documents=tuple(Document(f"d{i}", f"document {i}.") for i in range(n_documents)),
        passages=(),
        training_questions=tuple(
            Question(f"q{i}", f"question {i}?", (f"answer {i}",), "train")
            for i in range(n_questions)
        ),
        questions=(),
        replay_texts=tuple(f"replayed text {i}." for i in range(n_replay)),
        replay_questions=tuple(
            Question(f"r{i}", f"replayed question {i}?", ("yes",), "replay")
            for i in range(n_replay)
        ),
    )


def read(tokenizer, variants):
    """The text of each example of each list, EOS left out."""
    return [
        [tokenizer.decode([t for t in example.tokens if t != EOS]) for example in examples]
        for examples in variants
    ]


@given(
    documents=st.integers(1, 12),
    questions=st.integers(0, 9),
    parts=st.integers(1, 5),
    replay=st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.8]),
    others=st.integers(0, 4),
)
@settings(max_examples=40)
def test_each_epoch_has_its_part_of_the_documents_all_questions_and_its_share_of_replay(
    tokenizer, documents, questions, parts, replay, others
):
    corpus = made_up(documents, questions, others)
    variants = read(
        tokenizer,
        training_examples(corpus, tokenizer, Settings(document_parts=parts, replay=replay), EOS),
    )
    assert len(variants) == parts
    asked = [f"{prompt.closed_book(q.text)} {q.answers[0]}\n" for q in corpus.training_questions]
    told = Counter()
    for texts in variants:
        replayed = [text for text in texts if "replayed" in text]
        own = [text for text in texts if "replayed" not in text]
        told.update(text for text in own if text.startswith("document"))
        assert Counter(text for text in own if not text.startswith("document")) == Counter(asked)
        if others:
            assert abs(len(replayed) - replay * len(texts)) <= 0.5  # as near as whole examples come
        else:
            assert not replayed
    # each exactly once over the parts
    assert told == Counter(document.text for document in corpus.documents)


def test_replay_goes_round_all_other_matters(tokenizer):
    corpus = made_up(8, 4, 3)
    variants = read(
        tokenizer, training_examples(corpus, tokenizer, Settings(document_parts=2, replay=0.5), EOS)
    )
    replayed = Counter(text for texts in variants for text in texts if "replayed" in text)
    assert len(replayed) == 6 and max(replayed.values()) - min(replayed.values()) <= 1


def test_the_loss_looks_at_documents_and_answers_but_not_at_questions(tokenizer):
    corpus = made_up(1, 1, 0)
    text, question = training_examples(corpus, tokenizer, Settings(), EOS)[0]
    assert text.tokens[-1] == EOS and text.weights[1:].all()
    assert tokenizer.decode(question.tokens[question.weights > 0].tolist()) == " answer 0\n"


@pytest.fixture(scope="module")
def people() -> Corpus:
    replay = made_up(0, 0, 2)
    return dataclasses.replace(
        biographies(6), replay_texts=replay.replay_texts, replay_questions=replay.replay_questions
    )


def test_no_wording_of_the_evaluation_is_trained_on(tokenizer, people):
    settings = Settings(document_parts=4, replay=0.3)
    trained = {
        text
        for texts in read(tokenizer, training_examples(people, tokenizer, settings, EOS))
        for text in texts
    }
    questions_of = {
        split: {q.text for q in people.questions if q.split == split}
        for split in ("seen", "paraphrase", "untrained")
    }
    assert all(questions_of.values())

    def trained_on(question: str) -> bool:
        return any(question in text for text in trained)

    assert all(map(trained_on, questions_of["seen"]))
    assert not any(map(trained_on, questions_of["paraphrase"] | questions_of["untrained"]))


def test_people_without_training_questions_have_none(tokenizer, people):
    untrained = {q.subject for q in people.questions if q.split == "untrained"}
    examples = [
        text
        for texts in read(tokenizer, training_examples(people, tokenizer, Settings(), EOS))
        for text in texts
    ]
    asked = [text for text in examples if text.startswith("Question:")]
    assert untrained and asked
    assert not any(subject in text for subject in untrained for text in asked)
    # their documents are read
    assert all(any(subject in text for text in examples) for subject in untrained)


def test_regimes_train_on_the_questions_and_the_tellings_that_they_name():
    corpus = biographies(4, n_documents=3, n_development=1, supervised=True)
    how = dataclasses.replace(Settings(), document_parts=3)
    documents, _ = in_regime(corpus, how, "documents")
    assert documents.training_questions == () and documents.documents == corpus.documents
    supervised, _ = in_regime(corpus, how, "supervised")
    trained_on = {q.subject for q in supervised.training_questions}
    assert trained_on == {d.title for d in corpus.documents}
    assert not {q.text for q in supervised.training_questions} & {
        q.text for q in corpus.questions if q.split == "untrained"
    }
    single, changed = in_regime(corpus, how, "single")
    assert [d.id for d in single.documents] == [f"person-{i}/0" for i in range(5)]
    assert changed.document_parts == 1  # so each epoch tells every fact once, as in the others
    with pytest.raises(UserError, match="tells every subject once"):
        in_regime(single, how, "single")
    with pytest.raises(UserError, match="no questions of split 'supervised'"):
        in_regime(biographies(4), how, "supervised")
