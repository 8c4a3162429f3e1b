"""Puts comparisons side by side: a row for each method of each run, with what differs in their
settings.

    python -m experiments.table runs/a runs/b             any number of runs of experiments.compare, also unfinished ones
    python -m experiments.table runs/k1 runs/k3 runs/k5 --out=depth

Prints the table and writes it to --out as table.md and table.csv. Where one setting differs and is
a number, quality.png shows the headline over it. For means over seeds, for tests between runs, and
for a page with every answer of all of them there is experiments.report.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

from experiments.build import CHAT_TEMPLATE, CORPUS_HASH
from experiments.configs.table import SideBySide
from kafjax.core.command_line import define, from_flags
from kafjax.core.errors import UserError, run_main
from kafjax.core.help import asked_for, help_text
from kafjax.core.rundir import read_object, write_atomic
from kafjax.core.schema import Amount, Count, read
from kafjax.evaluation.cost import TOTAL
from kafjax.evaluation.figures import METHOD_STYLE, STYLE, new_figure, save_figure
from kafjax.evaluation.results import RETENTION, headline, splits_of
from kafjax.evaluation.table import NONE, PENDING, Table, number, percent, render

# Names of places and of what lies beside each other, not what a run computes; the contents of a
# corpus are told by its own name.
_BESIDE = {"methods", "mesh", "profile", "attention", CORPUS_HASH, CHAT_TEMPLATE}


@dataclasses.dataclass(frozen=True)
class _Interval:
    value: float | None
    low: float | None
    high: float | None
    n: Count


@dataclasses.dataclass(frozen=True)
class _Cost:
    train_seconds: Amount
    index_seconds: Amount
    artifact_bytes: Amount
    llm_tokens_per_query: dict[str, Amount]
    latency_seconds: dict[str, dict[str, Amount]]


@dataclasses.dataclass(frozen=True)
class _Method:
    quality: dict[str, _Interval]
    cost: _Cost


@dataclasses.dataclass(frozen=True)
class _Results:
    """Parts of results.json that are shown here."""

    methods: dict[str, _Method]
    pending: list[str]


@dataclasses.dataclass(frozen=True)
class Row:
    """One method of one run. `split` is the run's headline, `result` None while it is still to
    come."""

    run: str
    method: str
    settings: dict[str, Any]
    split: str | None
    result: _Method | None


def run(config: SideBySide, folders: Sequence[str]) -> list[Row]:
    """Prints and writes the table.

    Raises:
      UserError: no folder, a folder that holds no comparison, a file that is damaged, or a disk
        that refuses.
    """
    if not folders:
        raise UserError(
            "name the runs to put side by side: python -m experiments.table runs/a runs/b"
        )
    rows = rows_of([Path(folder) for folder in dict.fromkeys(folders)])
    text, out = render([tabulate(rows)]), Path(config.out)
    write_atomic(out / "table.md", text)
    write_atomic(out / "table.csv", to_csv(rows))
    print(text)
    drawn = draw(rows, out / "quality.png")
    print(f"Look at {out}/table.csv{'' if drawn is None else f' and {drawn}'}.")
    return rows


def rows_of(folders: Sequence[Path]) -> list[Row]:
    """Reads the methods of runs. Their settings are those in which the runs differ."""
    configs = [_config(folder) for folder in folders]
    names = dict.fromkeys(name for config in configs for name in config if name not in _BESIDE)
    differing = [
        name
        for name in names
        if any(config.get(name) != configs[0].get(name) for config in configs)
    ]
    rows = []
    for folder, config in zip(folders, configs, strict=True):
        settings = {name: config.get(name) for name in differing}
        file = folder / "results.json"
        methods = config.get("methods", [])
        results = (
            read(_Results, file)
            if file.exists()
            else _Results({}, list(methods) if isinstance(methods, list) else [])
        )
        split = headline(
            splits_of(
                {
                    "methods": {
                        name: {"quality": method.quality}
                        for name, method in results.methods.items()
                    }
                }
            )
        )
        rows += [
            Row(str(folder), name, settings, split, method)
            for name, method in results.methods.items()
        ]
        rows += [Row(str(folder), name, settings, split, None) for name in results.pending]
    return rows


def _config(folder: Path) -> dict[str, Any]:
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} holds no run (config.json)")
    config = read_object(folder / "config.json")
    if "methods" not in config:
        raise UserError(
            f"{folder} is no run of experiments.compare; for sweeps and trainings there is experiments.report"
        )
    return config


def _measures(row: Row) -> dict[str, float | None]:
    """Returns the numbers of a method by column, in the units of the headers."""
    if row.result is None:
        return dict.fromkeys(("train s", "index s", "prompt tokens", "ms", "keep MB"))
    cost = row.result.cost
    total = cost.latency_seconds.get(TOTAL, {}).get("p50")
    return {
        "train s": cost.train_seconds,
        "index s": cost.index_seconds,
        "prompt tokens": cost.llm_tokens_per_query.get("prompt"),
        "ms": None if total is None else 1e3 * total,
        "keep MB": cost.artifact_bytes / 1e6,
    }


def _quality(row: Row, key: str | None) -> dict[str, Any] | None:
    found = None if row.result is None or key is None else row.result.quality.get(key)
    return None if found is None else dataclasses.asdict(found)


def tabulate(rows: Sequence[Row]) -> Table:
    """Lays rows out for reading."""
    settings = list(rows[0].settings) if rows else []
    measures = list(_measures(rows[0])) if rows else []
    headers = ("run", "method", *settings, "on", "correct %", "forgetting, points", *measures)
    lines = []
    for row in rows:
        values = [_shown(value) for value in row.settings.values()]
        if row.result is None:
            lines.append((row.run, row.method, *values, *[PENDING] * (3 + len(measures))))
            continue
        quality = (
            percent(_quality(row, row.split)),
            percent(_quality(row, f"{RETENTION}_change"), signed=True),
        )
        lines.append(
            (
                row.run,
                row.method,
                *values,
                row.split or NONE,
                *quality,
                *map(number, _measures(row).values()),
            )
        )
    notes = (
        "On: the headline split of the run. Forgetting: change of retention from the base model. Ms: median of a query, asked alone. "
        "[low, high]: 95% interval over questions.",
    )
    return Table("Side by side", headers, tuple(lines), notes)


def to_csv(rows: Sequence[Row]) -> str:
    """Writes a line a row; numbers are not rounded, what is still to come is empty."""
    settings = list(rows[0].settings) if rows else []
    measures = list(_measures(rows[0])) if rows else []
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(
        [
            "run",
            "method",
            *settings,
            "split",
            "n",
            "correct",
            "low",
            "high",
            "forgetting",
            *measures,
        ]
    )
    for row in rows:
        quality, change = _quality(row, row.split) or {}, _quality(row, f"{RETENTION}_change") or {}
        numbers = [
            quality.get("n"),
            quality.get("value"),
            quality.get("low"),
            quality.get("high"),
            change.get("value"),
        ]
        writer.writerow(
            [
                row.run,
                row.method,
                *row.settings.values(),
                row.split,
                *numbers,
                *_measures(row).values(),
            ]
        )
    return out.getvalue()


def draw(rows: Sequence[Row], path: Path) -> Path | None:
    """Draws the headline over the one setting that differs, a line a method; None where that is no
    number, or not one."""
    settings = list(rows[0].settings) if rows else []
    scored = [
        (row, quality)
        for row in rows
        if (quality := _quality(row, row.split)) and quality["value"] is not None
    ]
    numeric = len(settings) == 1 and all(_is_number(row.settings[settings[0]]) for row in rows)
    if not numeric or len({row.split for row, _ in scored}) != 1:
        return None
    (setting,), lines = settings, dict.fromkeys(row.method for row, _ in scored)
    with matplotlib.rc_context(STYLE):
        figure = new_figure(6.0, 4.0)
        axes = figure.subplots()
        for name, fallback in zip(lines, list(METHOD_STYLE.values()) * len(lines), strict=False):
            colour, marker = METHOD_STYLE.get(name, fallback)
            points = sorted(
                (row.settings[setting], q["value"], q["low"], q["high"])
                for row, q in scored
                if row.method == name
            )
            x, y, low, high = zip(*points, strict=True)
            reach = [
                [v - a for v, a in zip(y, low, strict=True)],
                [b - v for v, b in zip(y, high, strict=True)],
            ]
            axes.errorbar(
                x,
                y,
                yerr=reach,
                color=colour,
                marker=marker,
                markersize=5,
                elinewidth=1,
                label=name,
            )
        axes.set(xlabel=setting, ylabel=f"correct on {scored[0][0].split}", ylim=(-0.03, 1.03))
        axes.set_xticks(sorted({row.settings[setting] for row, _ in scored}))
        axes.legend(fontsize=8)
        return save_figure(figure, path)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _shown(value: Any) -> str:
    return NONE if value is None else str(value)


def main() -> None:
    if asked_for(sys.argv[1:]):
        print(f"{__doc__}\n{help_text(SideBySide)}", end="")
        return
    define(SideBySide)

    def start(argv: list[str]) -> None:
        run(from_flags(SideBySide), argv[1:])

    run_main(start, most_arguments=1000)


if __name__ == "__main__":
    main()
