from __future__ import annotations

import dataclasses
import json
import os
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kafjax.core.errors import UserError
from kafjax.core.records import Corpus, Document, Question
from kafjax.corpus import CorpusConfig
from kafjax.corpus.biographies import biographies
from kafjax.corpus.chunking import chunk
from kafjax.corpus.folder import load_folder, load_passages, save_folder, stream_folder
from kafjax.corpus.load import load, open_corpus, stream_corpus
from kafjax.corpus.questions import load_questions, save_questions

PASSAGES = [
    {"id": "p1", "contents": "Rome\nIt is old. It is big."},
    {"id": 2, "contents": "Oslo is in Norway."},
]
QUESTIONS = [
    {"id": "q1", "question": "Where is Oslo?", "golden_answers": ["Norway"], "passages": ["2"]}
]


def _lines(rows: list[object]) -> str:
    return "".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows)


def _folder(
    path: Path, passages: list[object] | None = None, questions: list[object] | None = None
) -> Path:
    path.mkdir(exist_ok=True)
    (path / "corpus.jsonl").write_text(_lines(PASSAGES if passages is None else passages))
    (path / "questions.jsonl").write_text(_lines(QUESTIONS if questions is None else questions))
    return path


def test_short_passages_are_taken_as_they_are_and_titles_kept(tmp_path: Path) -> None:
    corpus = load_folder(_folder(tmp_path / "cities"))
    assert corpus.name == "cities"
    assert [(d.id, d.title, d.text) for d in corpus.documents] == [
        ("p1", "Rome", "Rome\nIt is old. It is big."),
        ("2", "", "Oslo is in Norway."),
    ]
    assert [(p.id, p.text) for p in corpus.passages] == [
        ("p1#0", "Rome: It is old. It is big."),
        ("2#0", "Oslo is in Norway."),
    ]


@pytest.mark.parametrize(
    ("answer", "gold"),
    [("Number 29!", [3]), ("number 2", [0]), ("30", [0, 1, 2, 3]), ("東京", [1])],
    ids=["in one", "whole words", "in none", "no blanks"],
)
def test_long_passages_are_cut_and_a_documents_gold_are_those_with_an_answer(
    tmp_path: Path, answer: str, gold: list[int], caplog
) -> None:
    sentences = [
        f"This is sentence number {k}{'、今は東京にいる' * (k == 12)}, of many." for k in range(30)
    ]
    question = {
        "id": "q",
        "question": "How many?",
        "golden_answers": [answer],
        "passages": ["long", "2#0"],
    }
    folder = _folder(
        tmp_path / "c", [*PASSAGES, {"id": "long", "contents": " ".join(sentences)}], [question]
    )
    corpus = load_folder(folder)
    parts = tuple(p.id for p in corpus.passages if p.document == "long")
    assert len(parts) == 4 and all(len(p.text.split()) <= 64 for p in corpus.passages)
    assert {q.passages for q in (*corpus.questions, *corpus.training_questions)} == {
        (*(parts[i] for i in gold), "2#0")
    }
    assert (
        "1 questions name a document of which no passage holds an accepted answer, such as 'q'"
        in caplog.text
    ) == (answer == "30")
    assert [p.text for p in load_folder(folder, "sentence").passages][:3] == [
        "Rome: It is old.",
        "Rome: It is big.",
        "Oslo is in Norway.",
    ]


def test_first_gold_of_a_document_is_the_passage_that_speaks_of_what_is_asked(tmp_path) -> None:
    pages = "\n\n".join(
        f"## {name}\n\nDefault: {n}\n\nHow often the {name} is done."
        for name, n in (("depth", 2), ("sockets", 15), ("retries", 2), ("age", 2))
    )
    folder = tmp_path / "c"
    folder.mkdir()
    (folder / "config.md").write_text(f"# Config\n\n{pages} {'More words. ' * 60}")
    row = {"id": "q", "question": "How many retries are the default?", "golden_answers": ["2"]}
    (folder / "questions.jsonl").write_text(json.dumps({**row, "passages": ["config.md"]}))
    corpus = load_folder(folder)
    (question,) = corpus.questions
    texts = {p.id: p.text for p in corpus.passages}
    golds = [texts[id] for id in question.passages]
    assert "retries" in golds[0] and len(golds) == 3 and "sockets" not in " ".join(golds)


def test_gold_ids_follow_a_duplicate_to_the_passage_that_was_kept(tmp_path: Path) -> None:
    rows = [{"id": "a", "contents": "Same text."}, {"id": "b", "contents": "Same text."}]
    questions = [
        {"id": f"q{k}", "question": "What?", "golden_answers": ["x"], "passages": [gold]}
        for k, gold in enumerate(["b", "b#0"])
    ]
    corpus = load_folder(_folder(tmp_path / "c", rows, questions))
    assert [p.id for p in corpus.passages] == ["a#0"]
    assert {q.passages for q in (*corpus.questions, *corpus.training_questions)} == {("a#0",)}


def test_text_files_are_documents_named_by_their_path(tmp_path: Path, caplog) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "b.txt").write_text("Bee.")
    (tmp_path / "sub" / "a.md").write_text("\ufeff# Heading\nAy.", encoding="utf-8")
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / ".hidden" / "c.txt").write_text("Not read.")
    (tmp_path / "questions.jsonl").write_text(
        _lines([{"id": "q", "question": "?", "golden_answers": ["Ay"], "passages": ["sub/a.md"]}])
    )
    (tmp_path / "d.xyz").write_bytes(b"\xff")
    corpus = load_folder(tmp_path, "sentence")
    assert [(d.id, d.text) for d in corpus.documents] == [
        ("b.txt", "Bee."),
        ("sub/a.md", "# Heading\nAy."),
    ]
    assert {q.passages for q in (*corpus.questions, *corpus.training_questions)} == {
        ("sub/a.md#0",)
    }
    for told in (
        ".hidden (hidden; rename",
        "d.xyz (.xyz; convert to .md or .txt",
        "empty.txt (empty)",
    ):
        assert told in caplog.text


def test_links_that_lead_outside_are_not_followed(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "s.txt").write_text("Secret.")
    (secret / "corpus.jsonl").write_text(_lines(PASSAGES))
    inside = tmp_path / "inside"
    inside.mkdir()
    (inside / "a.txt").write_text("Open.")
    (inside / "questions.jsonl").write_text(_lines([{**QUESTIONS[0], "passages": []}]))
    os.symlink(secret / "s.txt", inside / "s.txt")
    os.symlink(secret, inside / "more")
    assert [d.id for d in load_folder(inside).documents] == ["a.txt"]
    os.symlink(secret / "corpus.jsonl", inside / "corpus.jsonl")
    with pytest.raises(UserError, match="leads outside"):
        load_folder(inside)


def test_questions_without_a_split_are_dealt_by_their_id(tmp_path: Path) -> None:
    questions = [
        {"id": f"q{k}", "question": f"What is {k}?", "golden_answers": ["x"]} for k in range(200)
    ]
    corpus = load_folder(_folder(tmp_path / "c", None, questions))
    seen = {q.text for q in corpus.questions if q.split == "seen"}
    untrained = {q.text for q in corpus.questions if q.split == "untrained"}
    assert {q.text for q in corpus.training_questions} == seen and 70 < len(seen) < 130
    assert not seen & untrained and len(seen) + len(untrained) == 200
    # A question's part does not depend on the others.
    fewer = load_folder(_folder(tmp_path / "d", None, questions[::-7]))
    assert set(fewer.questions) < set(corpus.questions)


def test_splits_and_subjects_are_honoured_at_the_top_or_in_the_metadata(tmp_path: Path) -> None:
    base = {"question": "What?", "golden_answers": ["x", 1912]}
    rows = [
        {**base, "id": "a", "split": "train"},
        {**base, "id": "b", "metadata": {"split": "paraphrase", "subject": "Ada"}},
        {**base, "id": "c", "split": "retention", "metadata": None},
        {**base, "id": "d", "split": "replay"},
    ]
    corpus = load_folder(_folder(tmp_path / "c", None, rows))
    assert [q.id for q in corpus.training_questions] == ["a"]
    assert [(q.id, q.split, q.subject, q.answers) for q in corpus.questions] == [
        ("b", "paraphrase", "Ada", ("x", "1912"))
    ]
    assert [q.id for q in corpus.retention] == ["c"] and [
        q.id for q in corpus.replay_questions
    ] == ["d"]


@pytest.mark.parametrize("size", ["sentence", "document", 24])
def test_a_saved_corpus_loads_as_the_same(tmp_path: Path, size: str | int) -> None:
    for name in ("biographies", "factbook"):
        corpus = load(name, n_subjects=6, n_documents=9, chunk=size, n_retention=4, n_held_out=3)
        save_folder(corpus, tmp_path / name)
        assert load_folder(tmp_path / name, size) == corpus
    updated = biographies(6, size=size, updates=True)
    save_folder(updated, tmp_path / "updated")
    assert load_folder(tmp_path / "updated", size) == dataclasses.replace(updated, name="updated")


_TEXT = st.text(st.characters(codec="utf-8"), min_size=1, max_size=30).filter(str.strip)


@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25, deadline=None
)
@given(
    st.dictionaries(_TEXT, st.tuples(_TEXT, st.just("") | _TEXT), min_size=1, max_size=4),
    st.dictionaries(
        _TEXT, st.tuples(_TEXT, st.lists(_TEXT, min_size=1, max_size=3)), min_size=1, max_size=4
    ),
    st.sampled_from(["sentence", "document", 3]),
)
def test_any_text_survives_saving(
    tmp_path: Path,
    documents: dict[str, tuple[str, str]],
    questions: dict[str, tuple[str, list[str]]],
    size: str | int,
) -> None:
    written = tuple(
        Document(identity, text, title) for identity, (text, title) in documents.items()
    )
    passages = chunk(written, size)
    gold = (passages[0].id,) if passages else ()
    asked = tuple(
        Question(identity, text, tuple(answers), "seen", gold, "s")
        for identity, (text, answers) in questions.items()
    )
    folder = tmp_path / str(len(list(tmp_path.iterdir())))
    corpus = Corpus(folder.name, written, passages, (), asked)
    save_folder(corpus, folder)
    assert load_folder(folder, size) == corpus


def test_saving_overwrites_nothing(tmp_path: Path) -> None:
    folder = _folder(tmp_path / "c")
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    with pytest.raises(UserError, match="not an empty directory"):
        save_folder(biographies(2), folder)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


GOOD = QUESTIONS[0]


@pytest.mark.parametrize(
    ("passages", "questions", "message"),
    [
        ([], QUESTIONS, "the corpus in .* is empty: corpus.jsonl is empty"),
        ([PASSAGES[0], '{"id": "x", "contents": \n'], QUESTIONS, r"corpus.jsonl:2: not valid JSON"),
        (
            [PASSAGES[0], "\n", "[1]\n"],
            QUESTIONS,
            r"corpus.jsonl:3: expected a JSON object, got list",
        ),
        (
            [{"id": "x", "text": "T."}],
            QUESTIONS,
            r"corpus.jsonl:1: 'contents' is missing \(there is: 'id', 'text'\)",
        ),
        ([{"contents": "T."}], QUESTIONS, r"corpus.jsonl:1: 'id' is missing"),
        ([{"id": "x", "contents": " "}], QUESTIONS, r"corpus.jsonl:1: 'contents' is empty"),
        (
            [{"id": "x", "contents": 3}],
            QUESTIONS,
            r"corpus.jsonl:1: 'contents' must be a string, got 3",
        ),
        (
            [{"id": True, "contents": "T."}],
            QUESTIONS,
            r"corpus.jsonl:1: 'id' must be a string, got true",
        ),
        (
            [{"id": 2, "contents": "T."}, {"id": "2", "contents": "U."}],
            QUESTIONS,
            r"corpus.jsonl:2: id '2' is taken by .*corpus.jsonl:1",
        ),
        (
            ['{"id": "x", "contents": "\\ud800"}\n'],
            QUESTIONS,
            r"corpus.jsonl:1: not valid JSON \(surrogates not allowed\)",
        ),
        (['{"id": ' + "[" * 100_000 + "\n"], QUESTIONS, r"corpus.jsonl:1: not valid JSON"),
        (None, [], r"questions.jsonl is empty"),
        (None, [GOOD, GOOD], r"questions.jsonl:2: id 'q1' is taken by"),
        (None, [{"id": "q", "golden_answers": ["x"]}], r"questions.jsonl:1: 'question' is missing"),
        (
            None,
            [{"id": "q", "question": "What?"}],
            r"questions.jsonl:1: 'golden_answers' is missing",
        ),
        (
            None,
            [{**GOOD, "golden_answers": []}],
            r"questions.jsonl:1: question 'q1' has no answers",
        ),
        (
            None,
            [{**GOOD, "golden_answers": [" "]}],
            r"questions.jsonl:1: question 'q1' has no answers",
        ),
        (
            None,
            [{**GOOD, "golden_answers": 3.5}],
            r"questions.jsonl:1: 'golden_answers' must be a list of strings, got 3.5",
        ),
        (
            None,
            [{**GOOD, "golden_answers": [2], "choices": ["a", "b"]}],
            r"questions.jsonl:1: .* numbers of 'choices', 0 to 1",
        ),
        (
            None,
            [{**GOOD, "passages": ["p3"]}],
            r"questions.jsonl:1: gold passage 'p3' of question 'q1' matches nothing .*nearest: 'p1'",
        ),
        (
            None,
            [{**GOOD, "split": "paraphrases"}],
            r"questions.jsonl:1: unknown split 'paraphrases'. Did you mean 'paraphrase'\?",
        ),
    ],
)
def test_bad_input_names_file_and_line(
    tmp_path: Path, passages: list[object] | None, questions: list[object], message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load_folder(_folder(tmp_path / "c", passages, questions))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_missing_directory_files_and_encoding(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere does not exist"):
        load_folder(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file is no directory"):
        load_folder(tmp_path / "file")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UserError, match=r"is empty: there is no corpus.jsonl, and no \*.txt"):
        load_folder(empty)
    (empty / "a.txt").write_text("Text.")
    with pytest.raises(UserError, match=r"there is no questions\.jsonl in"):
        load_folder(empty)
    (empty / "a.txt").write_bytes("Málaga".encode("latin1"))
    with pytest.raises(UserError, match=r"a.txt: not UTF-8 \(byte 1\)"):
        load_folder(empty)


def test_passages_alone_need_no_questions_and_may_come_from_one_file(tmp_path: Path) -> None:
    folder = _folder(tmp_path / "cities")
    whole = load_folder(folder).passages
    (folder / "questions.jsonl").unlink()
    assert load_passages(folder) == load_passages(folder / "corpus.jsonl") == whole
    assert [p.text for p in load_passages(folder, "sentence")] == [
        "Rome: It is old.",
        "Rome: It is big.",
        "Oslo is in Norway.",
    ]
    (tmp_path / "none.jsonl").write_text("")
    with pytest.raises(UserError, match=r"none\.jsonl is empty"):
        load_passages(tmp_path / "none.jsonl")
    with pytest.raises(UserError, match=r"gone\.jsonl does not exist"):
        load_passages(tmp_path / "gone.jsonl")


def test_a_stream_gives_the_documents_and_questions_of_the_whole(tmp_path: Path) -> None:
    made = biographies(3, n_documents=2)
    save_folder(made, tmp_path / "saved")
    whole = load_folder(tmp_path / "saved", "sentence")
    documents, questions = stream_folder(tmp_path / "saved")
    assert tuple(documents) == whole.documents
    assert {q.id: q.text for q in questions} == {
        q.id: q.text for q in (*whole.training_questions, *whole.questions)
    }
    for name in (str(tmp_path / "saved"), "biographies"):
        config = CorpusConfig(corpus=name, subjects=4, retention=0, held_out=0, chunk="sentence")
        stream, corpus = stream_corpus(config, 3), open_corpus(config, 3)
        assert (stream.name, tuple(stream.documents)) == (corpus.name, corpus.documents)
        for field in ("training_questions", "questions"):
            streamed, read = getattr(stream, field), getattr(corpus, field)
            assert [(q.id, q.text, q.answers, q.split) for q in streamed] == [
                (q.id, q.text, q.answers, q.split) for q in read
            ]


def test_streaming_holds_a_document_at_a_time(tmp_path: Path) -> None:
    n, text = 4000, "x" * 5000  # 20 MB
    _folder(
        tmp_path / "large",
        [{"id": i, "contents": text} for i in range(n)],
        [QUESTIONS[0] | {"passages": []}],
    )
    tracemalloc.start()
    documents, questions = stream_folder(tmp_path / "large")
    assert (
        sum(len(document.text) for document in documents) == n * len(text) and len(questions) == 1
    )
    assert tracemalloc.get_traced_memory()[1] < 1_000_000
    tracemalloc.stop()


def test_a_stream_tells_of_a_broken_line_when_it_comes_to_it(tmp_path: Path) -> None:
    documents, _ = stream_folder(_folder(tmp_path / "broken", [*PASSAGES, '{"id": "p3", \n']))
    assert next(documents).id == "p1" and next(documents).id == "2"
    with pytest.raises(UserError, match=r"corpus\.jsonl:3: not valid JSON"):
        next(documents)


def test_questions_come_back_without_the_corpus(tmp_path: Path) -> None:
    asked = biographies(2).questions
    save_questions(tmp_path, asked)
    assert load_questions(tmp_path) == [
        dataclasses.replace(question, passages=()) for question in asked
    ]


def test_names_that_are_no_utf_8_become_text(tmp_path: Path) -> None:
    folder = _folder(
        tmp_path / os.fsdecode(b"caf\xe9"),
        questions=[QUESTIONS[0] | {"passages": [r"men\xfc/day.txt"]}],
    )
    (folder / "corpus.jsonl").unlink()
    (folder / os.fsdecode(b"men\xfc")).mkdir()
    (folder / os.fsdecode(b"men\xfc") / "day.txt").write_text("Soup is served at noon.")
    corpus = load_folder(folder)
    assert (corpus.name, corpus.documents[0].id) == (r"caf\xe9", r"men\xfc/day.txt")
    assert corpus.questions[0].passages == (r"men\xfc/day.txt#0",)
    save_folder(corpus, tmp_path / "again")
    assert load_folder(tmp_path / "again").documents[0].id == corpus.documents[0].id
