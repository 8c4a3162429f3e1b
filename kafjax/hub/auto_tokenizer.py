"""Tokenizers opened by transformers, for folders without `tokenizer.json` and for chat templates.
Only this module imports it."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from kafjax.core.errors import UserError

VOCABULARIES = (
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "tekken.json",
    "tiktoken.model",
    "spiece.model",
)
"""Files that transformers makes a tokenizer of, where there is no tokenizer.json."""


def auto_tokenizer(folder: Path, what: str = "its tokenizer") -> Any:
    """Returns the folder's tokenizer as `transformers.AutoTokenizer` makes it. No code of the
    folder is run, nothing is fetched.

    Args:
      what: what it is wanted for, in messages.

    Raises:
      UserError: transformers, or what it needs for this folder, is not installed, or it cannot read
        the folder.
    """
    needed = (
        ["transformers"]
        if (folder / "tokenizer.json").is_file()
        else ["transformers", "sentencepiece", "google.protobuf"]
    )
    for package in needed:
        if not _installed(package):
            raise UserError(
                f"{folder}: reading {what} needs the package {package}; run: pip install 'kafjax[chat]'"
            )
    # takes a second, and torch with it where that is installed
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # files of a folder can be wrong in any way
        raise UserError(
            f"{folder}: transformers cannot read its tokenizer ({_first_line(error)})"
        ) from error


def _installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except (ModuleNotFoundError, ValueError):  # of the package around it; of one that is blocked
        return False


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
