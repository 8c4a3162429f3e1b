"""Passages are cut to the room in a prompt."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kafjax.prompts import prompt

WORD = st.text("abc", min_size=1, max_size=6)
PASSAGE = st.lists(WORD, min_size=1, max_size=12).map(" ".join)
PASSAGES = st.lists(PASSAGE, max_size=5)
QUESTION = st.lists(WORD, min_size=1, max_size=6).map(" ".join)
ROOM = st.integers(-5, 120)


def count(text: str) -> int:
    """Tokens of a tokenizer that splits words and long ones in two."""
    return sum(1 + (len(word) > 3) for word in text.split())


@given(QUESTION, PASSAGES, ROOM)
def test_what_is_kept_fits(question, passages, room):
    kept = prompt.fit(question, passages, room, count)
    assert not kept or count(prompt.reading(question, kept)) <= room


@given(QUESTION, PASSAGES, ROOM)
def test_the_best_are_kept_whole_or_the_very_best_is_cut_at_a_word(question, passages, room):
    kept = prompt.fit(question, passages, room, count)
    if kept != tuple(passages[: len(kept)]):
        (piece,) = kept
        assert passages[0].split()[: len(piece.split())] == piece.split()


@given(QUESTION, PASSAGES, ROOM)
def test_no_room_is_wasted(question, passages, room):
    kept = prompt.fit(question, passages, room, count)
    if kept == tuple(passages):
        return
    if kept == tuple(passages[: len(kept)]) and kept:
        assert count(prompt.reading(question, passages[: len(kept) + 1])) > room
    else:
        words = passages[0].split()
        longer = " ".join(words[: len(kept[0].split()) + 1 if kept else 1])
        assert count(prompt.reading(question, [longer])) > room


@given(QUESTION, PASSAGES, ROOM, st.integers(0, 60))
def test_more_room_never_keeps_less(question, passages, room, more):
    less, larger = (prompt.fit(question, passages, size, count) for size in (room, room + more))
    assert len(" ".join(less)) <= len(" ".join(larger))


@given(QUESTION, PASSAGES)
def test_the_best_passage_stands_next_to_the_question(question, passages):
    lines = prompt.reading(question, passages).split("\n")
    assert lines[: len(passages)] == [f"Passage: {passage}" for passage in reversed(passages)]
    assert lines[-2:] == [f"Question: {question}", "Answer:"]


def test_a_passage_without_blanks_is_cut_at_a_letter():
    passage = "村民住在河边" * 40
    (kept,) = prompt.fit("?", [passage], 100, len)
    assert passage.startswith(kept) and len(prompt.reading("?", [kept])) == 100


def test_lines_of_code_and_tables_stay_lines_in_the_prompt():
    passage = "Guide:\n```py\nif x:\n\n    y = 1\n```\nwrapped\nprose\n| a |\n|---|"
    assert (
        prompt.passage_lines([passage])
        == "Passage: Guide:\n```py\nif x:\n    y = 1\n```\nwrapped prose\n| a |\n|---|\n"
    )
    assert prompt.passage_lines(["two\nlines\n\nof  prose"]) == "Passage: two lines of prose\n"
    assert (
        prompt.passage_lines(["````\n```\nx\n```\n````\na\nb"])
        == "Passage: ````\n```\nx\n```\n````\na b\n"
    )
