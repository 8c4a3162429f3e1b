from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kafjax.core.errors import UserError
from kafjax.core.records import Document
from kafjax.corpus.chunking import chunk, cut, deduplicate, sentences


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("She left. He stayed! Why? No one knows.", ["She left.", "He stayed!", "Why?", "No one knows."]),
        ("Dr. Smith met Mrs. Jones. They talked.", ["Dr. Smith met Mrs. Jones.", "They talked."]),
        ("J. K. Rowling and J. R. R. Tolkien write. A man came.", ["J. K. Rowling and J. R. R. Tolkien write.", "A man came."]),
        ("Pi is 3.14 and e is 2.72. Both are real.", ["Pi is 3.14 and e is 2.72.", "Both are real."]),
        ("The U.S. Army came. We left the U.S. It was cold.", ["The U.S. Army came.", "We left the U.S.", "It was cold."]),
        ("Take a fruit, e.g. Apples. Then eat.", ["Take a fruit, e.g. Apples.", "Then eat."]),
        ("See No. 5 of it. He said no. They left.", ["See No. 5 of it.", "He said no.", "They left."]),
        ('"Really?" he asked. "Yes." (So it was.) Fine.', ['"Really?" he asked.', '"Yes."', "(So it was.)", "Fine."]),
        ("It broke at 5 p.m. and then ... nothing. Good", ["It broke at 5 p.m. and then ... nothing.", "Good"]),
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
_SENTENCES = st.lists(st.integers(0, 9).map(lambda n: "Word" + " word" * n + "."), max_size=9).map(" ".join)


@settings(deadline=None)
@given(_PROSE)
def test_sentences_lose_and_invent_nothing(text: str) -> None:
    found = sentences(text)
    assert re.sub(r"\s", "", "".join(found)) == re.sub(r"\s", "", text)
    assert all(sentence == " ".join(sentence.split()) and sentence for sentence in found)


def test_long_text_without_a_stop_is_split_in_linear_time() -> None:
    words = "word Dr. Word " * 40_000
    assert sentences(words) == [words.strip()]


@settings(deadline=None)
@given(st.lists(_PROSE | _SENTENCES, max_size=4), st.integers(1, 12), st.data())
def test_packed_passages_keep_every_word_and_the_limit(texts: list[str], size: int, data: st.DataObject) -> None:
    documents = [Document(id=str(k), text=text) for k, text in enumerate(texts)]
    overlap = data.draw(st.integers(0, size - 1))
    plain, overlapping = cut(documents, size), cut(documents, size, overlap)
    assert all(len(passage.text.split()) <= size for passage in plain + overlapping)
    for document in documents:
        words = [word for p in plain if p.document == document.id for word in p.text.split()]
        assert words == [word for sentence in sentences(document.text) for word in sentence.split()]
        seen = [word for p in overlapping if p.document == document.id for word in p.text.split()]
        assert len(words) <= len(seen) and set(words) == set(seen)


def test_overlap_repeats_whole_sentences() -> None:
    text = "One two three. Four five. Six seven eight. Nine ten."
    assert [p.text for p in chunk([Document("d", text)], 5, overlap=2)] == [
        "One two three. Four five.",
        "Four five. Six seven eight.",
        "Nine ten.",
    ]


def test_ids_count_within_the_document_and_titles_stay_with_their_text() -> None:
    documents = [Document("a", "Ada Byron\nShe wrote. Ada Byron counted.", title="Ada Byron"), Document("b", "Untitled.")]
    assert [(p.id, p.text, p.document) for p in chunk(documents)] == [
        ("a#0", "Ada Byron: She wrote.", "a"),
        ("a#1", "Ada Byron counted.", "a"),
        ("b#0", "Untitled.", "b"),
    ]
    assert [p.text for p in chunk(documents, "document")] == ["She wrote. Ada Byron counted.", "Untitled."]


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
