"""Prompts on disk: what is read is what was written, whatever it holds."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kafjax.core.errors import UserError
from kafjax.evaluation.prompts import read_prompts, write_prompts

TEXTS = st.lists(st.text(st.sampled_from("ab\n\r \u2028"), max_size=12), max_size=3)


@settings(max_examples=40, deadline=None)
@given(st.dictionaries(st.text("ab", max_size=2), TEXTS, max_size=4))
def test_prompts_come_back_as_they_were(tmp_path_factory, prompts):
    path = tmp_path_factory.mktemp("prompts") / "prompts.json"
    write_prompts(path, prompts)
    assert read_prompts(path) == {id: tuple(texts) for id, texts in prompts.items()}


def test_what_prompts_share_is_written_once(tmp_path):
    examples = "\n".join(f"Question: {i}\nAnswer: {i}" for i in range(200))
    write_prompts(tmp_path / "p", {str(i): [f"{examples}\nQuestion: {i}x"] for i in range(100)})
    assert (tmp_path / "p").stat().st_size < 5 * 100 * 400 + 40 * 400
    assert (tmp_path / "p").read_text().count('Question: 7"') == 1


def test_runs_of_earlier_releases_have_none_and_damage_is_told(tmp_path):
    assert read_prompts(tmp_path / "none") == {}
    (tmp_path / "p").write_text(json.dumps({"lines": ["a"], "prompts": {"q": [[1]]}}))
    with pytest.raises(UserError, match="p: prompts: a line is missing; delete it"):
        read_prompts(tmp_path / "p", fix="delete it")
