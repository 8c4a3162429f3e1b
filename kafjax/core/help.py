"""The text of `--help`: the flags of an experiment under what they are about, one heading for each
configuration that it nests."""

from __future__ import annotations

import functools
import re
import textwrap
from collections.abc import Sequence

from kafjax.core.command_line import CONFIG, default_text, explained
from kafjax.core.config import Config, Leaf, leaves

WIDTH = 120
INDENT = "      "


def asked_for(arguments: Sequence[str]) -> bool:
    """True if a command line asks for help."""
    return not {"--help", "-help", "-?"}.isdisjoint(arguments)


def help_text(experiment: type[Config]) -> str:
    """Lists every flag with its default, the experiment's own first. Headings are the first
    sentences of the classes' docstrings."""
    default = experiment()
    groups: dict[tuple[str, ...], list[Leaf]] = {(): []}
    for leaf in leaves(default):
        groups.setdefault(leaf.path[:-1], []).append(leaf)
    parts = []
    for path, group in groups.items():
        heading = _heading(functools.reduce(getattr, path, default))
        lines = [line for leaf in group for line in _flag(leaf)]
        if path == ():
            lines += _lines("--config", CONFIG)
        parts.append("\n".join([f"{heading}:", *lines]))
    return "\n\n".join(parts) + "\n\n--helpfull lists the flags of absl, too.\n"


def _heading(config: Config) -> str:
    first = (type(config).__doc__ or type(config).__name__).strip().splitlines()[0]
    return re.split(r"\.(?= [A-Z`]|$)", first)[0]  # not behind "et al."


def _flag(leaf: Leaf) -> list[str]:
    if isinstance(leaf.default, bool):
        return _lines(
            f"--[no]{leaf.flag}", f"{explained(leaf)} Default: {'on' if leaf.default else 'off'}."
        )
    default = default_text(leaf)
    return _lines(
        f"--{leaf.flag}", f"{explained(leaf)} Default: {default}." if default else explained(leaf)
    )


def _lines(name: str, text: str) -> list[str]:
    return [
        f"  {name}",
        textwrap.fill(text, WIDTH, initial_indent=INDENT, subsequent_indent=INDENT),
    ]
