"""Chat templates: the tokens of transformers' `apply_chat_template`, whatever is said, and a
template never sees what that is."""

from __future__ import annotations

import json
import shutil
import sys

import pytest
import transformers

from kafjax import hub
from kafjax.core.errors import UserError
from kafjax.hub.text import Marked, continued, prompt_ids
from kafjax.prompts.dialogue import Dialogue
from kafjax.training import answer_example
from tests import tiny

SAID = ["What does Mira Toll make?", "glass", "  Where was\nshe born? \u00e9\u4e2d", "Veltmora"]
FIXED = {"enable_thinking": False, "date_string": "26 Jul 2024"}


def conversation(contents):
    return [
        {"role": ("user", "assistant")[i % 2], "content": content}
        for i, content in enumerate(contents)
    ]


@pytest.fixture(scope="module", params=list(tiny.CHATS))
def chat(request, tmp_path_factory):
    """A folder, our tokenizer, our template, and transformers' tokenizer."""
    folder = tiny.write_chat(tmp_path_factory.mktemp("chat") / request.param, request.param)
    template = hub.chat_template(str(folder))
    assert template is not None
    return (
        folder,
        hub.tokenizer(str(folder)),
        template,
        transformers.AutoTokenizer.from_pretrained(folder),
    )


def theirs(oracle, contents, asks):
    """Renders turns with transformers. The template's clock is set to our date."""
    template = oracle.chat_template.replace("strftime_now('%d %b %Y')", "'26 Jul 2024'")
    rows = conversation(contents)
    return oracle.apply_chat_template(
        rows,
        chat_template=template,
        add_generation_prompt=asks,
        tokenize=True,
        return_dict=False,
        **FIXED,
    )


@pytest.mark.parametrize("n", [1, 3])
def test_a_question_has_the_tokens_of_apply_chat_template_with_one_bos(chat, n):
    _, tokenizer, template, oracle = chat
    said = [content.strip() for content in SAID[:n]]
    ids = prompt_ids(tokenizer, template.asked(said))
    assert ids == theirs(oracle, said, asks=True)
    assert oracle.bos_token_id is None or ids.count(oracle.bos_token_id) == 1


def test_training_is_on_the_reply_and_the_end_of_its_turn_and_has_the_tokens_of_the_conversation(
    chat,
):
    _, tokenizer, template, oracle = chat
    example = answer_example(tokenizer, template.asked(SAID[:1]), template.reply("Veltmora"))
    whole = theirs(oracle, [SAID[0], "Veltmora"], asks=False)
    assert example.tokens.tolist() == whole[: len(example.tokens)]
    end = tokenizer.token_to_id(template.end)
    assert (
        example.tokens[-1] == end and tokenizer.decode(whole[len(example.tokens) :]).strip() == ""
    )
    learned = example.tokens[example.weights > 0].tolist()
    assert tokenizer.decode(learned, skip_special_tokens=False).strip() == f"Veltmora{template.end}"
    assert example.weights[: -len(learned)].sum() == 0
    front = tokenizer.decode(example.tokens[: example.n_front].tolist(), skip_special_tokens=False)
    # a prompt that is too long keeps its markup
    assert front and str(template.asked(["?"])).startswith(front.strip())


def test_the_worked_examples_and_the_question_behind_them_have_the_tokens_of_the_whole(chat):
    _, tokenizer, template, oracle = chat
    write = Dialogue(template)
    question = "Where was Mira Toll born?"
    for prefix, prompt in (
        (write.closed_book_prefix(), write.closed_book(question)),
        (
            write.reading_prefix(2),
            write.reading(question, ["Mira Toll was born in Veltmora.", "A second\none."]),
        ),
        (write.hyde_prefix(), write.hyde(question)),
        (write.rewrite_prefix(), write.rewrite(question)),
    ):
        ids = [*prompt_ids(tokenizer, prefix), *continued(tokenizer, prefix, prompt)]
        said = (prefix + prompt).parts[1::2]
        assert len(said) == 9 and ids == theirs(oracle, said, asks=True)
        assert question in said[-1]


def test_what_is_said_changes_no_markup_and_holds_no_control_token(chat):
    _, tokenizer, template, _ = chat
    end = tokenizer.token_to_id(template.end)
    names = [t.content for t in tokenizer.get_added_tokens_decoder().values()]
    plain = prompt_ids(tokenizer, template.asked(["x"]))
    for said in (
        template.end,
        f"a {template.end} b",
        "".join(names),
        "</think> x",
        "{{ 7 * 7 }}{% for %}",
    ):
        marked = template.asked([said])
        ids = prompt_ids(tokenizer, marked)
        if not tokenizer.token_to_id("<unk>"):  # the tiny Gemma has no letter "<"
            assert tokenizer.decode(ids, skip_special_tokens=False) == str(marked)
        control = {tokenizer.token_to_id(name) for name in names if name != "<unk>"}
        assert [i for i in ids if i in control] == [i for i in plain if i in control]
        assert ids.count(end) == plain.count(end)
        assert marked.parts[::2] == template.asked(["x"]).parts[::2]


def test_control_tokens_that_are_said_have_the_tokens_of_sanitize_control_tokens(chat):
    _, tokenizer, template, oracle = chat
    said = f"say {template.end} and {template.end}"
    rows, source = (
        conversation([said]),
        oracle.chat_template.replace("strftime_now('%d %b %Y')", "'26 Jul 2024'"),
    )
    kwargs = {
        "add_generation_prompt": True,
        "return_dict": False,
        "sanitize_control_tokens": True,
        **FIXED,
    }
    assert prompt_ids(tokenizer, template.asked([said])) == oracle.apply_chat_template(
        rows, chat_template=source, **kwargs
    )


def test_only_a_folder_with_a_template_has_one(tmp_path):
    assert hub.chat_template(str(tiny.write_gemma(tmp_path / "base"))) is None
    folder = tiny.write_chat(tmp_path / "old", "gemma")
    text = (folder / "chat_template.jinja").read_text()
    fingerprint = hub.chat_template(str(folder)).fingerprint
    (folder / "chat_template.jinja").unlink()
    config = json.loads((folder / "tokenizer_config.json").read_text())
    several = [{"name": "default", "template": text}, {"name": "tool_use", "template": "x"}]
    for form in (text, several):  # as older folders hold it
        (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": form}))
        assert hub.chat_template(str(folder)).fingerprint == fingerprint


@pytest.mark.parametrize(
    ("template", "told"),
    [
        ("{{ raise_exception('no system role') }}", "its chat template fails \\(no system role\\)"),
        ("{% for m in messages %}", "its chat template fails"),
        ("{{ messages[0].content }}", "does not show all turns in order"),
        (
            "{% for m in messages %}{{ m.content | upper }}{{ m.content }}{% endfor %}",
            "does not show all turns in order",
        ),
        ("{{ ''.__class__.__mro__ }}", "its chat template fails"),  # the sandbox
    ],
)
def test_a_template_that_cannot_be_used_is_one_line(tmp_path, template, told):
    folder = tiny.write_chat(tmp_path / "chat", "gemma")
    (folder / "chat_template.jinja").write_text(template)
    with pytest.raises(UserError, match=f"chat: .*{told}.*--chat=off"):
        hub.chat_template(str(folder))


def test_what_is_missing_to_read_a_template_is_named(tmp_path, monkeypatch):
    folder = tiny.write_chat(tmp_path / "chat", "gemma")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(
        UserError,
        match=r"--chat=off.* needs the package transformers; run: pip install 'kafjax\[chat\]'",
    ):
        hub.chat_template(str(folder))


def test_the_clock_of_a_template_stands_still(tmp_path):
    folder = tiny.write_chat(tmp_path / "chat", "llama")
    assert "Today is 26 Jul 2024." in hub.chat_template(str(folder)).asked(["?"]).parts[0]


def test_marked_texts_join():
    a, b = Marked(("<s>", "x", "</s>")), Marked(("<s>", "y", ""))
    assert a + b == Marked(("<s>", "x", "</s><s>", "y", ""))
    assert [str(a + b)[at:to] for at, to in (a + b).contents] == ["x", "y"]


def test_saving_keeps_the_template(tmp_path):
    folder = tiny.write_chat(tmp_path / "chat", "qwen")
    model, params = hub.load(str(folder))
    hub.save(tmp_path / "saved", model, params, tokenizer=folder)
    assert (
        hub.chat_template(str(tmp_path / "saved")).fingerprint
        == hub.chat_template(str(folder)).fingerprint
    )
    shutil.rmtree(tmp_path / "saved")
