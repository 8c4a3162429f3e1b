"""Rankings in the forms that others read: TREC's run files, and FlashRAG's JSON of retrieved
documents."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from kafjax.core.records import Passage, Question

Ranking = Sequence[tuple[str, float]]
"""Ids of documents with their scores, best first."""


def by_document(passages: Iterable[tuple[Passage, float]], k: int) -> list[tuple[str, float]]:
    """Ranks documents by the best of their passages (MaxP, Dai & Callan 2019). `passages` are best
    first."""
    best: dict[str, float] = {}
    for passage, score in passages:
        best.setdefault(passage.document, score)
    return list(best.items())[:k]


def to_trec(rankings: Mapping[str, Ranking], tag: str) -> str:
    """Writes a run file, `query Q0 document rank score tag` a line. White space in ids, which
    divides the columns, becomes `_`.

    Ties would be broken by trec_eval's own rule: it sorts by score, then by id.
    """
    lines = [
        f"{_column(query)} Q0 {_column(document)} {rank} {score:.6f} {_column(tag)}"
        for query, ranking in rankings.items()
        for rank, (document, score) in enumerate(ranking, 1)
    ]
    return "".join(f"{line}\n" for line in lines)


def to_flashrag(
    questions: Iterable[Question], retrieved: Mapping[str, Sequence[tuple[Passage, float]]]
) -> list[dict[str, Any]]:
    """Makes FlashRAG's rows: each question with the passages found, `{"id", "contents"}`, and their
    scores, under `output`."""
    return [
        {
            "id": question.id,
            "question": question.text,
            "golden_answers": list(question.answers),
            "output": {
                "retrieval_result": [
                    {"id": passage.id, "contents": passage.text}
                    for passage, _ in retrieved[question.id]
                ],
                "retrieval_score": [score for _, score in retrieved[question.id]],
            },
        }
        for question in questions
    ]


def _column(text: str) -> str:
    return "_".join(text.split()) or "_"
