# ruff: noqa: RUF001
"""Sentences in the scripts of the world, and time linear in the text."""

from __future__ import annotations

import gc
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kafjax.core.records import Document
from kafjax.core.words import words
from kafjax.corpus.chunking import LONGEST_SENTENCE, cut
from kafjax.corpus.sentences import sentence_spans, sentences

SPACED = [
    ["هل هذا كتاب؟", "نعم.", "هذا كتاب۔"],
    ["ชาวบ้านอาศัยอยู่ริมแม่น้ำ", "ทุกเช้าเขาไปเก็บชา"],
    ["„Ja.“", "¿Qué?", "Nada."],
    ["What‽", "So it was."],
]
UNSPACED = [
    ["他来了！", "她说：“走吧。”", "然后走了。"],
    ["彼は「東京へ行く。明日だ。」と言った。", "「帰る。」", "彼女は泣いた。"],
    ["３．１４です．", "次の文．"],
    ["यह है।", "वह नहीं है॥"],
    ["ጤና ይስጥልኝ።", "እንዴት ነህ፧"],
    ["តើអ្នក។", "បាទ។"],
]


@pytest.mark.parametrize("expected", SPACED + UNSPACED)
def test_sentences_of_any_script(expected):
    assert sentences(" ".join(expected)) == expected


@pytest.mark.parametrize("expected", UNSPACED)
def test_stops_of_scripts_that_need_no_blank_end_a_sentence_without_one(expected):
    assert sentences("".join(expected)) == expected


def test_the_number_of_an_item_is_no_sentence():
    assert sentences("1. Install it. Then go.\n2. Stop.") == [
        "1. Install it.",
        "Then go.",
        "2. Stop.",
    ]


WITHIN = (
    *(
        "Dr.",
        "Prof. Dr.",
        "e.g.",
        "i.e.",
        "J. R. R.",
        "George H. W.",
        "z. B.",
        "z.B.",
        "d. h.",
        "u. a.",
    ),
    *(
        "bzw.",
        "vgl.",
        "Dr. med.",
        "Dr. phil.",
        "Hr.",
        "geb.",
        "ca. 30 Mio.",
        "No. 5 of",
        "Nr. 5 der",
    ),
    *("am 3.", "vom 31.", "3.14 bis 1.000,50"),
)
BEHIND = {"am 3.": ("Oktober", "März 1990", "Okt. 1990"), "vom 31.": ("Dezember", "Mai")}
WHOLE = (
    "Am 3. Oktober 1990 trat sie bei.",
    "Im 19. Jahrhundert wuchs die Stadt.",
    "J. R. R. Tolkien taught at Oxford.",
    "Obst, z. B. Birnen, kostet ca. 3.50 Euro.",
    "Mr. Phil Gray left in 1990.",
    "There were 3.",
    "I met Phil.",
    "Then it rained.",
    "Sie war 12.",
    "See Fig. 3 and No. 7.",
    "Nr. 5 lebt!",
)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(WITHIN), st.data())
def test_abbreviations_initials_and_ordinals_end_no_sentence(within, data):
    behind = data.draw(
        st.sampled_from(BEHIND.get(within, ("Tolkien", "Wasser", "Berlin", "Müller")))
    )
    text = f"Wort {within} {behind} kam."
    assert sentences(text) == [text]


@settings(max_examples=150, deadline=None)
@given(st.lists(st.sampled_from(WHOLE), min_size=1, max_size=6))
def test_sentences_that_hold_them_are_found_whole_in_any_order(expected):
    assert sentences(" ".join(expected)) == expected


def test_a_sentence_without_end_is_cut_into_what_an_encoder_reads():
    for text in ("word " * 2000, "村民" * 2000, "ชาวบ้าน" * 900):
        found = cut([Document("d", text)], "sentence")
        assert len(found) > 5 and all(len(words(p.text)) <= LONGEST_SENTENCE for p in found)


def test_a_joined_emoji_is_never_cut():
    family = "👨‍👩‍👧"
    for word in words(family * 30):
        assert word.strip().replace(family, "") == ""


TEXTS = {
    "dots": "." * 20_000,
    "dots apart": ". " * 20_000,
    "blanks": "a" + " " * 100_000 + "b",
    "newlines": "\n" * 100_000 + "x",
    "one word": "a" * 1_000_000,
    "no stop": "word and more " * 70_000,
    "no blank": "村民住在河边" * 50_000,
    "open quotes": "「あ" * 50_000,
    "closed quotes": "「あ。」" * 20_000,
    "marks": "a" + "́" * 100_000,
    "brackets": "! " + "(" * 100_000,
    "dandas": "।)" * 20_000,
    "ordinals": "am 3. Oktober " * 20_000,
    "initials": "J. " * 20_000,
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_time_is_linear_in_the_text(text):
    def seconds(n: int) -> float:
        began = time.process_time()
        cut([Document("d", text[:n])], None)
        sentence_spans(text[:n])
        return time.process_time() - began

    gc.disable()  # a collection takes as long as the other tests of this process have left objects
    try:
        half, whole = seconds(len(text) // 4), seconds(len(text))
    finally:
        gc.enable()
    # four times the text; sixteen times the time would be quadratic
    assert whole < max(0.5, 9 * half)
