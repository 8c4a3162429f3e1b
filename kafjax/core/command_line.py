"""The command line of a configuration: its flags, and the commands that give its values.

    define(Finetune)                  # --epochs and --name, with help, default and bounds
    config = from_flags(Finetune)     # Finetune(train=Train(epochs=8), name=None)
    command_of("experiments.finetune", Finetune, {"epochs": 3})

A tuple is written `--layers=0,1` and a mapping from a pattern to a number `--rank_pattern=REGEX:8`,
which may be repeated. `--config=FILE` reads a record.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from typing import Any, TypeVar

from absl import flags

from kafjax.core.config import Config, Leaf, changed, leaves
from kafjax.core.errors import UserError
from kafjax.core.field_types import (
    element_type,
    is_collection,
    is_mapping,
    json_of,
    text_of,
    texts_of,
    value_type,
)

CONFIG = "config.json of an earlier run to repeat; flags given beside it win."

C = TypeVar("C", bound=Config)


def define(experiment: type[Config], values: flags.FlagValues = flags.FLAGS) -> None:
    """Defines the flags of an experiment, and `--config`, which reads a record."""
    # as if the program had: --help shows those
    module: dict[str, Any] = {"flag_values": values, "module_name": sys.argv[0]}
    for leaf in leaves(experiment()):
        text = explained(leaf)
        kind = value_type(leaf.hint)
        if kind is bool:
            flags.DEFINE_boolean(leaf.flag, leaf.default, text, **module)
        elif kind is int:
            flags.DEFINE_integer(leaf.flag, leaf.default, text, **module)
        elif kind is float:
            flags.DEFINE_float(leaf.flag, leaf.default, text, **module)
        elif kind is str:
            flags.DEFINE_string(leaf.flag, leaf.default, text, **module)
        elif is_mapping(leaf.hint) or leaf.about.repeat:
            flags.DEFINE_multi_string(leaf.flag, texts_of(leaf.default), text, **module)
        else:
            flags.DEFINE_list(
                leaf.flag, None if leaf.default is None else texts_of(leaf.default), text, **module
            )
    flags.DEFINE_string("config", None, CONFIG, **module)


def from_flags(
    experiment: type[C],
    fallback: Mapping[str, Any] | None = None,
    values: flags.FlagValues = flags.FLAGS,
) -> C:
    """Builds the configuration that the command line asks for.

    Args:
      fallback: values by flag, used where no flag was given: a profile, or the record of a run.

    Raises:
      UserError: a value that cannot be read or is refused by its field.
    """
    found = {}
    for leaf in leaves(experiment()):
        given = values[leaf.flag]
        if given.present:
            found[leaf.flag] = read_flag(leaf, given.value)
        elif fallback and leaf.flag in fallback:
            found[leaf.flag] = fallback[leaf.flag]
    return changed(experiment(), **found)


def given(experiment: type[Config], values: flags.FlagValues = flags.FLAGS) -> dict[str, Any]:
    """Returns the values of the flags that the command line sets, by flag."""
    return {
        leaf.flag: read_flag(leaf, values[leaf.flag].value)
        for leaf in leaves(experiment())
        if values[leaf.flag].present
    }


def command_of(module: str, experiment: type[Config], values: Mapping[str, Any]) -> str:
    """Writes the command line that runs `module` with `values` by flag. Defaults and flags that it
    lacks are left out."""
    return shlex.join(["python", "-m", module, *arguments_of(experiment, values)])


def arguments_of(experiment: type[Config], values: Mapping[str, Any]) -> list[str]:
    """Lists the command line's arguments for `values` by flag, as a process takes them: nothing is
    quoted, no shell reads them."""
    words = []
    for leaf in leaves(experiment()):
        value = values.get(leaf.flag)
        if value is None or json_of(value) == json_of(leaf.default):
            continue
        if isinstance(value, bool):
            words.append(f"--{leaf.flag}" if value else f"--no{leaf.flag}")
        elif is_mapping(leaf.hint) or leaf.about.repeat:
            words += [f"--{leaf.flag}={text}" for text in texts_of(value)]
        else:
            words.append(
                f"--{leaf.flag}={','.join(texts_of(value)) if is_collection(leaf.hint) else text_of(value)}"
            )
    return words


def explained(leaf: Leaf) -> str:
    """Returns the help of a flag, with its choices and bounds."""
    about = leaf.about
    bounds = [
        f"{word} {bound:g}"
        for word, bound in (
            ("at least", about.least),
            ("above", about.above),
            ("at most", about.most),
            ("below", about.below),
        )
        if bound is not None
    ]
    choices = [f"one of {', '.join(map(str, about.choices))}"] if about.choices else []
    ends = ", ".join([*choices, *bounds])
    return f"{about.help.rstrip('.')} ({ends})." if ends else about.help


def default_text(leaf: Leaf) -> str:
    """Returns the default of a flag as the command line would say it, "" for none."""
    if leaf.default is None:
        return ""
    return ",".join(texts_of(leaf.default)) if is_collection(leaf.hint) else text_of(leaf.default)


def read_flag(leaf: Leaf, value: Any) -> Any:
    """Returns the value of a field from what absl read for its flag. Raises `UserError` for a text
    that is no number where one is wanted."""
    if value is None:
        return None
    if is_mapping(leaf.hint):
        pairs = [text.rpartition(":") for text in value]
        return {
            pattern: _number(leaf, text, f"REGEX:NUMBER, such as --{leaf.flag}='q_proj:8'")
            for pattern, _, text in pairs
        }
    if leaf.about.repeat:
        return tuple(value)
    if isinstance(value, list):
        texts = [text.strip() for text in value if text.strip()]
        return (
            tuple(texts)
            if element_type(leaf.hint) is str
            else tuple(_number(leaf, text, "numbers, such as 0,1,2") for text in texts)
        )
    return leaf.about.aliases.get(value, value) if isinstance(value, str) else value


def _number(leaf: Leaf, text: str, wanted: str) -> Any:
    try:
        return element_type(leaf.hint)(text)
    except ValueError:
        raise UserError(f"--{leaf.flag}: '{text[:60]}' is no number; write {wanted}") from None
