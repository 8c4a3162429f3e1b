"""The corpus as training examples: its documents as text, its training questions as they will be
asked, replay beside them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from tokenizers import Tokenizer

from kafjax.core.records import Corpus, Document, Question
from kafjax.corpus import CorpusStream
from kafjax.hub.text import Foreign
from kafjax.methods.settings import Settings
from kafjax.prompts import prompt
from kafjax.prompts.prompt import Prompts
from kafjax.training import Example, answer_example, text_examples

T = TypeVar("T")
R = TypeVar("R")
_WINDOW = 1024  # texts tokenized at a time: enough for all cores, few enough to wait for


def check_texts(corpus: Corpus, tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raises `UserError` naming a document or question that holds a token which the model does not
    have."""
    foreign = Foreign.of(tokenizer, vocab_size)
    for document in corpus.documents:
        foreign.refuse(document.text, f"document '{document.id}'")
    for question in (
        *corpus.training_questions,
        *corpus.replay_questions,
        *corpus.supervised_questions,
        *corpus.questions,
        *corpus.retention,
    ):
        _check_question(foreign, question)
    for what, texts in (("held-out", corpus.held_out_texts), ("replay", corpus.replay_texts)):
        for number, text in enumerate(texts, 1):
            foreign.refuse(text, f"{what} text {number}")


def _check_question(foreign: Foreign, question: Question) -> None:
    foreign.refuse(question.text, f"question '{question.id}'")
    for answer in question.answers:
        foreign.refuse(answer, f"an answer of question '{question.id}'")


def training_examples(
    corpus: Corpus, tokenizer: Tokenizer, settings: Settings, eos_id: int, prompts: Prompts = prompt
) -> list[list[Example]]:
    """Lists of examples, one an epoch, in turn (see `training.train`).

    Each list holds every `document_parts`-th document, all training questions and, for a share of
    `replay`, texts and questions about other matters. The loss covers whole documents, and only the
    answers of questions. `prompts` formats questions; documents are plain text.
    """
    questions = question_examples(corpus.training_questions, tokenizer, prompts)
    texts = text_examples(tokenizer, [document.text for document in corpus.documents], eos_id)
    other = _interleaved(
        question_examples(corpus.replay_questions, tokenizer, prompts),
        text_examples(tokenizer, list(corpus.replay_texts), eos_id),
    )
    variants, used = [], 0
    for part in range(settings.document_parts):
        examples = texts[part :: settings.document_parts] + questions
        n_replay = round(len(examples) * settings.replay / (1 - settings.replay)) if other else 0
        examples += [other[i % len(other)] for i in range(used, used + n_replay)]
        used += n_replay
        variants.append(examples)
    return variants


def question_examples(
    questions: Iterable[Question], tokenizer: Tokenizer, prompts: Prompts = prompt
) -> list[Example]:
    """Makes an example of each question with its first answer, which alone the loss covers."""
    return [_question(tokenizer, question, prompts) for question in questions]


def stream_examples(
    corpus: Corpus | CorpusStream,
    tokenizer: Tokenizer,
    vocab_size: int,
    eos_id: int,
    prompts: Prompts = prompt,
) -> Iterator[Example]:
    """Yields all documents, then all training questions: for packing them into rows on disk.

    Tokenizes on all cores, some thousand texts ahead of the packing. `prompts` formats questions.
    Raises `UserError` as `check_texts` does.
    """
    foreign = Foreign.of(tokenizer, vocab_size)

    def of_documents(documents: list[Document]) -> list[Example]:
        for document in documents:
            foreign.refuse(document.text, f"document '{document.id}'")
        return text_examples(tokenizer, [document.text for document in documents], eos_id)

    def of_questions(questions: list[Question]) -> list[Example]:
        for question in questions:
            _check_question(foreign, question)
        return question_examples(questions, tokenizer, prompts)

    yield from _ahead(of_documents, corpus.documents)
    yield from _ahead(of_questions, corpus.training_questions)


def _ahead(function: Callable[[list[T]], list[R]], items: Iterable[T]) -> Iterator[R]:
    """Yields `function` of each window of items, while a thread computes that of the next one."""
    items = iter(items)
    with ThreadPoolExecutor(1) as thread:
        running: Future[list[R]] | None = None
        while window := list(itertools.islice(items, _WINDOW)):
            following = thread.submit(function, window)
            if running is not None:
                yield from running.result()
            running = following
        if running is not None:
            yield from running.result()


def _question(tokenizer: Tokenizer, question: Question, prompts: Prompts) -> Example:
    return answer_example(
        tokenizer, prompts.without_prefix(question.text), prompts.answer(question.answers[0])
    )


def _interleaved(a: Sequence[Example], b: Sequence[Example]) -> list[Example]:
    return [
        example for pair in itertools.zip_longest(a, b) for example in pair if example is not None
    ]
