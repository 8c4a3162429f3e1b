"""Text that is shown holds no control sequences of a terminal."""

from __future__ import annotations

import unicodedata

from hypothesis import given, settings
from hypothesis import strategies as st

from kafjax.core.text import visible


def test_escape_sequences_and_overrides_are_shown_as_escapes() -> None:
    assert visible("a\x1b[2Jb\u202ec\r\n\td\ud800") == "a\\x1b[2Jb\\u202ec\\r\n\td\\ud800"


def test_ordinary_text_of_any_script_stays() -> None:
    text = "Zoë, 東京, हिन्दी\u200c, 👩\u200d🔬"
    assert visible(text) == text


@settings(max_examples=200, derandomize=True)
@given(st.text(st.characters()))
def test_no_control_character_survives_and_the_result_encodes(text: str) -> None:
    shown = visible(text)
    shown.encode()
    assert not [c for c in shown if unicodedata.category(c) in ("Cc", "Cs") and c not in "\n\t"]
