"""A sweep's runs, in plain Python over the configurations in `experiments/configs`.

    sweep = Sweep(Finetune(), product(rank=[1, 4, 16, 64], lr=logspace(-4, -2, 5), seed=range(5)))

    product(rank=[1, 4], seed=range(3))               every combination: 6 points
    zip_(rank=[1, 4], alpha=[2, 8])                   side by side: 2 points
    chain(product(rank=[1]), product(lr=[1e-3]))      one after the other
    product(zip_(rank=[1, 4], alpha=[2, 8]), seed=range(3))           points of points
    points.where(lambda point: point["rank"] < 16)    those that a function likes
    points.sample(10, seed=0)                         ten of them, always the same
    points.override(steps=50)                         one setting for all

A point is a mapping from flags to values; nothing is checked before it meets a configuration in
`Sweep.runs`. The same as YAML, without functions:

    experiment: finetune
    base: {corpus: documents, steps: 200}
    runs:
      product: {rank: [1, 4, 16, 64], lr: {logspace: [-4, -2, 5]}, seed: {range: 5}}
      sample: {n: 10, seed: 0}
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from experiments.configs.ablate_depth import AblateDepth
from experiments.configs.compare import PROFILES, Compare
from experiments.configs.finetune import Finetune
from experiments.configs.search_recall import SearchRecall
from experiments.configs.sweep_lora import SweepLora
from kafjax.core.command_line import arguments_of
from kafjax.core.config import Config, changed, leaves
from kafjax.core.config_record import config_hash, identity, read_record, record
from kafjax.core.errors import UserError, nearest

MOST_POINTS = 100_000
SWEPT = (AblateDepth, Compare, Finetune, SearchRecall, SweepLora)
"""Experiments that a sweep can run, each run of it in a folder of its own."""

Point = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Points(Sequence[Point]):
    """Settings by flag of many runs, in order."""

    points: tuple[Point, ...]

    def __len__(self) -> int:
        return len(self.points)

    def __getitem__(self, index: int) -> Point:
        return self.points[index]

    def where(self, predicate: Callable[[Point], bool]) -> Points:
        """Keeps the points that `predicate` is true of."""
        return Points(tuple(point for point in self.points if predicate(point)))

    def sample(self, n: int, seed: int = 0) -> Points:
        """Draws `n` points without replacement and keeps their order. Raises `UserError` for more
        than there are."""
        if not 1 <= n <= len(self.points):
            raise UserError(
                f"sample: {n} of {len(self.points)} points; draw between 1 and {len(self.points)}"
            )
        drawn = sorted(random.Random(seed).sample(range(len(self.points)), n))
        return Points(tuple(self.points[index] for index in drawn))

    def override(self, **settings: Any) -> Points:
        """Sets the same value at every point. Points that no longer differ stay, and `Sweep.runs`
        merges them."""
        return Points(tuple({**point, **settings} for point in self.points))


def product(*grids: Points, **axes: Iterable[Any]) -> Points:
    """Combines every point of each grid with every value of each axis; the last axis varies
    fastest.

    Raises:
      UserError: an axis or a grid without a value, a setting that stands in two of them, or more
        than `MOST_POINTS`.
    """
    factors = [*grids, *(_axis(name, values) for name, values in axes.items())]
    if not factors:
        raise UserError("product: no axis; give one, such as product(rank=[1, 4])")
    if any(not len(factor) for factor in factors):
        raise UserError("product: one of its grids has no point, so there is no combination")
    if (n := math.prod(map(len, factors))) > MOST_POINTS:
        raise UserError(f"product: {n:,} points; a sweep may have {MOST_POINTS:,}")
    names = [set().union(*factor) for factor in factors]
    for one, other in itertools.combinations(names, 2):
        if both := one & other:
            raise UserError(f"product: '{min(both)}' stands in two of its axes; keep one")
    return Points(tuple(_merged(combination) for combination in itertools.product(*factors)))


def zip_(**axes: Iterable[Any]) -> Points:
    """Takes the first value of each axis, then the second of each, and so on. Raises `UserError`
    for axes of different lengths."""
    columns = {name: _axis(name, values) for name, values in axes.items()}
    lengths = {name: len(column) for name, column in columns.items()}
    if len(set(lengths.values())) != 1:
        shown = ", ".join(f"{name} has {n}" for name, n in lengths.items())
        raise UserError(f"zip: axes must be of one length, and {shown or 'there is none'}")
    return Points(tuple(_merged(row) for row in zip(*columns.values(), strict=True)))


def chain(*grids: Points) -> Points:
    """Puts grids one behind the other."""
    return Points(tuple(point for grid in grids for point in grid))


def logspace(start: float, stop: float, n: int) -> tuple[float, ...]:
    """Returns `n` powers of ten from `10**start` to `10**stop`, evenly spaced in the exponent, to
    six digits.

    Raises `UserError` for `n` below 1, or 1 with two different ends.
    """
    if n < 1 or (n == 1 and start != stop):
        raise UserError(
            f"logspace({start}, {stop}, {n}): give at least two values, the ends included"
        )
    exponents = [start + (stop - start) * index / max(n - 1, 1) for index in range(n)]
    # 1e-3 and not 0.001000...2: it stands in command lines
    return tuple(float(f"{10**exponent:.6g}") for exponent in exponents)


def _merged(points: Iterable[Point]) -> Point:
    return {name: value for point in points for name, value in point.items()}


def _axis(name: str, values: Iterable[Any]) -> Points:
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise UserError(
            f"{name}={str(values)[:60]!r} is one value; an axis is a list, such as {name}=[{str(values)[:60]}]"
        )
    points = tuple({name: value} for value in itertools.islice(values, MOST_POINTS + 1))
    if not points:
        raise UserError(f"{name} is empty: the product has no run; give at least one value")
    return Points(points)


@dataclasses.dataclass(frozen=True)
class Run:
    """One run of a sweep.

    Attributes:
      id: hash of everything that determines the result. Mesh, machine and folders are not part of
        it.
      module: what is run, as `python -m MODULE`.
      settings: what the point says, by flag.
      record: the whole configuration, as config.json holds it.
      arguments: flags that no record holds (`--wandb`, say).
    """

    id: str
    module: str
    settings: Mapping[str, Any]
    record: Mapping[str, Any]
    arguments: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Sweep:
    """Runs of one experiment: `base` with the settings of each point.

    Attributes:
      base: configuration of the experiment; it names a run's folder by the flags `runs` and `name`.
      points: see the module.
      module: what is run, as `python -m MODULE`; by default `experiments.NAME`, by the name of the
        configuration.
    """

    base: Config
    points: Points
    module: str = ""

    def override(self, **settings: Any) -> Sweep:
        """Sets values of the base, by flag. Raises `UserError` for one that the points set, and as
        `changed` does."""
        if swept := sorted(set().union(*self.points) & settings.keys()):
            raise UserError(
                f"'{swept[0]}' is swept over, so it cannot be set for all; change the spec"
            )
        return dataclasses.replace(self, base=_with(self.base, settings, "base"))

    def runs(self) -> list[Run]:
        """Lists the runs in the order of the points, each once.

        Raises:
          UserError: no point, a setting that the experiment does not have (with the nearest name)
            or that its field refuses, an experiment without `runs` and `name`, or two points that
            its identity does not tell apart.
        """
        flags = {leaf.flag for leaf in leaves(type(self.base)())}
        if not {"runs", "name"} <= flags:
            raise UserError(
                f"{type(self.base).__name__} writes no run's folder (--runs and --name), so it cannot be swept"
            )
        if not self.points.points:
            raise UserError("the sweep has no run: every point was filtered out")
        module = self.module or f"experiments.{_snake(type(self.base).__name__)}"
        found: dict[str, Run] = {}
        for number, point in enumerate(self.points, 1):
            for name in ("runs", "name"):
                if name in point:
                    raise UserError(
                        f"point {number}: '{name}' is set by the sweep's folder; leave it out"
                    )
            config = _with(self.base, point, f"point {number}")
            values = {
                leaf.flag: leaf.of(config)
                for leaf in leaves(type(config)())
                if not leaf.about.record
            }
            arguments = arguments_of(
                type(config),
                {name: value for name, value in values.items() if name not in ("runs", "name")},
            )
            run = Run(
                identity_of(module, config), module, dict(point), record(config), tuple(arguments)
            )
            twin = found.setdefault(run.id, run)
            if differing := [
                name for name, value in run.record.items() if value != twin.record[name]
            ]:
                raise UserError(
                    f"point {number}: runs that differ only in {', '.join(differing)} are one run; do not sweep over that"
                )
        return list(found.values())


def identity_of(module: str, config: Config) -> str:
    """Hashes what tells two runs apart. A learning rate that is left to its method counts as that
    method's."""
    resolved = config.resolved() if isinstance(config, Finetune) else config
    return config_hash({"module": module, **identity(resolved)})


def experiment_named(name: str) -> type[Config]:
    """Finds the configuration of `experiments/NAME.py` that a sweep can run. Raises `UserError`
    with the nearest name."""
    known = {_snake(kind.__name__): kind for kind in SWEPT}
    if name not in known:
        raise UserError(
            f"'{str(name)[:60]}' is no experiment that can be swept. {nearest(str(name), known)}"
        )
    return known[name]


def _with(config: Config, settings: Point, source: str) -> Config:
    """Returns `config` with settings by flag. A profile stands for its values; a setting beside it
    wins."""
    by_flag = {leaf.flag: leaf for leaf in leaves(type(config)())}
    plain = {
        name: _plain(value, by_flag[name].hint if name in by_flag else None)
        for name, value in settings.items()
    }
    values = read_record(type(config), plain, source)
    profile = PROFILES.get(values.get("profile", ""), {})
    try:
        return changed(config, **{**profile, **values})
    except UserError as error:
        raise UserError(f"{source}: {error}") from error


def _plain(value: Any, hint: Any) -> Any:
    """Returns a value as JSON has it: NumPy's numbers as Python's, and a whole number for a rate as
    a float, so that hashes agree."""
    value = value.item() if hasattr(value, "item") else value
    if isinstance(value, tuple | list):
        return [_plain(one, hint) for one in value]
    return (
        float(value)
        if "float" in str(hint) and isinstance(value, int) and not isinstance(value, bool)
        else value
    )


def _snake(name: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()
