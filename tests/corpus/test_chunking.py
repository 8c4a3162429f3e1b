from __future__ import annotations

import re
import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kafjax.core.errors import UserError
from kafjax.core.records import Document, Passage
from kafjax.core.words import words
from kafjax.corpus.chunking import chunk, cut, deduplicate
from kafjax.corpus.sentences import sentences


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "She left. He stayed! Why? No one knows.",
            ["She left.", "He stayed!", "Why?", "No one knows."],
        ),
        ("Dr. Smith met Mrs. Jones. They talked.", ["Dr. Smith met Mrs. Jones.", "They talked."]),
        (
            "J. K. Rowling and J. R. R. Tolkien write. A man came.",
            ["J. K. Rowling and J. R. R. Tolkien write.", "A man came."],
        ),
        (
            "Pi is 3.14 and e is 2.72. Both are real.",
            ["Pi is 3.14 and e is 2.72.", "Both are real."],
        ),
        (
            "The U.S. Army came. We left the U.S. It was cold.",
            ["The U.S. Army came.", "We left the U.S.", "It was cold."],
        ),
        ("Take a fruit, e.g. Apples. Then eat.", ["Take a fruit, e.g. Apples.", "Then eat."]),
        (
            "See No. 5 of it. He said no. They left.",
            ["See No. 5 of it.", "He said no.", "They left."],
        ),
        (
            '"Really?" he asked. "Yes." (So it was.) Fine.',
            ['"Really?" he asked.', '"Yes."', "(So it was.)", "Fine."],
        ),
        (
            "It broke at 5 p.m. and then ... nothing. Good",
            ["It broke at 5 p.m. and then ... nothing.", "Good"],
        ),
        (
            "# A title\nBody one. Body two\n- item\n- other item.\n\nNew",
            ["# A title", "Body one.", "Body two", "- item", "- other item.", "New"],
        ),
        ("A line that\nwraps here. Next", ["A line that wraps here.", "Next"]),
        ("\u6771\u4eac\u3002\u5927\u962a\uff01", ["\u6771\u4eac\u3002", "\u5927\u962a\uff01"]),
        ("no stop at all", ["no stop at all"]),
        (" \n\t ", []),
    ],
)
def test_sentences(text: str, expected: list[str]) -> None:
    assert sentences(text) == expected


_PROSE = st.text(alphabet=st.sampled_from("aAbB1. .!?\"')(\n-#Dr\u3002\u2026"), max_size=80)
_SENTENCES = st.lists(st.integers(0, 9).map(lambda n: "Word" + " word" * n + "."), max_size=9).map(
    " ".join
)


@settings(deadline=None)
@given(_PROSE)
def test_sentences_lose_and_invent_nothing(text: str) -> None:
    found = sentences(text)
    assert re.sub(r"\s", "", "".join(found)) == re.sub(r"\s", "", text)
    assert all(sentence == " ".join(sentence.split()) and sentence for sentence in found)


def test_long_text_without_a_stop_is_split_in_linear_time() -> None:
    words = "word Dr. Word " * 40_000
    assert sentences(words) == [words.strip()]


def test_a_latin_bracket_that_touches_a_word_stays_with_it():
    assert sentences("\u597d\u3002)1 \u597d\u3002) \u597d\u3002)))1") == [
        "\u597d\u3002",
        ")1 \u597d\u3002)",
        "\u597d\u3002",
        ")))1",
    ]


@settings(deadline=None)
@example(["1\u3002)1"], 2, 0)
@given(st.lists(_PROSE | _SENTENCES, max_size=4), st.integers(1, 12), st.integers(0, 11))
def test_packed_passages_keep_every_word_and_the_limit(
    texts: list[str], size: int, overlap: int
) -> None:
    documents = [Document(id=str(k), text=text) for k, text in enumerate(texts)]
    plain, overlapping = cut(documents, size), cut(documents, size, overlap % size)
    assert all(len(words(passage.text)) <= size for passage in plain + overlapping)

    def told(passages: list[Passage], document: Document) -> list[str]:
        return [
            word.strip() for p in passages if p.document == document.id for word in words(p.text)
        ]

    for document in documents:
        once, seen = told(plain, document), told(overlapping, document)
        assert once == [
            word.strip() for sentence in sentences(document.text) for word in words(sentence)
        ]
        assert len(once) <= len(seen) and set(once) == set(seen)


def test_overlap_repeats_whole_sentences() -> None:
    text = "One two three. Four five. Six seven eight. Nine ten."
    assert [p.text for p in chunk([Document("d", text)], 5, overlap=2)] == [
        "One two three. Four five.",
        "Four five. Six seven eight.",
        "Nine ten.",
    ]


def test_ids_count_within_the_document_and_titles_stay_with_their_text() -> None:
    documents = [
        Document("a", "Ada Byron\nShe wrote. Ada Byron counted.", title="Ada Byron"),
        Document("b", "Untitled."),
    ]
    assert [(p.id, p.text, p.document) for p in chunk(documents)] == [
        ("a#0", "Ada Byron: She wrote.", "a"),
        ("a#1", "Ada Byron counted.", "a"),
        ("b#0", "Untitled.", "b"),
    ]
    assert [p.text for p in chunk(documents, "document")] == [
        "She wrote. Ada Byron counted.",
        "Untitled.",
    ]


def test_the_first_of_equal_passages_stands_for_the_others() -> None:
    passages, kept = deduplicate(cut([Document("a", "Same. New."), Document("b", "Other. Same.")]))
    assert [p.id for p in passages] == ["a#0", "a#1", "b#0"]
    assert kept == {"a#0": "a#0", "a#1": "a#1", "b#0": "b#0", "b#1": "a#0"}


@pytest.mark.parametrize(
    ("size", "overlap", "message"),
    [
        ("sentance", 0, "unknown chunk size 'sentance'.*Did you mean 'sentence'"),
        (0, 0, "at least 1 word, got 0"),
        ("8", 8, "less than the chunk size of 8 words, got 8"),
        (8, -1, "at least 0"),
        ("sentence", 4, "needs a chunk size in words"),
    ],
)
def test_bad_sizes(size: str | int, overlap: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        chunk([Document("d", "Text.")], size, overlap)


WIDE = {
    "chinese": "".join(f"第{i}位村民住在河边的小屋里。每天清晨去山上采茶。" for i in range(250)),
    "no stops": "村民住在河边的小屋里" * 600,
    "japanese": "".join(f"第{i}番の村人は川のそばに住んでいます。" for i in range(250)),
    "thai": "ชาวบ้านอาศัยอยู่ริมแม่น้ำ" * 200,
    "address": "https://example.org/" + "a1b2c3d4e5" * 600,
}


@pytest.mark.parametrize("text", WIDE.values(), ids=WIDE)
def test_texts_without_spaces_are_cut_into_passages_of_as_many_letters(text):
    passages = chunk([Document("d", text)], 64)
    assert all(len(words(p.text)) <= 64 and len(p.text) <= 800 for p in passages)
    kept = cut([Document("d", text)], 64)
    # nothing is lost, repeated passages counted
    assert "".join(p.text for p in kept).replace(" ", "") == text


def test_words_joined_are_the_text_and_spaced_scripts_are_counted_as_ever():
    text = "The  ferry\nleaves at noon, 茶を飲む said she."
    assert "".join(words(text)).strip() == " ".join(text.split())
    plain = "The ferry leaves at noon, she said; Donaudampfschifffahrtsgesellschaftskapitän."
    assert [word.strip() for word in words(plain)] == plain.split()


def test_long_rows_of_marks_are_cut_in_no_time():
    began = time.perf_counter()
    for mark in (".", "!", "?", "\u2026", ".)", "\n", "\n \n", '"'):
        sentences(f"One. {mark * 20_000} Two.")
    assert time.perf_counter() - began < 5
