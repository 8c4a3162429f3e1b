"""An ablation table: cells of a grid, each with its seeds, their quality with intervals over
questions and seeds, and figures of it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.ticker
import numpy as np
from numpy.typing import ArrayLike

from kafjax.core.records import Prediction
from kafjax.evaluation import table
from kafjax.evaluation.figures import METHOD_STYLE, STYLE, new_figure, save_figure
from kafjax.evaluation.intervals import CONFIDENCE, RESAMPLES, Interval, wilson
from kafjax.evaluation.results import RETENTION, headline, ordered

_SEED = 0
_NOTHING = Interval(None, None, None, 0)


@dataclasses.dataclass(frozen=True)
class Trial:
    """One trained adapter. `settings` are what it shares with the trials of other seeds (rank,
    alpha, ...), in the order of columns."""

    name: str
    settings: Mapping[str, Any]
    seed: int
    ending: str
    final_loss: float | None
    predictions: Sequence[Prediction]


def crossed_mean(scores_SxQ: ArrayLike) -> Interval:
    """Mean of scores in [0, 1] of S seeds on the same Q questions; the interval counts both as
    drawn at random.

    One seed, or scores that are all the same: Wilson's interval over the questions. Else a
    bootstrap that draws seeds and questions anew, each with replacement (Owen 2007, "The pigeonhole
    bootstrap"), 2.5th to 97.5th percentile. With two or three seeds it says little about the
    variance between seeds.
    """
    scores_SxQ = np.asarray(scores_SxQ, float)
    S, Q = scores_SxQ.shape
    if S == 0 or Q == 0:
        return _NOTHING
    mean = float(scores_SxQ.mean())
    if S == 1 or np.ptp(scores_SxQ) == 0:
        return wilson(mean * Q, Q)
    rng = np.random.default_rng(_SEED)
    weights_KxS = rng.multinomial(S, np.full(S, 1 / S), RESAMPLES) / S
    weights_KxQ = rng.multinomial(Q, np.full(Q, 1 / Q), RESAMPLES) / Q
    means_K = np.einsum("ks,sq,kq->k", weights_KxS, scores_SxQ, weights_KxQ, optimize=True)
    low, high = np.quantile(means_K, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Interval(mean, float(low), float(high), Q)


def cells(trials: Sequence[Trial]) -> list[dict[str, Any]]:
    """One dict a cell of the grid: its settings, seeds, quality by split, mean final loss with the
    range over seeds.

    Trials that diverged are counted, and their answers are not.
    """
    groups: dict[tuple[Any, ...], list[Trial]] = {}
    for trial in trials:
        groups.setdefault(tuple(trial.settings.values()), []).append(trial)
    return [_cell(group) for group in groups.values()]


def base_cell(predictions: Sequence[Prediction]) -> dict[str, Any]:
    """The row of the model as it came, which has no settings."""
    return _cell([Trial("base", {}, 0, "finished", math.nan, predictions)]) | {
        "seeds": [],
        "final_loss": _NOTHING.to_json(),
    }


def _cell(group: Sequence[Trial]) -> dict[str, Any]:
    whole = [trial for trial in group if trial.ending != "diverged"]
    losses = [trial.final_loss for trial in whole if trial.final_loss is not None]
    loss = (
        Interval(float(np.mean(losses)), min(losses), max(losses), len(losses))
        if losses
        else _NOTHING
    )
    quality = {}
    for split in dict.fromkeys(p.split for trial in whole for p in trial.predictions):
        of_split = [
            {p.id: p.correct for p in trial.predictions if p.split == split} for trial in whole
        ]
        ids = sorted(of_split[0])
        quality[split] = crossed_mean(
            [[correct[id] for id in ids] for correct in of_split]
        ).to_json()
    return {
        "settings": dict(group[0].settings),
        "seeds": [trial.seed for trial in whole],
        "diverged": len(group) - len(whole),
        "stopped_early": sum(trial.ending == "stopped" for trial in whole),
        "final_loss": loss.to_json(),
        "quality": quality,
    }


def splits_of(cells: Sequence[Mapping[str, Any]]) -> list[str]:
    """Lists the splits that cells have answers to, the one by which they are ranked first."""
    return ordered(dict.fromkeys(split for cell in cells for split in cell["quality"]))


def best(cells: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """Picks the cell with the highest quality on the headline split. Among equals, the one that
    forgot the least."""
    split = headline(splits_of(cells))
    ranked = [cell for cell in cells if split in cell["quality"] and "rank" in cell["settings"]]

    def order(cell: Mapping[str, Any]) -> tuple[float, float]:
        return cell["quality"][split]["value"], cell["quality"].get(RETENTION, {}).get(
            "value"
        ) or 0.0

    return max(ranked, key=order, default=None)


def ablation_table(cells: Sequence[Mapping[str, Any]]) -> table.Table:
    """A row a cell, in their order."""
    names = list(dict.fromkeys(name for cell in cells for name in cell["settings"]))
    splits = splits_of(cells)

    def count(split: str) -> int:
        return max(cell["quality"][split]["n"] for cell in cells if split in cell["quality"])

    def row(cell: Mapping[str, Any]) -> tuple[str, ...]:
        values = (
            [_shown(cell["settings"][name]) for name in names]
            if cell["settings"]
            else ["base", *[table.NONE] * (len(names) - 1)]
        )
        notes = {"diverged": cell["diverged"], "stopped early": cell["stopped_early"]}
        seeds = (
            ", ".join([f"{len(cell['seeds'])}", *(f"{n} {what}" for what, n in notes.items() if n)])
            if cell["settings"]
            else table.NONE
        )
        return (
            *values,
            seeds,
            table.ratio(cell["final_loss"]),
            *(table.percent(cell["quality"].get(split)) for split in splits),
        )

    notes = (
        "Percent of questions answered right [95% interval over questions and seeds: Wilson for one seed, pigeonhole bootstrap for more].",
        "Loss: training loss in nats per token, mean of the last tenth of the steps, over seeds [lowest, highest].",
    )
    headers = (
        *names,
        "seeds",
        "final loss",
        *(f"{split} % (n={count(split)})" for split in splits),
    )
    return table.Table("LoRA sweep", headers, tuple(map(row, cells)), notes)


def _shown(value: Any) -> str:
    return (
        table.NONE
        if value is None
        else f"{value:g}"
        if isinstance(value, int | float)
        else str(value)
    )


def draw(cells: Sequence[Mapping[str, Any]], folder: Path) -> list[Path]:
    """`quality.png`, `retention.png` and `loss.png`: each against the rank and against the learning
    rate, with intervals."""
    cells = [cell for cell in cells if "rank" in cell["settings"]]
    splits = {"quality": headline(splits_of(cells)), "retention": RETENTION}
    paths = []
    with matplotlib.rc_context(STYLE):
        for name, split in splits.items():
            if any(split in cell["quality"] for cell in cells):

                def value(cell: Mapping[str, Any], split: str | None = split) -> Any:
                    return cell["quality"].get(split)

                paths.append(
                    _panels(cells, value, f"correct on {split}", folder / f"{name}.png", True)
                )
        if any(cell["final_loss"]["value"] is not None for cell in cells):
            paths.append(
                _panels(
                    cells,
                    lambda cell: cell["final_loss"],
                    "final loss, nats per token",
                    folder / "loss.png",
                    False,
                )
            )
    return paths


def _panels(
    cells: Sequence[Mapping[str, Any]],
    value: Callable[[Mapping[str, Any]], Mapping[str, Any] | None],
    label: str,
    path: Path,
    share: bool,
) -> Path:
    figure = new_figure(9.0, 3.6)
    axes = figure.subplots(1, 2, sharey=True)
    for panel, x in zip(axes, ("rank", "learning rate"), strict=True):
        others = [name for name in cells[0]["settings"] if name != x]
        varied = [
            name for name in others if len({str(cell["settings"][name]) for cell in cells}) > 1
        ]
        lines: dict[str, list[tuple[float, Mapping[str, Any]]]] = {}
        for cell in cells:
            interval = value(cell)
            if interval is not None and interval["value"] is not None:
                key = (
                    ", ".join(f"{name} {_shown(cell['settings'][name])}" for name in varied)
                    or label
                )
                lines.setdefault(key, []).append((cell["settings"][x], interval))
        for index, (key, points) in enumerate(lines.items()):
            colour, marker = list(METHOD_STYLE.values())[index % len(METHOD_STYLE)]
            points = sorted(points, key=lambda point: point[0])
            middle = np.array([interval["value"] for _, interval in points])
            error = np.array([[i["value"] - i["low"], i["high"] - i["value"]] for _, i in points]).T
            # Side by side, so that intervals of lines that meet stay readable.
            at = np.array([x for x, _ in points]) * 1.03 ** (index - (len(lines) - 1) / 2)
            panel.errorbar(
                at,
                middle,
                yerr=np.maximum(error, 0),
                color=colour,
                marker=marker,
                label=key,
                markersize=5,
                elinewidth=1,
            )
        ticks = sorted({cell["settings"][x] for cell in cells})
        panel.set_xscale("log")
        panel.set_xticks(ticks, [_shown(tick) for tick in ticks])
        panel.minorticks_off()
        panel.set_xlabel(x)
        if len(lines) > 1:
            panel.legend(fontsize=7)
    axes[0].set_ylabel(label)
    if share:
        axes[0].set_ylim(-0.04, 1.04)
        axes[0].yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1.0, decimals=0))
    else:
        axes[0].set_ylim(0, None)
    return save_figure(figure, path)
