"""Files as others publish them: FlashRAG's and BEIR's, as JSON lines, gzipped, as tables and as
Parquet."""

from __future__ import annotations

import csv
import gzip
import io
import json

import pyarrow
import pytest
from pyarrow import parquet

from experiments import build
from kafjax.core.errors import UserError
from kafjax.corpus import CorpusConfig, load
from kafjax.corpus.folder import load_folder, load_passages

DOCUMENTS = [
    {"id": 1, "contents": "Rome\nIt is old."},
    {"id": 2, "contents": 'Oslo, a city, is in "Norway".'},
]
QUESTIONS = [
    {
        "id": "q",
        "question": "Where is Oslo?",
        "golden_answers": ["Norway", "in Norway"],
        "split": "untrained",
        "passages": ["2"],
    }
]


def lines(rows) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def table(rows, delimiter=",") -> bytes:
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(
        {k: json.dumps(v) if isinstance(v, list) else v for k, v in row.items()} for row in rows
    )
    return out.getvalue().encode("utf-8-sig")


def as_parquet(rows) -> bytes:
    out = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(rows), out)
    return out.getvalue()


KINDS = {
    ".jsonl": lines,
    ".jsonl.gz": lambda rows: gzip.compress(lines(rows), mtime=0),
    ".csv": table,
    ".tsv": lambda rows: table(rows, "\t"),
    ".parquet": as_parquet,
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_file_gives_the_same_corpus(tmp_path, kind):
    (tmp_path / f"corpus{kind}").write_bytes(KINDS[kind](DOCUMENTS))
    (tmp_path / f"questions{kind}").write_bytes(KINDS[kind](QUESTIONS))
    corpus = load_folder(tmp_path)
    assert [(p.id, p.text) for p in corpus.passages] == [
        ("1#0", "Rome: It is old."),
        ("2#0", 'Oslo, a city, is in "Norway".'),
    ]
    assert [(q.answers, q.passages) for q in corpus.questions] == [
        (("Norway", "in Norway"), ("2#0",))
    ]
    assert all(
        p.source.file == f"corpus{kind}" and p.source.lines is not None for p in corpus.passages
    )


def test_a_row_cites_its_line_and_bytes(tmp_path):
    (tmp_path / "corpus.jsonl").write_bytes(b"\n" + lines(DOCUMENTS))
    data = (tmp_path / "corpus.jsonl").read_bytes()
    for passage, row in zip(load_passages(tmp_path), DOCUMENTS, strict=True):
        first, behind = passage.source.bytes
        assert json.loads(data[first:behind]) == row
    assert str(load_passages(tmp_path)[1].source) == "corpus.jsonl:3"


@pytest.mark.parametrize(
    ("more", "answers", "subject"),
    [
        ({"golden_answers": "Norway"}, ("Norway",), ""),
        ({"golden_answers": 1931}, ("1931",), ""),
        ({"golden_answers": [1], "choices": ["Rome", "Oslo"]}, ("Oslo",), ""),
        (
            {"metadata": {"split": "test", "subject": ["geography", 7]}},
            ("Norway", "in Norway"),
            "geography, 7",
        ),
        ({"subject": 7}, ("Norway", "in Norway"), "7"),
        (
            {"metadata": {"subject": {"a": 1}}, "subject": None, "passages": None},
            ("Norway", "in Norway"),
            "",
        ),
    ],
)
def test_questions_of_flashrag_are_read_as_they_are_published(tmp_path, more, answers, subject):
    (tmp_path / "corpus.jsonl").write_bytes(lines(DOCUMENTS))
    (tmp_path / "questions.jsonl").write_bytes(lines([{**QUESTIONS[0], **more}]))
    assert [(q.answers, q.subject) for q in load_folder(tmp_path).questions] == [(answers, subject)]


def beir(folder, qrels="query-id\tcorpus-id\tscore\nq1\td1\t1\nq1\td2\t0\nq2\td2\t2\n"):
    rows = [{"_id": "d1", "title": "", "text": "The ferry leaves at noon.", "metadata": {}}]
    rows.append({"_id": "d2", "title": "Pier", "text": "It is old."})
    (folder / "corpus.jsonl").write_bytes(lines(rows))
    (folder / "queries.jsonl").write_bytes(
        lines([{"_id": f"q{i}", "text": f"When does ferry {i} leave?"} for i in (1, 2, 3)])
    )
    (folder / "qrels").mkdir()
    (folder / "qrels" / "test.tsv").write_text(qrels)
    return folder


def test_a_folder_of_beir_is_read_with_its_judgements(tmp_path):
    corpus = load_folder(beir(tmp_path), needs_questions=False)
    assert [(p.id, p.text) for p in corpus.passages] == [
        ("d1#0", "The ferry leaves at noon."),
        ("d2#0", "Pier: It is old."),
    ]
    assert [(q.id, q.answers, q.passages) for q in corpus.questions] == [
        ("q1", (), ("d1#0",)),
        ("q2", (), ("d2#0",)),
    ]


@pytest.mark.parametrize("kind", [".jsonl", ".parquet"])
def test_beir_is_read_in_other_files_and_with_numeric_ids(tmp_path, kind):
    (tmp_path / f"corpus{kind}").write_bytes(
        KINDS[kind]([{"_id": 1, "title": None, "text": "a."}, {"_id": 2, "title": "T", "text": ""}])
    )
    (tmp_path / f"queries{kind}").write_bytes(KINDS[kind]([{"_id": 7, "text": "who?"}]))
    (tmp_path / "qrels").mkdir()
    (tmp_path / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n7\t2\t1\n")
    corpus = load_folder(tmp_path, needs_questions=False)
    assert [(p.id, p.text) for p in corpus.passages] == [("1#0", "a."), ("2#0", "T")]
    assert [(q.id, q.passages) for q in corpus.questions] == [("7", ("2#0",))]


def test_metadata_of_parquet_holds_keys_of_other_rows(tmp_path):
    """A column of structs has every key in every row, null where a row has none."""
    metadata = [{"split": "test", "subject": ["geo"]}, {"split": None, "subject": None}]
    asked = [{**QUESTIONS[0], "id": i, "metadata": m} for i, m in enumerate(metadata)]
    (tmp_path / "corpus.parquet").write_bytes(as_parquet(DOCUMENTS))
    (tmp_path / "questions.parquet").write_bytes(as_parquet(asked))
    assert [(q.id, q.subject) for q in load_folder(tmp_path).questions] == [("0", "geo"), ("1", "")]


def test_tables_under_other_names_are_told_how_to_be_read(tmp_path, caplog):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train-00000-of-00001.parquet").write_bytes(as_parquet(DOCUMENTS))
    (tmp_path / "a.md").write_text("x")
    assert len(load_passages(tmp_path)) == 1
    assert "name it corpus.parquet or questions.parquet, in the folder itself" in caplog.text


def test_queries_without_answers_are_refused_where_answers_are_scored(tmp_path):
    with pytest.raises(UserError, match=r"queries have no answers .*scripts/rank\.py"):
        load_folder(beir(tmp_path))


@pytest.mark.parametrize(
    ("qrels", "message"),
    [
        ("q1 d1 1\n", r"test\.tsv names none"),
        (
            "query-id\tcorpus-id\tscore\nq1\td1\tyes\n",
            r"test\.tsv:2: expected query-id, corpus-id and score",
        ),
        ("q9\td1\t1\n", r"names none of the queries"),
    ],
)
def test_broken_judgements_are_told(tmp_path, qrels, message):
    with pytest.raises(UserError, match=message):
        load_folder(beir(tmp_path, qrels), needs_questions=False)


def test_judgements_about_what_is_not_there_are_told(tmp_path, caplog):
    load_folder(beir(tmp_path, "q1\td1\t1\nq1\td9\t1\nq9\td1\t1\n"), needs_questions=False)
    assert "names 1 queries and 1 relevant documents that the folder does not have" in caplog.text


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("corpus.csv", b"id,contents\n1,a,b\n", r"corpus\.csv: row 2: has not as many cells"),
        ("corpus.csv", b'id,contents\n1,"a\n', r"corpus\.csv:\d+: not valid CSV"),
        ("corpus.csv", b"name,contents\n1,a\n", r"corpus\.csv: row 2: 'id' is missing"),
        ("corpus.parquet", b"nothing of the kind", r"cannot read .*corpus\.parquet"),
        ("corpus.jsonl.gz", b"nothing of the kind", r"cannot read .*corpus\.jsonl\.gz"),
        (
            "corpus.jsonl.gz",
            gzip.compress(lines(DOCUMENTS), mtime=0)[:-9],
            r"cannot read .*corpus\.jsonl\.gz",
        ),
        (
            "a.txt",
            "caf\u00e9".encode("latin1"),
            r"a\.txt: not UTF-8 \(byte 3\); convert it: iconv -f latin1 -t utf-8",
        ),
        ("a.txt", "\u201cx\u201d".encode("windows-1252"), r"iconv -f windows-1252 -t utf-8"),
        ("a.txt", "x".encode("utf-16"), r"iconv -f utf-16 -t utf-8"),
        (
            "corpus.jsonl",
            b'{"id": 1, "contents": "a", "format": "latex"}\n',
            r"unknown format 'latex'",
        ),
    ],
)
def test_broken_files_are_told_in_one_line(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=message) as caught:
        load_passages(tmp_path)
    assert "\n" not in str(caught.value)


def test_where_a_text_was_read_from_does_not_make_a_corpus_another(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "corpus.jsonl").write_bytes(lines(DOCUMENTS))
    config = CorpusConfig(corpus=str(tmp_path / "a"), retention=0, held_out=0)

    def identity():
        return build.corpus_identity(
            config, load(config.corpus, n_retention=0, n_held_out=0, needs_questions=False)
        )

    before = identity()
    (tmp_path / "a" / "corpus.jsonl").write_bytes(b"\n\n" + lines(DOCUMENTS))
    assert identity() == before
    (tmp_path / "a" / "corpus.jsonl").write_bytes(lines(DOCUMENTS[:1]))
    assert identity() != before


def test_text_files_beside_a_corpus_are_told(tmp_path, caplog):
    (tmp_path / "corpus.jsonl").write_bytes(lines(DOCUMENTS))
    (tmp_path / "more.md").write_text("x")
    assert len(load_passages(tmp_path)) == 2
    assert "1 text files beside it are not read, such as more.md" in caplog.text
