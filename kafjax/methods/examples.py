"""The corpus as training examples: its documents as text, its training questions as they will be asked, replay beside them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from tokenizers import Tokenizer

from kafjax.core.records import Corpus, Question
from kafjax.hub.text import refuse_foreign
from kafjax.methods.settings import Settings
from kafjax.retrieval import prompt
from kafjax.retrieval.prompt import Prompts
from kafjax.training import Example, answer_example, text_example


def check_texts(corpus: Corpus, tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raises `UserError` naming a document or question that holds a token which the model does not have."""
    for document in corpus.documents:
        refuse_foreign(tokenizer, vocab_size, document.text, f"document '{document.id}'")
    for question in (*corpus.training_questions, *corpus.questions):
        refuse_foreign(tokenizer, vocab_size, question.text, f"question '{question.id}'")


def training_examples(
    corpus: Corpus, tokenizer: Tokenizer, settings: Settings, eos_id: int, prompts: Prompts = prompt
) -> list[list[Example]]:
    """Lists of examples, one an epoch, in turn (see `training.train`).

    Each list holds every `document_parts`-th document, all training questions and, for `replay` of it, texts and questions about
    other matters. The loss looks at whole documents and at answers. `prompts` says how questions are put; documents are plain text.
    """
    questions = [_question(tokenizer, question, prompts) for question in corpus.training_questions]
    texts = [text_example(tokenizer, document.text, eos_id) for document in corpus.documents]
    other = _interleaved(
        [_question(tokenizer, question, prompts) for question in corpus.replay_questions],
        [text_example(tokenizer, text, eos_id) for text in corpus.replay_texts],
    )
    variants, used = [], 0
    for part in range(settings.document_parts):
        examples = texts[part :: settings.document_parts] + questions
        n_replay = round(len(examples) * settings.replay / (1 - settings.replay)) if other else 0
        examples += [other[i % len(other)] for i in range(used, used + n_replay)]
        used += n_replay
        variants.append(examples)
    return variants


def stream_examples(corpus: Corpus, tokenizer: Tokenizer, eos_id: int, prompts: Prompts = prompt) -> Iterator[Example]:
    """All documents, then all training questions, one at a time: for packing them into rows on disk."""
    for document in corpus.documents:
        yield text_example(tokenizer, document.text, eos_id)
    for question in corpus.training_questions:
        yield _question(tokenizer, question, prompts)


def _question(tokenizer: Tokenizer, question: Question, prompts: Prompts) -> Example:
    return answer_example(tokenizer, prompts.without_prefix(question.text), prompts.answer(question.answers[0]))


def _interleaved(a: Sequence[Example], b: Sequence[Example]) -> list[Example]:
    return [example for pair in itertools.zip_longest(a, b) for example in pair if example is not None]
