"""A configuration is a frozen dataclass, whose fields say all about themselves.

    @dataclasses.dataclass(frozen=True)
    class Train(Config):
        epochs: int = option(8, "Passes over the corpus.", least=1)

    @dataclasses.dataclass(frozen=True)
    class Finetune(Config):
        train: Train = nested(Train())
        name: str | None = option(None, "Name of the run's folder.", record=False)

    config = changed(Finetune(), epochs=3)

`core.command_line` makes flags of it, `core.config_record` the run's record and its identity.

Dataclasses nest and flags are flat, so a flag's name is unique within an experiment. A field is a
bool, int, float, str, a tuple of those or a mapping from a pattern to a number; or None beside one
of them.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import numbers
import typing
from collections.abc import Collection, Iterator, Mapping
from typing import Any, TypeVar

from kafjax.core import paths
from kafjax.core.errors import UserError, check_text, nearest
from kafjax.core.field_types import has_type, text_of, type_name
from kafjax.core.text import shortened

MOST_WHOLE = 2**31 - 1
"""Highest whole number of a field that sets no lower limit itself: arrays are counted in 32
bits."""

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


def _check(name: str, value: Any, hint: Any, about: Option) -> None:
    if not has_type(value, hint):
        raise UserError(f"{name}={str(value)[:60]!r}: must be {type_name(hint)}")
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
                f"{name}={shortened(one, spelled=str)}{flag}: must be {text_of(most)} or less"
            )
        if about.below is not None and one >= about.below:
            raise UserError(f"{name}={one}{flag}: must be below {about.below:g}")
