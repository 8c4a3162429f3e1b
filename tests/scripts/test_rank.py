"""Rankings of documents: what is printed, and the files that others read."""

from __future__ import annotations

import json

import pytest

from experiments.configs.passages import ListPassages
from experiments.configs.rank import Rank
from kafjax.core.config import changed
from kafjax.core.errors import UserError
from kafjax.core.records import Passage
from kafjax.evaluation.rankings import by_document, to_trec
from scripts import passages, rank


@pytest.fixture
def folder(tmp_path):
    corpus = tmp_path / "beir"
    (corpus / "qrels").mkdir(parents=True)
    rows = [
        {"_id": "d 1", "title": "", "text": "The ferry leaves at noon."},
        {"_id": "d2", "title": "Pier", "text": "It is old."},
    ]
    (corpus / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    queries = [
        {"_id": "q1", "text": "When does the ferry leave?"},
        {"_id": "q2", "text": "How old is the pier?"},
    ]
    (corpus / "queries.jsonl").write_text("".join(json.dumps(row) + "\n" for row in queries))
    (corpus / "qrels" / "test.tsv").write_text(
        "query-id\tcorpus-id\tscore\nq1\td 1\t1\nq2\td2\t1\nq2\td 1\t0\n"
    )
    return corpus


def test_a_folder_of_beir_is_ranked_scored_and_written(folder, tmp_path, capsys):
    pytest.importorskip("bm25s", reason="bm25s is not installed (extra [retrieval])")
    rank.run(
        changed(Rank(), corpus=str(folder), retriever="lexical", k=2, out=str(tmp_path / "out"))
    )
    assert "nDCG@2 %: 100.0" in capsys.readouterr().out
    columns = [line.split() for line in (tmp_path / "out" / "run.trec").read_text().splitlines()]
    assert all(len(row) == 6 and row[1] == "Q0" for row in columns)
    assert [(row[0], row[2]) for row in columns if row[3] == "1"] == [("q1", "d_1"), ("q2", "d2")]
    written = json.loads((tmp_path / "out" / "retrieval.json").read_text())
    assert written[0]["output"]["retrieval_result"][0] == {
        "id": "d 1#0",
        "contents": "The ferry leaves at noon.",
    }


def test_a_document_ranks_by_its_best_passage():
    hits = [
        (Passage("a#1", "", "a"), 3.0),
        (Passage("b#0", "", "b"), 2.0),
        (Passage("a#0", "", "a"), 1.0),
        (Passage("c#0", "", "c"), 0.5),
    ]
    assert by_document(hits, 2) == [("a", 3.0), ("b", 2.0)]
    assert to_trec({"q 1": [("d", 0.5)]}, "tag") == "q_1 Q0 d 1 0.500000 tag\n"


def test_a_corpus_without_questions_is_told(tmp_path):
    (tmp_path / "a.txt").write_text("Text.")
    with pytest.raises(UserError, match="has no questions to rank for"):
        rank.run(changed(Rank(), corpus=str(tmp_path), retriever="lexical"))


def test_passages_are_listed_with_their_place(tmp_path, capsys):
    (tmp_path / "a.md").write_text("# Harbour\nThe ferry leaves.\n\nIt is late.")
    passages.run(changed(ListPassages(), corpus=str(tmp_path), chunk="sentence"))
    assert capsys.readouterr().out.splitlines() == [
        "a.md#0\ta.md:2 (Harbour)\t4\tHarbour: The ferry leaves.",
        "a.md#1\ta.md:4 (Harbour)\t4\tHarbour: It is late.",
        "1 documents, 2 passages of 4 to 4 words",
    ]
    passages.run(changed(ListPassages(), corpus=str(tmp_path), json=True))
    row = json.loads(capsys.readouterr().out)
    assert (
        row["source"]["bytes"] == [10, 40]
        and row["source"]["heading"] == ["Harbour"]
        and row["words"] == 7
    )
