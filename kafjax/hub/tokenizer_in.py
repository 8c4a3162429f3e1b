"""Tokenizers out of a model's folder: `tokenizer.json`, or what transformers makes of other files;
checked against its neighbours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from kafjax.core.errors import UserError
from kafjax.core.rundir import read_json
from kafjax.hub.auto_tokenizer import VOCABULARIES, auto_tokenizer
from kafjax.hub.text import front

_HOW = ("lstrip", "rstrip", "normalized", "single_word", "special")


def read_tokenizer(folder: Path) -> Tokenizer:
    """Reads the tokenizer of a folder, without padding and truncation.

    Raises:
      UserError: there is none, it is damaged or none that the library computes, or the folder
        contradicts it: `tokenizer_config.json` gives a token's number another name, or the
        configuration names another BOS than the one it puts before a text.
    """
    file = folder / "tokenizer.json"
    if file.is_file():
        tokenizer = _from_file(file)
        _add_declared(tokenizer, folder)
    elif any((folder / name).is_file() for name in VOCABULARIES):
        tokenizer = getattr(auto_tokenizer(folder), "backend_tokenizer", None)
        if not isinstance(tokenizer, Tokenizer):
            raise UserError(
                f"{folder}: its tokenizer is none that the library tokenizers computes; save it as tokenizer.json"
            )
    else:
        raise UserError(f"{folder}: no tokenizer.json in it")
    tokenizer.no_padding()
    tokenizer.no_truncation()
    _check_bos(tokenizer, folder)
    return tokenizer


def _from_file(path: Path) -> Tokenizer:
    try:
        return Tokenizer.from_file(str(path))
    # the library raises nothing narrower, and where it panics not even an Exception
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        raise UserError(f"{path}: damaged tokenizer.json ({str(error)[:200]})") from error


def _add_declared(tokenizer: Tokenizer, folder: Path) -> None:
    """Adds the tokens that only `tokenizer_config.json` names, as transformers does."""
    declared = _object(folder / "tokenizer_config.json").get("added_tokens_decoder")
    if not isinstance(declared, dict):
        return
    tokens = {
        int(id): token
        for id, token in declared.items()
        if id.isdecimal() and isinstance(token, dict) and token.get("content")
    }
    for id, token in sorted(tokens.items()):
        name = token["content"]
        if tokenizer.id_to_token(id) is None:
            add = tokenizer.add_special_tokens if token.get("special") else tokenizer.add_tokens
            add([AddedToken(name, **{key: bool(token[key]) for key in _HOW if key in token})])
        if tokenizer.token_to_id(name) != id:
            there = tokenizer.id_to_token(id)
            raise UserError(
                f"{folder}: token {id} is '{name}' in tokenizer_config.json and {there!r} in tokenizer.json; mend one of them"
            )


def _check_bos(tokenizer: Tokenizer, folder: Path) -> None:
    """Compares the token before a text with the BOS of the configurations. A BOS that is named but
    never put is accepted (Qwen)."""
    config = _object(folder / "config.json")
    text = config.get("text_config")
    parts = (
        config,
        text if isinstance(text, dict) else {},
        _object(folder / "generation_config.json"),
    )
    said = [part["bos_token_id"] for part in parts if part.get("bos_token_id") is not None]
    put = front(tokenizer)
    if config.get("model_type") != "bert" and put and said and not set(put) & set(said):
        bos = f"'{tokenizer.id_to_token(put[-1])}' (token {put[-1]})"
        raise UserError(
            f"{folder}: its tokenizer puts {bos} before a text, its config.json says bos_token_id={said[0]}; mend one of them"
        )


def _object(path: Path) -> dict[str, Any]:
    """A file's JSON object; empty where there is no such file, or something else in it."""
    found = read_json(path) if path.is_file() else {}
    return found if isinstance(found, dict) else {}
