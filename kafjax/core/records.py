"""The records that flow between stages. Each stage reads and writes only these, so each also runs
alone, from disk."""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Source:
    """The place that a text was read from: a file, by its path within the corpus, and the part of
    it.

    `heading` are the headings above it, the outermost first. `bytes` is (first, behind the last) in
    the file, `lines` (first, last) counted from 1; both are None where a file had to be converted.
    `page` is counted from 1.
    """

    file: str
    heading: tuple[str, ...] = ()
    bytes: tuple[int, int] | None = None
    lines: tuple[int, int] | None = None
    page: int | None = None

    def __str__(self) -> str:
        """Writes the place as compilers do, `guide.md:12-15 (Guide > Install)`."""
        lines = "" if self.lines is None else f":{'-'.join(map(str, dict.fromkeys(self.lines)))}"
        page = "" if self.page is None else f", page {self.page}"
        heading = f" ({' > '.join(self.heading)})" if self.heading else ""
        return f"{self.file}{lines}{page}{heading}"


@dataclasses.dataclass(frozen=True)
class Cut:
    """A part of a file that a document leaves out: `at` in the document's text, with its size in
    `bytes` and line ends."""

    at: int
    bytes: int
    lines: int


@dataclasses.dataclass(frozen=True)
class Document:
    """A text to learn from. `id` is unique within a corpus.

    `format` says how the text is cut into passages: "" for prose, "markdown", or "pages" (form
    feeds between them). `source` is where it was read from, and no part of what it is. `cuts` are
    the parts of its file that the text leaves out, in their order; None where the text is no piece
    of a file.
    """

    id: str
    text: str
    title: str = ""
    format: str = ""
    source: Source | None = dataclasses.field(default=None, compare=False)
    cuts: tuple[Cut, ...] | None = dataclasses.field(default=None, compare=False)


@dataclasses.dataclass(frozen=True)
class Passage:
    """A retrievable piece of a document. `document` is the id of the document it was cut from,
    `source` its place in a file."""

    id: str
    text: str
    document: str = ""
    source: Source | None = dataclasses.field(default=None, compare=False)


SUPERVISED = "supervised"
"""Split of questions that only supervised methods train on: see `Corpus`."""


RELATIONS = ("capital", "currency", "continent")
"""Relations that retention questions about countries ask for. A question's id begins with its own:
`capital-fr`."""


def relation_of(question_id: str) -> str | None:
    """Reads the relation off a question's id. None for questions of a user's own."""
    relation, dash, _ = question_id.partition("-")
    return relation if dash and relation in RELATIONS else None


@dataclasses.dataclass(frozen=True)
class Question:
    """A question with its accepted answers.

    `split` says what it measures: `train` (used for training), `seen` (a training question, asked
    again), `paraphrase` (same fact, unseen wording), `untrained` (a subject with no training
    questions), `development` (another such subject, for choosing settings), `control` (a subject in
    no document), `retention` (a fact the base model knows). `passages` are ids of gold passages,
    each sufficient alone.
    """

    id: str
    text: str
    answers: tuple[str, ...]
    split: str
    passages: tuple[str, ...] = ()
    subject: str = ""


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Knowledge with its questions.

    `passages` are the retrieval units cut from `documents`. `training_questions` may be trained on;
    `questions` only evaluated. `retention` are questions on other matters, `held_out_texts`
    ordinary prose for perplexity: both measure forgetting. `replay_texts` and `replay_questions`
    are disjoint from them and may be mixed into training. `supervised_questions` ask for the facts
    that `untrained` questions ask for, in other words: only a method that says so trains on them.
    """

    name: str
    documents: tuple[Document, ...]
    passages: tuple[Passage, ...]
    training_questions: tuple[Question, ...]
    questions: tuple[Question, ...]
    retention: tuple[Question, ...] = ()
    held_out_texts: tuple[str, ...] = ()
    replay_texts: tuple[str, ...] = ()
    replay_questions: tuple[Question, ...] = ()
    supervised_questions: tuple[Question, ...] = ()


@dataclasses.dataclass(frozen=True)
class Prediction:
    """One method's answer to one question, with what it cost.

    `passages` are the ids put in the prompt, best first. Token counts are LLM tokens of all
    `calls`; `cached_tokens` of the prompt tokens came from a shared prefix that was computed once.
    `subject` is whom or what the question is about; older releases did not note it. `score` holds
    per-question metrics in [0, 1], `seconds` the time of each stage (embed, search, prefill,
    decode) of the batch that the question was answered in. `cut` says that the reply was at its
    limit of tokens before it had ended. `prompts` are the whole texts that the model was asked, one
    a call; they are no part of the row, since answers share most of theirs (`evaluation.prompts`).
    """

    id: str
    method: str
    split: str
    question: str
    answer: str
    answers: tuple[str, ...]
    passages: tuple[str, ...] = ()
    gold_passages: tuple[str, ...] = ()
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    calls: int = 1
    correct: bool = False
    score: dict[str, float] = dataclasses.field(default_factory=dict)
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    subject: str = ""
    cut: bool = False
    prompts: tuple[str, ...] = dataclasses.field(default=(), compare=False)

    def to_json(self) -> dict[str, Any]:
        """Returns the row of predictions.jsonl."""
        row = dataclasses.asdict(self)
        del row["prompts"]
        return row
