"""Opens a spec: a file of Python or YAML, or one of `launch/sweeps` by its name."""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml
from absl import flags

from kafjax.core.command_line import define, given
from kafjax.core.errors import UserError, nearest
from kafjax.core.rundir import read_bytes
from launch import sweeps
from launch.spec import Points, Sweep, chain, experiment_named, logspace, product, zip_

MOST_BYTES = 1_000_000


def open_spec(spec: str, settings: tuple[str, ...] = ()) -> Sweep:
    """Opens a spec and sets `settings`, texts `NAME=VALUE` as on the experiment's command line, in
    its base.

    A file of Python is run: it is a program of yours, and defines `sweep`.

    Raises:
      UserError: no such spec (with the nearest name), one that cannot be read, or a setting that is
        none.
    """
    if spec.endswith((".yaml", ".yml")):
        sweep = from_yaml(read_bytes(Path(spec), MOST_BYTES), spec)
    elif spec.endswith(".py"):
        sweep = _of_module(_run_file(Path(spec)), spec)
    else:
        known = [module.name for module in pkgutil.iter_modules(sweeps.__path__)]
        if spec not in known:
            raise UserError(
                f"no sweep '{spec[:60]}'; give a file .py or .yaml. {nearest(spec, known)}"
            )
        sweep = _of_module(importlib.import_module(f"launch.sweeps.{spec}"), spec)
    return sweep.override(**_parsed(sweep, settings)) if settings else sweep


def name_of(spec: str) -> str:
    """Names the sweep's folder after its spec."""
    return re.sub(r"[^A-Za-z0-9_-]+", "-", Path(spec).stem).strip("-") or "sweep"


def _run_file(path: Path) -> Any:
    read_bytes(path, MOST_BYTES)  # refuses what is not there
    found = importlib.util.spec_from_file_location("sweep_spec", path)
    module = importlib.util.module_from_spec(found)
    try:
        found.loader.exec_module(module)
    except SyntaxError as error:
        raise UserError(f"{path}:{error.lineno}: {error.msg}") from error
    return module


def _of_module(module: Any, source: str) -> Sweep:
    sweep = getattr(module, "sweep", None)
    if not isinstance(sweep, Sweep):
        raise UserError(f"{source} defines no `sweep = Sweep(...)` (launch/spec.py shows one)")
    return sweep


def _parsed(sweep: Sweep, settings: tuple[str, ...]) -> dict[str, Any]:
    """Reads settings as the experiment's own flags are read."""
    for text in settings:
        if "=" not in text:
            raise UserError(f"--set={text[:60]}: write NAME=VALUE, such as --set=steps=100")
    values = flags.FlagValues()
    define(type(sweep.base), values)
    known = [name for name in values if name != "config"]
    for text in settings:
        if (name := text.partition("=")[0]) not in known:
            raise UserError(
                f"--set: '{name[:60]}' is no setting of {type(sweep.base).__name__}. {nearest(name, known)}"
            )
    try:
        values(["", *(f"--{text}" for text in settings)])
    except flags.Error as error:
        raise UserError(f"--set: {error}") from error
    return given(type(sweep.base), values)


class _Loader(yaml.SafeLoader):
    """YAML 1.2's numbers: 1e-3 is one, and no text."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def from_yaml(data: bytes, source: str) -> Sweep:
    """Reads a spec of the form that `launch/spec.py` shows. Raises `UserError` naming what is
    unknown, with the nearest name."""
    try:
        tree = yaml.load(data, _Loader)
    except (yaml.YAMLError, UnicodeDecodeError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        raise UserError(
            f"{source}{f':{mark.line + 1}' if mark else ''}: not valid YAML ({str(error).splitlines()[0]})"
        ) from error
    tree = _mapping(tree, source, "the file", ("experiment", "base", "runs"))
    if missing := [name for name in ("experiment", "runs") if name not in tree]:
        raise UserError(f"{source}: '{missing[0]}' is missing")
    kind = experiment_named(str(tree["experiment"]))
    sweep = Sweep(kind(), _points(tree["runs"], source))
    return sweep.override(**_mapping(tree.get("base") or {}, source, "base"))


def _points(tree: Any, source: str) -> Points:
    tree = dict(_mapping(tree, source, "runs", (*_MAKE, "override", "sample")))
    override, sample = tree.pop("override", None), tree.pop("sample", None)
    if len(tree) != 1:
        raise UserError(f"{source}: runs are one of {', '.join(_MAKE)}; put several into a chain")
    ((how, what),) = tree.items()
    points = _MAKE[how](what, source)
    if override is not None:
        points = points.override(**_mapping(override, source, "override"))
    if sample is not None:
        points = points.sample(
            **_numbers(_mapping(sample, source, "sample", ("n", "seed")), source)
        )
    return points


def _product(tree: Any, source: str) -> Points:
    if isinstance(tree, list):
        return product(*(_points(one, source) for one in tree))
    return product(**_axes(tree, source))


def _zip(tree: Any, source: str) -> Points:
    return zip_(**_axes(tree, source))


def _chain(tree: Any, source: str) -> Points:
    if not isinstance(tree, list):
        raise UserError(f"{source}: a chain is a list of runs")
    return chain(*(_points(one, source) for one in tree))


_MAKE: dict[str, Callable[[Any, str], Points]] = {"product": _product, "zip": _zip, "chain": _chain}


def _axes(tree: Any, source: str) -> dict[str, Any]:
    axes = {}
    for name, values in _mapping(tree, source, "an axis").items():
        if isinstance(values, dict):
            form = _mapping(values, source, name, ("range", "logspace"))
            if len(form) != 1:
                raise UserError(
                    f"{source}: {name} is a list, {{range: N}} or {{logspace: [START, STOP, N]}}"
                )
            ((how, numbers),) = form.items()
            values = _spaced(
                how, numbers if isinstance(numbers, list) else [numbers], f"{source}: {name}"
            )
        axes[name] = values
    return axes


def _spaced(how: str, numbers: list[Any], source: str) -> Any:
    whole = all(type(number) is int for number in (numbers if how == "range" else numbers[2:]))
    counts = (1, 2, 3) if how == "range" else (3,)
    if (
        not whole
        or len(numbers) not in counts
        or not all(type(number) in (int, float) for number in numbers)
    ):
        raise UserError(
            f"{source}: write {{range: N}}, {{range: [FROM, BELOW]}} or {{logspace: [START, STOP, N]}}, with numbers"
        )
    if how == "range" and len(numbers) == 3 and numbers[2] == 0:
        raise UserError(f"{source}: a range of step 0 has no end")
    return range(*numbers) if how == "range" else logspace(*numbers)


def _numbers(tree: Mapping[str, Any], source: str) -> dict[str, int]:
    if "n" not in tree or not all(type(value) is int for value in tree.values()):
        raise UserError(f"{source}: sample is {{n: N, seed: SEED}}, with whole numbers")
    return dict(tree)


def _mapping(tree: Any, source: str, what: str, known: tuple[str, ...] = ()) -> Mapping[str, Any]:
    if not isinstance(tree, dict) or not all(isinstance(key, str) for key in tree):
        raise UserError(f"{source}: {what} must be a mapping by name, got {str(tree)[:60]!r}")
    for key in tree:
        if known and key not in known:
            raise UserError(f"{source}: unknown key '{key[:60]}' in {what}. {nearest(key, known)}")
    return tree
