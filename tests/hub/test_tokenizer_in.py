"""Tokenizers of folders: without a tokenizer.json as transformers makes them, and never beside a
configuration that contradicts them."""

from __future__ import annotations

import io
import json
import shutil
import sys

import pytest
import transformers

from kafjax import hub
from kafjax.core.errors import UserError
from kafjax.hub.text import content, front
from tests import tiny

TEXTS = [
    "Where was Mira Toll born?",
    "  two  spaces\nand a line",
    "\u00e9t\u00e9 \u4e2d\u6587 \U0001f600",
    "</s> <s> x",
]


@pytest.fixture
def qwen(tmp_path):
    return tiny.write_qwen(tmp_path / "qwen")


def edit(path, **changes):
    path.write_text(
        json.dumps({**(json.loads(path.read_text()) if path.exists() else {}), **changes})
    )


def of_sentencepiece(folder, kind):
    """A folder whose tokenizer is a tokenizer.model and nothing else."""
    sentencepiece = pytest.importorskip("sentencepiece")
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(
            [row["contents"] for row in tiny.documents()] + ["Where was she born? In Brezna."]
        ),
        model_writer=written,
        **{
            "vocab_size": 350,
            "model_type": "bpe",
            "byte_fallback": True,
            "minloglevel": 2,
            "unk_id": 0,
            "bos_id": 1,
            "eos_id": 2,
        },
    )
    write = {"llama": tiny.write_llama, "gemma": tiny.write_gemma}[kind]
    write(folder, bos_token_id=1, eos_token_id=2, vocab_size=360)
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(written.getvalue())
    return folder


@pytest.mark.parametrize("kind", ["llama", "gemma"])
def test_a_folder_of_sentencepiece_is_read_as_transformers_does(tmp_path, kind):
    folder = of_sentencepiece(tmp_path / kind, kind)
    tokenizer, oracle = (
        hub.tokenizer(str(folder)),
        transformers.AutoTokenizer.from_pretrained(folder),
    )
    for text in TEXTS[:3]:
        assert content(tokenizer, text) == oracle(text, add_special_tokens=False).input_ids
    assert front(tokenizer) == front(oracle.backend_tokenizer)
    assert tokenizer.encode("Where was she born?").ids == oracle("Where was she born?").input_ids
    model, params = hub.load(str(folder))
    hub.save(tmp_path / "saved", model, params, tokenizer=folder)
    assert (tmp_path / "saved" / "tokenizer.model").read_bytes() == (
        folder / "tokenizer.model"
    ).read_bytes()


def test_what_is_missing_to_read_it_is_named(tmp_path, qwen, monkeypatch):
    (qwen / "tokenizer.json").rename(qwen / "nothing")
    with pytest.raises(UserError, match="no tokenizer\\.json in it"):
        hub.tokenizer(str(qwen))
    (qwen / "tokenizer.model").write_bytes(b"no sentencepiece")
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(
        UserError, match="needs the package sentencepiece; run: pip install 'kafjax\\[chat\\]'"
    ):
        hub.tokenizer(str(qwen))


def test_a_damaged_model_of_sentencepiece_is_one_line(tmp_path):
    folder = of_sentencepiece(tmp_path / "llama", "llama")
    (folder / "tokenizer.model").write_bytes(b"\x00\x01 no protobuf")
    with pytest.raises(UserError, match="transformers cannot read its tokenizer"):
        hub.tokenizer(str(folder))


@pytest.mark.parametrize("named", [2, None])
def test_a_bos_that_is_put_as_the_configuration_says_is_right(tmp_path, named):
    folder = tiny.write_llama(tmp_path / "llama", bos_token_id=named)
    assert front(hub.tokenizer(str(folder))) == [2]


def test_a_bos_that_is_named_and_never_put_is_right(qwen):
    edit(qwen / "config.json", bos_token_id=2)
    assert front(hub.tokenizer(str(qwen))) == []


def test_another_bos_than_the_one_that_is_put_is_refused(tmp_path):
    folder = tiny.write_llama(tmp_path / "llama", bos_token_id=5)
    with pytest.raises(
        UserError,
        match=r"puts '<.begin_of_text.>' \(token 2\) before a text, its config.json says bos_token_id=5",
    ):
        hub.tokenizer(str(folder))
    edit(folder / "generation_config.json", bos_token_id=2)  # as DeepSeek's distilled Qwens have it
    assert front(hub.tokenizer(str(folder))) == [2]


def test_tokens_that_only_the_configuration_declares_are_added_as_transformers_adds_them(qwen):
    size = hub.tokenizer(str(qwen)).get_vocab_size()
    declared = {
        str(size + i): {"content": name, "special": i == 0}
        for i, name in enumerate(["<|x|>", "<y>"])
    }
    edit(
        qwen / "tokenizer_config.json",
        tokenizer_class="PreTrainedTokenizerFast",
        added_tokens_decoder=declared,
    )
    ours, oracle = hub.tokenizer(str(qwen)), transformers.AutoTokenizer.from_pretrained(qwen)
    text = "a <|x|> and <y> b"
    assert (
        ours.encode(text, add_special_tokens=False).ids
        == oracle(text, add_special_tokens=False).input_ids
    )
    assert size not in content(ours, text)


@pytest.mark.parametrize("id", [0, 10, 5000])
def test_a_token_of_another_number_is_refused(qwen, id):
    edit(
        qwen / "tokenizer_config.json",
        added_tokens_decoder={str(id): {"content": "<|x|>", "special": True}},
    )
    with pytest.raises(UserError, match=f"token {id} is '<.x.>' in tokenizer_config.json"):
        hub.tokenizer(str(qwen))


def test_folders_as_they_are_published_go_through(qwen):
    names = {i: t.content for i, t in hub.tokenizer(str(qwen)).get_added_tokens_decoder().items()}
    declared = {
        str(i): {"content": name, "lstrip": False, "special": True} for i, name in names.items()
    }
    edit(qwen / "tokenizer_config.json", added_tokens_decoder=declared, chat_template=None)
    assert (
        hub.tokenizer(str(qwen)).get_vocab_size()
        == hub.tokenizer(str(shutil.copytree(qwen, f"{qwen}2"))).get_vocab_size()
    )
