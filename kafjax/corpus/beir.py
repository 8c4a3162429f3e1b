"""A corpus in BEIR's format (Thakur et al. 2021): for retrieval, without answers.

    corpus.jsonl         {"_id": "d1", "title": "...", "text": "..."} a line
    queries.jsonl        {"_id": "q1", "text": "..."} a line
    qrels/test.tsv       query-id, corpus-id and score, divided by tabs, behind a line of headings; a score of 0 is "not relevant"

Of the files in `qrels` the first of test, dev, validation and train is read. Queries that it does
not name are not asked.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from absl import logging

from kafjax.core.errors import UserError
from kafjax.core.records import Document, Passage, Question
from kafjax.corpus import rows

_SPLITS = ("test", "dev", "validation", "train")


def is_beir(root: Path) -> bool:
    """True if a folder holds queries in BEIR's format, and no questions in ours."""
    return rows.find(root, "queries") is not None and rows.find(root, "questions") is None


def document(row: rows.Row) -> Document:
    """Makes the document of a row of corpus.jsonl. A title may be empty; so may a text that has a
    title."""
    title = (
        rows.string(row.place, row.values, "title", empty=True)
        if row.values.get("title") is not None
        else ""
    )
    text = rows.string(row.place, row.values, "text", empty=bool(title.strip()))
    return Document(
        row.values["_id"], text if text.strip() else title, title if text.strip() else ""
    )


def questions(root: Path, gold: Mapping[str, tuple[Passage, ...]] | None) -> list[Question]:
    """Reads the queries that the judgements name, as questions without answers. All passages of a
    relevant document are gold.

    Args:
      gold: passages by the id of their document; None leaves gold passages out.

    Raises:
      UserError: naming file and line, for what is missing or broken.
    """
    file = next(
        (file for split in _SPLITS if (file := root / "qrels" / f"{split}.tsv").is_file()), None
    )
    if file is None:
        raise UserError(
            f"{root} has BEIR's queries and no qrels: one query-id, corpus-id, score a line in qrels/test.tsv"
        )
    relevant = _judgements(root, file)
    queries = rows.find(root, "queries")
    assert queries is not None  # `is_beir` has found it
    found, unknown = [], 0
    for row in rows.read(root, queries, {}, "_id"):
        identity = row.values["_id"]
        if identity not in relevant:
            continue
        passages: dict[str, None] = {}
        for document in relevant.pop(identity) if gold is not None else ():
            own = gold.get(document) if gold is not None else None
            unknown += own is None
            passages |= dict.fromkeys(passage.id for passage in own or ())
        found.append(
            Question(
                identity,
                rows.string(row.place, row.values, "text"),
                (),
                "untrained",
                tuple(passages),
            )
        )
    if gold is not None and (relevant or unknown):
        logging.warning(
            "%s names %d queries and %d relevant documents that the folder does not have",
            file,
            len(relevant),
            unknown,
        )
    if not found:
        raise UserError(f"{file} names none of the queries in {queries.name}")
    return found


def _judgements(root: Path, file: Path) -> dict[str, list[str]]:
    """Reads the relevant documents of each query: those with a score above 0."""
    found: dict[str, list[str]] = {}
    if not rows.lies_inside(root, file):
        raise UserError(f"{file} is a link that leads outside {root}; copy the file instead")
    for number, text, _ in rows.lines(file):
        cells = text.split("\t")
        if number == 1 and not _is_score(cells[-1]):
            continue  # the headings
        # TREC's own form has a column between the two.
        if len(cells) not in (3, 4) or not _is_score(cells[-1]):
            raise UserError(
                f"{file}:{number}: expected query-id, corpus-id and score, divided by tabs"
            )
        documents = found.setdefault(cells[0].strip(), [])
        if float(cells[-1]) > 0:
            documents.append(cells[-2].strip())
    return {query: documents for query, documents in found.items() if documents}


def _is_score(text: str) -> bool:
    try:
        return abs(float(text)) < 1e9
    except ValueError:
        return False
