"""Chat templates: how the turns of a conversation are written for an instruct model.

    template = open_chat("my/Qwen3-0.6B")                    None where the folder has no template
    template.asked(["What is it?", "glass", "Where?"])       <|im_start|>user\\nWhat is it?<|im_end|>\\n ... <|im_start|>assistant\\n
    template.reply("Veltmora")                               Veltmora<|im_end|>

transformers renders the template, in the sandbox of jinja2, with placeholders for what is said. So
a template says what stands around a turn and never sees what is in it: no question changes how it
is asked, and names of control tokens in one stay letters (`text.Marked`). A reasoning model is
asked without its thoughts (`enable_thinking`), since answers are short. A template that asks for
the date gets the one that Llama's has for want of a clock: a run must be the same tomorrow.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kafjax.core.errors import UserError
from kafjax.core.rundir import read_json
from kafjax.hub.auto_tokenizer import auto_tokenizer
from kafjax.hub.text import Marked

_DATE = "26 Jul 2024"
_CLOCK = "strftime_now"
_SETTINGS = {"enable_thinking": False, "date_string": _DATE}
# characters for private use, which no template writes
_PLACEHOLDER = re.compile("\ue000([0-9]+)\ue001")


class ChatTemplate:
    """The template of one folder.

    Attributes:
      fingerprint: of the template's text.
      end: name of the token that ends a reply.
    """

    def __init__(self, tokenizer: Any, source: str):
        """Takes a tokenizer of transformers. Raises `UserError` for a template that cannot be
        rendered, or does not show all turns."""
        self._tokenizer, self._source = tokenizer, source
        try:
            text = tokenizer.get_chat_template()
        except ValueError as error:
            raise UserError(
                f"{source}: it has no chat template by default ({str(error)[:100]}); ask without one: --chat=off"
            ) from error
        self.fingerprint = hashlib.sha256(text.encode()).hexdigest()[:12]
        # A name that a template sets itself goes before the global one.
        self._text = (
            f"{{% macro {_CLOCK}(format) %}}{_DATE}{{% endmacro %}}{text}"
            if _CLOCK in text
            else text
        )
        names = sorted(filter(str.strip, tokenizer.get_added_vocab()), key=len, reverse=True)
        # the second matches nothing
        self._tokens = re.compile("|".join(map(re.escape, names)) or "(?!)")
        self._rendered: dict[tuple[int, bool], tuple[str, ...]] = {}
        asks, told = self._markup(1, asks=True), self._markup(2, asks=False)
        # Some templates write a space before a reply that was given, and none where one is asked
        # for.
        self._lead = told[1][len(asks[1]) :] if told[1].startswith(asks[1]) else ""
        self.end, self._closing = self._end_of_turn(told[2])

    def asked(self, contents: Sequence[str]) -> Marked:
        """Writes turns of the user and the assistant by turns, the user first and last, up to where
        the next reply begins."""
        markup = self._markup(len(contents), asks=True)
        return Marked(
            tuple(part for pair in zip(markup, (*contents, ""), strict=True) for part in pair)[:-1]
        )

    def reply(self, content: str) -> Marked:
        """Writes what the assistant says behind `asked`, with the end of its turn."""
        return Marked((self._lead, content, self._closing))

    def seam(self, markup: str) -> int:
        """Returns where the last control token in a piece of markup ends; 0 if there is none."""
        return max((found.end() for found in self._tokens.finditer(markup)), default=0)

    def _end_of_turn(self, closing: str) -> tuple[str, str]:
        """Finds the first control token in what is written behind a reply; returns its name, and
        the text up to it."""
        if found := self._tokens.search(closing):
            return found[0], closing[: found.end()]
        if not (eos := self._tokenizer.eos_token):
            raise UserError(
                f"{self._source}: its chat template ends a reply with no token; ask without it: --chat=off"
            )
        return eos, eos

    def _markup(self, n: int, *, asks: bool) -> tuple[str, ...]:
        """Renders `n` turns; returns the n + 1 texts around their contents."""
        if (n, asks) not in self._rendered:
            turns = [
                {"role": ("user", "assistant")[i % 2], "content": f"\ue000{i}\ue001"}
                for i in range(n)
            ]
            try:
                text = self._tokenizer.apply_chat_template(
                    turns,
                    chat_template=self._text,
                    tokenize=False,
                    add_generation_prompt=asks,
                    **_SETTINGS,
                )
            except ImportError as error:
                raise UserError(f"{self._source}: {error} (pip install 'kafjax[chat]')") from error
            except Exception as error:  # a template is a program
                raise UserError(
                    f"{self._source}: its chat template fails ({str(error)[:200]}); ask without it: --chat=off"
                ) from error
            pieces = _PLACEHOLDER.split(text)
            if pieces[1::2] != [str(i) for i in range(n)]:
                raise UserError(
                    f"{self._source}: its chat template does not show all turns in order; ask without it: --chat=off"
                )
            self._rendered[n, asks] = tuple(pieces[::2])
        return self._rendered[n, asks]


def has_template(folder: Path) -> bool:
    """True where the tokenizer's files hold a chat template."""
    if (folder / "chat_template.jinja").is_file():
        return True
    file = folder / "tokenizer_config.json"
    config = read_json(file) if file.is_file() else {}
    return isinstance(config, dict) and bool(config.get("chat_template"))


def open_template(folder: Path) -> ChatTemplate | None:
    """Opens the chat template of a folder, if it has one. Raises `UserError` as `ChatTemplate` and
    `auto_tokenizer` do."""
    if not has_template(folder):
        return None
    return ChatTemplate(
        auto_tokenizer(folder, "its chat template (--chat=off asks without it)"), str(folder)
    )
