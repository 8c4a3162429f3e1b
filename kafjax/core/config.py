"""A frozen dataclass is an experiment's flags, its record on disk, and its identity.

    @dataclasses.dataclass(frozen=True)
    class Train(Config):
        epochs: int = option(8, "Passes over the corpus.", least=1)

    @dataclasses.dataclass(frozen=True)
    class Finetune(Config):
        train: Train = nested(Train())
        name: str | None = option(None, "Name of the run's folder.", record=False)

    define(Finetune)                  # --epochs and --name, with help, default and bounds
    config = from_flags(Finetune)     # Finetune(train=Train(epochs=8), name=None)
    record(config)                    # {"epochs": 8}, which `--config=FILE` reads again
    identity(config)                  # what tells two runs apart

Dataclasses nest and flags are flat, so a flag's name is unique within an experiment. A field is a
bool, int, float, str, a tuple of those (`--layers=0,1`) or a mapping from a pattern to a number
(`--rank_pattern=REGEX:8`, may be repeated); or None beside one of them.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import numbers
import shlex
import sys
import types
import typing
from collections.abc import Collection, Iterator, Mapping
from typing import Any, TypeVar

from absl import flags

from kafjax.core import paths
from kafjax.core.errors import UserError, check_text, nearest
from kafjax.core.text import shortened

MOST_WHOLE = 2**31 - 1
"""Highest whole number of a field that sets no lower limit itself: arrays are counted in 32
bits."""

CONFIG = "config.json of an earlier run to repeat; flags given beside it win."

_OPTION, _NESTED = "option", "nested"
C = TypeVar("C", bound="Config")


@dataclasses.dataclass(frozen=True)
class Option:
    """Properties of a field beside its type and default; see `option`."""

    help: str
    flag: str | None = None
    choices: tuple[Any, ...] = ()
    aliases: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    least: float | None = None
    above: float | None = None
    most: float | None = None
    below: float | None = None
    identity: bool = True
    record: bool = True
    added: bool = False
    repeat: bool = False
    path: bool = False
    bucket: bool = False


def option(default: Any, help: str, **about: Any) -> Any:
    """Declares a field that is a flag.

    Args:
      default: the only place where it stands.
      flag: name of the flag, if it is not the field's.
      choices: values that are allowed.
      aliases: other spellings, by what they mean.
      least, above, most, below: bounds of a number, or of each in a tuple or mapping.
      identity: whether runs that differ in it are different runs. False for meshes, numbers of
        processes and the like.
      record: whether it is written to config.json. False, which implies `identity=False`, for
        folders and names.
      added: the field was added to an experiment that has been released. It is left out of the
        identity at its default, which keeps the behaviour of before and must not change afterwards.
      repeat: a tuple of strings that hold commas, given by repeating the flag.
      path: a file or folder of this machine. `gs://bucket/x` would become a folder named `gs:`, and
        is refused.
      bucket: a path that may also be an address of a bucket, opened by `paths.as_path`.
    """
    metadata = {_OPTION: Option(help, **about)}
    if isinstance(default, Mapping):
        return dataclasses.field(
            default_factory=lambda: dict(default), hash=False, metadata=metadata
        )
    return dataclasses.field(default=default, metadata=metadata)


def nested(default: Config, without: Collection[str] = ()) -> Any:
    """Declares a field that is itself a configuration. The fields in `without`, or all of those
    nested there, become no flags: the experiment sets them, or has no use for them. In records
    they are passed over.

    `default` may differ from the class's own defaults.
    """
    return dataclasses.field(default=default, metadata={_NESTED: frozenset(without)})


@dataclasses.dataclass(frozen=True)
class Config:
    """Base of all configurations: checks every value when it is made.

    Raises:
      UserError: naming the field, for a value of another type, not finite, out of bounds or none of
        the choices.
    """

    def __post_init__(self) -> None:
        hints = _hints(type(self))
        for field in dataclasses.fields(self):
            if _OPTION in field.metadata:
                about = field.metadata[_OPTION]
                _check(field.name, getattr(self, field.name), hints[field.name], about)


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One flag of an experiment: the path of its field, its type, its default there, and its
    `Option`."""

    path: tuple[str, ...]
    flag: str
    hint: Any
    default: Any
    about: Option

    def of(self, config: Config) -> Any:
        return functools.reduce(getattr, self.path, config)


def leaves(default: Config) -> list[Leaf]:
    """Lists the flags of an experiment in order of declaration. Their defaults are the values of
    the instance `default`.

    Raises:
      TypeError: two fields ask for one flag.
    """
    found = [leaf for leaf, used in _leaves(default, (), used=True) if used]
    names = [leaf.flag for leaf in found]
    if twice := {name for name in names if names.count(name) > 1}:
        raise TypeError(
            f"{type(default).__name__}: more than one field is the flag {', '.join(sorted(twice))}"
        )
    return found


def unused(default: Config) -> set[str]:
    """Names the fields that an experiment nests without making them flags. Records of earlier
    releases and of other experiments may hold them."""
    of_leaves = list(_leaves(default, (), used=True))
    return {leaf.flag for leaf, _ in of_leaves} - {leaf.flag for leaf, used in of_leaves if used}


def _leaves(default: Config, path: tuple[str, ...], used: bool) -> Iterator[tuple[Leaf, bool]]:
    """Yields every field with whether it is a flag."""
    hints = _hints(type(default))
    for field in dataclasses.fields(default):
        value, here = getattr(default, field.name), (*path, field.name)
        if _NESTED in field.metadata:
            without = field.metadata[_NESTED]
            for leaf, kept in _leaves(value, here, used):
                yield leaf, kept and without.isdisjoint(leaf.path[len(here) :])
        elif _OPTION in field.metadata:
            about = field.metadata[_OPTION]
            yield Leaf(here, about.flag or field.name, hints[field.name], value, about), used


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def define(experiment: type[Config], values: flags.FlagValues = flags.FLAGS) -> None:
    """Defines the flags of an experiment, and `--config`, which reads a record."""
    # as if the program had: --help shows those
    module: dict[str, Any] = {"flag_values": values, "module_name": sys.argv[0]}
    for leaf in leaves(experiment()):
        text = explained(leaf)
        kind = _kind(leaf.hint)
        if kind is bool:
            flags.DEFINE_boolean(leaf.flag, leaf.default, text, **module)
        elif kind is int:
            flags.DEFINE_integer(leaf.flag, leaf.default, text, **module)
        elif kind is float:
            flags.DEFINE_float(leaf.flag, leaf.default, text, **module)
        elif kind is str:
            flags.DEFINE_string(leaf.flag, leaf.default, text, **module)
        elif _is_mapping(leaf.hint) or leaf.about.repeat:
            flags.DEFINE_multi_string(leaf.flag, _as_texts(leaf.default), text, **module)
        else:
            flags.DEFINE_list(
                leaf.flag, None if leaf.default is None else _as_texts(leaf.default), text, **module
            )
    flags.DEFINE_string("config", None, CONFIG, **module)


def from_flags(
    experiment: type[C],
    base: Mapping[str, Any] | None = None,
    values: flags.FlagValues = flags.FLAGS,
) -> C:
    """Builds the configuration that the command line asks for.

    Args:
      base: values by flag, used where no flag was given: a profile, or the record of a run.

    Raises:
      UserError: a value that cannot be read or is refused by its field.
    """
    found = {}
    for leaf in leaves(experiment()):
        given = values[leaf.flag]
        if given.present:
            found[leaf.flag] = _read_flag(leaf, given.value)
        elif base and leaf.flag in base:
            found[leaf.flag] = base[leaf.flag]
    return changed(experiment(), **found)


def given(experiment: type[Config], values: flags.FlagValues = flags.FLAGS) -> dict[str, Any]:
    """Returns the values of the flags that the command line sets, by flag."""
    return {
        leaf.flag: _read_flag(leaf, values[leaf.flag].value)
        for leaf in leaves(experiment())
        if values[leaf.flag].present
    }


def changed(config: C, **values: Any) -> C:
    """Returns the configuration with other values, by flag: `changed(compare, rank=4, k=2)`.

    Raises:
      UserError: an unknown flag (with the nearest one), or a value that its field refuses.
    """
    by_path = {leaf.path: leaf.flag for leaf in leaves(config)}
    for name in values:
        if name not in by_path.values():
            raise UserError(
                f"'{name}' is no setting of {type(config).__name__}. {nearest(name, by_path.values())}"
            )

    def made(default: Any, path: tuple[str, ...]) -> Any:
        changes = {}
        for field in dataclasses.fields(default):
            here = (*path, field.name)
            if _NESTED in field.metadata:
                changes[field.name] = made(getattr(default, field.name), here)
            elif by_path.get(here) in values:
                changes[field.name] = values[by_path[here]]
        return dataclasses.replace(default, **changes)

    return made(config, ())


def record(config: Config) -> dict[str, Any]:
    """Returns the contents of config.json: JSON values by flag."""
    return {
        leaf.flag: _as_json(leaf.of(config)) for leaf in leaves(type(config)()) if leaf.about.record
    }


def read_record(
    experiment: type[Config],
    stored: Mapping[str, Any],
    source: object,
    ignore: Collection[str] = (),
) -> dict[str, Any]:
    """Reads a record into values by flag, for `from_flags` and `changed`. A field that it lacks is
    left at its default, and one that the experiment has no use for is passed over.

    Args:
      source: where it came from, for messages.
      ignore: keys that are no fields.

    Raises:
      UserError: naming source and key, for an unknown key or a value of another type.
    """
    known = {leaf.flag: leaf for leaf in leaves(experiment())}
    passed_over = {*ignore, *unused(experiment())}
    found = {}
    for key, value in stored.items():
        if key in passed_over:
            continue
        if key not in known:
            raise UserError(
                f"{source}: '{key}' is no setting of this experiment. {nearest(key, known)}"
            )
        found[key] = _from_json(known[key], value, source)
    return found


def identity(config: Config) -> dict[str, Any]:
    """Returns the fields that tell two runs apart: the record without folders, meshes and other
    fields of `identity=False`."""
    kept = (leaf for leaf in leaves(type(config)()) if leaf.about.record and leaf.about.identity)
    return {
        leaf.flag: _as_json(leaf.of(config))
        for leaf in kept
        if not (leaf.about.added and leaf.of(config) == leaf.default)
    }


def config_hash(values: Mapping[str, Any]) -> str:
    """Returns the first 12 hex digits of the sha256 of canonical JSON."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]


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
        if value is None or _as_json(value) == _as_json(leaf.default):
            continue
        if isinstance(value, bool):
            words.append(f"--{leaf.flag}" if value else f"--no{leaf.flag}")
        elif _is_mapping(leaf.hint) or leaf.about.repeat:
            words += [f"--{leaf.flag}={text}" for text in _as_texts(value)]
        else:
            words.append(
                f"--{leaf.flag}={','.join(_as_texts(value)) if _is_collection(leaf.hint) else _text(value)}"
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
    return ",".join(_as_texts(leaf.default)) if _is_collection(leaf.hint) else _text(leaf.default)


def _kind(hint: Any) -> Any:
    """Returns the type of a value, None aside."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return next(part for part in typing.get_args(hint) if part is not types.NoneType)
    return hint


def _optional(hint: Any) -> bool:
    return types.NoneType in typing.get_args(hint)


def _is_mapping(hint: Any) -> bool:
    return typing.get_origin(_kind(hint)) in (Mapping, dict)


def _is_collection(hint: Any) -> bool:
    return typing.get_origin(_kind(hint)) is not None


def _element(hint: Any) -> Any:
    """Returns the type of a tuple's elements, or of a mapping's values; None for a single value."""
    arguments = typing.get_args(_kind(hint))
    return (arguments[1] if _is_mapping(hint) else arguments[0]) if arguments else None


def _read_flag(leaf: Leaf, value: Any) -> Any:
    if value is None:
        return None
    if _is_mapping(leaf.hint):
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
            if _element(leaf.hint) is str
            else tuple(_number(leaf, text, "numbers, such as 0,1,2") for text in texts)
        )
    return leaf.about.aliases.get(value, value) if isinstance(value, str) else value


def _number(leaf: Leaf, text: str, wanted: str) -> Any:
    try:
        return _element(leaf.hint)(text)
    except ValueError:
        raise UserError(f"--{leaf.flag}: '{text[:60]}' is no number; write {wanted}") from None


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)


def _as_texts(value: Any) -> list[str]:
    return (
        [f"{key}:{_text(one)}" for key, one in value.items()]
        if isinstance(value, Mapping)
        else list(map(_text, value))
    )


def _as_json(value: Any) -> Any:
    if isinstance(value, tuple):
        return list(value)
    return dict(value) if isinstance(value, Mapping) else value


def _from_json(leaf: Leaf, value: Any, source: object) -> Any:
    if isinstance(value, str):
        value = leaf.about.aliases.get(value, value)
    # of texts: as records were written when they held what the command line said
    if isinstance(value, list):
        texts = _element(leaf.hint) is not str and all(isinstance(one, str) for one in value)
        value = _read_flag(leaf, value) if texts and _is_collection(leaf.hint) else tuple(value)
    if not _has_type(value, leaf.hint):
        raise UserError(f"{source}: {leaf.flag}={str(value)[:60]!r} is not {_name(leaf.hint)}")
    return value


def _has_type(value: Any, hint: Any) -> bool:
    kind = _kind(hint)
    if value is None:
        return _optional(hint)
    if kind in (bool, str):
        return isinstance(value, kind)
    if kind is int:
        return isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if kind is float:
        return isinstance(value, numbers.Real) and not isinstance(value, bool)
    if _is_mapping(hint):
        return isinstance(value, Mapping) and all(
            isinstance(k, str) and _has_type(v, _element(hint)) for k, v in value.items()
        )
    return isinstance(value, tuple) and all(_has_type(one, _element(hint)) for one in value)


def _name(hint: Any) -> str:
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    kind = _kind(hint)
    if kind in names:
        return names[kind]
    return f"{'a mapping to' if _is_mapping(hint) else 'a list of'} {names[_element(hint)].removeprefix('a ')}"


def _check(name: str, value: Any, hint: Any, about: Option) -> None:
    if not _has_type(value, hint):
        raise UserError(f"{name}={str(value)[:60]!r}: must be {_name(hint)}")
    if value is None:
        return
    flag = f" (--{about.flag})" if about.flag else ""
    each = (
        value.values()
        if isinstance(value, Mapping)
        else value
        if isinstance(value, tuple)
        else (value,)
    )
    for one in each:
        if about.choices and one not in about.choices:
            raise UserError(
                f"unknown {name} '{str(one)[:60]}'. {nearest(str(one), map(str, about.choices))}"
            )
        if about.path and not about.bucket and paths.is_address(one):
            instead = "copy it to a folder of this machine, or mount the bucket, and give that"
            raise UserError(
                f"{name}='{one[:60]}': buckets cannot be read or written here; {instead}"
            )
        if isinstance(one, str) and not about.path:
            check_text(one, name)
        if isinstance(one, str) and "\0" in one:
            raise UserError(f"{name}: holds a zero byte")
        if isinstance(one, bool) or not isinstance(one, numbers.Real):
            continue
        if isinstance(one, float) and not math.isfinite(one):
            raise UserError(f"{name}={one}{flag}: must be a finite number")
        if about.least is not None and one < about.least:
            raise UserError(f"{name}={one}{flag}: must be {about.least:g} or more")
        if about.above is not None and one <= about.above:
            raise UserError(f"{name}={one}{flag}: must be above {about.above:g}")
        most = (
            about.most
            if about.most is not None
            else MOST_WHOLE
            if isinstance(one, numbers.Integral)
            else None
        )
        if most is not None and one > most:
            raise UserError(
                f"{name}={shortened(one, spelled=str)}{flag}: must be {_text(most)} or less"
            )
        if about.below is not None and one >= about.below:
            raise UserError(f"{name}={one}{flag}: must be below {about.below:g}")
