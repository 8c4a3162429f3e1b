"""Figures of a run as PNG files: quality against cost, learning against forgetting, error budget,
latency, training loss.

Drawn with matplotlib's object interface (no pyplot), so that nothing global is left open. Methods
keep their colour and marker everywhere; colours are Okabe and Ito's, told apart with any colour
vision.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.container import BarContainer
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from kafjax.core.rundir import write_atomic
from kafjax.evaluation.cost import OTHER, STAGES
from kafjax.evaluation.error_budget import CAUSES
from kafjax.evaluation.labels import label_points
from kafjax.evaluation.results import RETENTION, headline, splits_of

METHOD_STYLE = {
    "base": ("#7f7f7f", "o"),
    "oracle": ("#000000", "*"),
    "full": ("#d55e00", "s"),
    "lora": ("#0072b2", "^"),
    "rag": ("#009e73", "D"),
    "hyde": ("#cc79a7", "v"),
    "lora+rag": ("#56b4e9", "P"),
    "full+rag": ("#e69f00", "X"),
}
CAUSE_COLOURS = dict(
    zip(
        CAUSES,
        (
            "#009e73",
            "#56b4e9",
            "#0072b2",
            "#7f3f00",
            "#e69f00",
            "#d55e00",
            "#cc79a7",
            "#f0e442",
            "#b3b3b3",
        ),
        strict=True,
    )
)
STAGE_COLOURS = dict(
    zip(
        (*STAGES, OTHER),
        ("#56b4e9", "#e69f00", "#cc79a7", "#009e73", "#0072b2", "#b3b3b3"),
        strict=True,
    )
)
INK, GRID = "#333333", "#e3e3e3"
# Any, because matplotlib types the keys as a list of all its settings.
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "savefig.dpi": 160,
}

Results = Mapping[str, Any]


def draw_all(
    results: Results, folder: Path, metrics: Iterable[Mapping[str, Any]] = ()
) -> dict[str, Path]:
    """Draws every figure that the results so far allow into `folder`; returns {caption: PNG path}
    in reading order.

    `metrics` are rows of metrics.jsonl; those with `method`, `step` and `loss` become loss curves.
    """
    split = headline(splits_of(results))
    drawings: list[tuple[str, str, Callable[[], Figure | None]]] = [
        (
            "quality_cost",
            f"Accuracy on {split} questions against three prices, with 95% intervals. Up and left is better. "
            "Equal prices are set side by side.",
            lambda: quality_against_cost(results),
        ),
        (
            "forgetting",
            "What was learnt against what is left of what the model knew. Up and right is better.",
            lambda: learning_against_forgetting(results),
        ),
        (
            "error_budget",
            "Where answers come from (left, right answers) and where they are lost.",
            lambda: error_budget_bars(results),
        ),
        ("latency", "Mean seconds of a query by stage.", lambda: latency_bars(results)),
        (
            "loss",
            "Training loss, smoothed, with the raw values behind.",
            lambda: loss_curves(metrics),
        ),
    ]
    paths = {}
    with matplotlib.rc_context(STYLE):
        for name, caption, draw in drawings:
            figure = draw()
            if figure is not None:
                paths[caption] = save_figure(figure, folder / f"{name}.png")
    return paths


def quality_against_cost(results: Results) -> Figure | None:
    """Three panels over one accuracy axis: LLM tokens a query, training FLOPs, bytes to keep
    (logarithmic, with a place for 0)."""
    prices: tuple[tuple[str, Callable[[Mapping[str, Any]], float]], ...] = (
        (
            "LLM tokens per query",
            lambda cost: (
                cost["llm_tokens_per_query"]["prompt"] + cost["llm_tokens_per_query"]["output"]
            ),
        ),
        ("training, TFLOP", lambda cost: cost["train_flops_formula"] / 1e12),
        ("to keep per corpus, MB", lambda cost: cost["artifact_bytes"] / 1e6),
    )
    split = headline(splits_of(results))
    methods = _with(results, split)
    if not methods:
        return None
    figure = new_figure(10.5, 3.8)
    axes = figure.subplots(1, len(prices), sharey=True)
    axes[0].set_ylim(-0.06, 1.06)
    _percent_axis(axes[0].yaxis, f"correct on {split}")
    for panel, (label, price) in zip(axes, prices, strict=True):
        panel.set_xlabel(label)
        xs = _log_axis_with_zero(panel, [price(method["cost"]) for method in methods.values()])
        points = {}
        for (name, method), x in zip(methods.items(), xs, strict=True):
            _point(panel, name, x, method["quality"][split])
            points[name] = (x, method["quality"][split]["value"])
        label_points(panel, points, _colours(results))
    return figure


def learning_against_forgetting(results: Results) -> Figure | None:
    """Accuracy on the headline split (up) over accuracy on retention (right), intervals both
    ways."""
    split = headline(splits_of(results))
    methods = _with(results, split, RETENTION)
    if not methods:
        return None
    figure = new_figure(6.2, 4.4)
    axes = figure.subplots()
    points = {}
    for name, method in methods.items():
        retained, learnt = method["quality"][RETENTION], method["quality"][split]
        _point(axes, name, retained["value"], learnt, retained)
        points[name] = (retained["value"], learnt["value"])
    axes.set(xlim=(-0.06, 1.06), ylim=(-0.06, 1.06))
    _percent_axis(axes.xaxis, f"correct on {RETENTION} (known before)")
    _percent_axis(axes.yaxis, f"correct on {split} (new)")
    label_points(axes, points, _colours(results))
    return figure


def error_budget_bars(results: Results) -> Figure | None:
    """One stacked bar a method, causes in the same order and colour, shares of 5% and more written
    in."""
    budgets = {
        name: budget
        for name, budget in results["error_budget"].items()
        if next(iter(budget.values()))["n"]
    }
    shares = {
        cause: [budget[cause]["value"] if cause in budget else 0.0 for budget in budgets.values()]
        for cause in CAUSES
    }
    figure = _stacked_bars(
        list(budgets), shares, CAUSE_COLOURS, lambda share: f"{100 * share:.0f}", 0.05
    )
    if figure is not None:
        _percent_axis(figure.axes[0].xaxis, "knowledge questions")
        figure.axes[0].set_xlim(0, 1)
    return figure


def latency_bars(results: Results) -> Figure | None:
    """One stacked bar a method: mean seconds in each stage (means add up, percentiles do not), p95
    of the total as a tick."""
    latencies = {
        name: latency
        for name, method in results["methods"].items()
        if (latency := method["cost"]["latency_seconds"])
    }
    stages = [
        stage for stage in STAGE_COLOURS if any(stage in latency for latency in latencies.values())
    ]
    seconds = {
        stage: [latency.get(stage, {}).get("mean", 0.0) for latency in latencies.values()]
        for stage in stages
    }
    longest = max((latency["total"]["p95"] for latency in latencies.values()), default=0.0)
    figure = _stacked_bars(
        list(latencies), seconds, STAGE_COLOURS, lambda mean: f"{mean:.2f}", 0.06 * longest
    )
    if figure is not None:
        axes = figure.axes[0]
        p95 = [latency["total"]["p95"] for latency in latencies.values()]
        axes.plot(
            p95,
            range(len(p95)),
            "|",
            color=INK,
            markersize=14,
            markeredgewidth=1.5,
            label="p95 of the total",
        )
        axes.set_xlabel("seconds per query")
        _legend_above(axes)
    return figure


def loss_curves(metrics: Iterable[Mapping[str, Any]]) -> Figure | None:
    """Loss of each trained method over its steps: raw values faint, an exponential moving average
    over them."""
    curves: dict[str, dict[float, float]] = {}
    for row in metrics:
        if {"method", "step", "loss"} <= row.keys() and math.isfinite(row["loss"]):
            # a resumed run logs some steps twice
            curves.setdefault(row["method"], {})[row["step"]] = row["loss"]
    if not curves:
        return None
    figure = new_figure(6.2, 3.6)
    axes = figure.subplots()
    colours = {name: _style(name, index)[0] for index, name in enumerate(curves)}
    ends = {}
    for name, points in curves.items():
        step_N, loss_N = np.array(sorted(points.items())).T
        axes.plot(step_N, loss_N, color=colours[name], alpha=0.25, linewidth=0.8)
        smooth_N = _smooth(loss_N, half_window=loss_N.size // 40)
        axes.plot(step_N, smooth_N, color=colours[name], linewidth=1.8)
        ends[name] = (step_N[-1], smooth_N[-1])
    axes.set(
        xlabel="step",
        ylabel="training loss, nats per token",
        ylim=(0, None),
        xlim=(0, 1.15 * max(step for step, _ in ends.values())),
    )
    label_points(axes, ends, colours)
    return figure


def _stacked_bars(
    names: Sequence[str],
    parts: Mapping[str, Sequence[float]],
    colours: Mapping[str, str],
    text: Callable[[float], str],
    least: float,
) -> Figure | None:
    if not names:
        return None
    figure = new_figure(6.6, 1.3 + 0.36 * len(names))
    axes = figure.subplots()
    left_N = np.zeros(len(names))
    for part, width in parts.items():
        width_N = np.array(width)
        if not width_N.any():
            continue
        bars = axes.barh(
            names,
            width_N,
            left=left_N,
            color=colours[part],
            height=0.7,
            label=part,
            edgecolor="white",
            linewidth=0.6,
        )
        labels = [text(width) if width >= least else "" for width in width_N]
        axes.bar_label(
            bars, labels, label_type="center", color=_readable_on(colours[part]), fontsize=8
        )
        left_N = left_N + width_N
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)
    _legend_above(axes)
    return figure


def _legend_above(axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    bars_first = sorted(
        zip(handles, labels, strict=True), key=lambda pair: not isinstance(pair[0], BarContainer)
    )
    columns = len(labels) if len(labels) <= 6 else 4
    place = {"loc": "lower left", "bbox_to_anchor": (0, 1), "borderaxespad": 0.3}
    axes.legend(
        *zip(*bars_first, strict=True),
        **place,
        ncols=columns,
        handlelength=1,
        handleheight=1,
        columnspacing=1.2,
        fontsize=8.5,
    )


def _point(
    axes: Axes,
    name: str,
    x: float,
    y: Mapping[str, Any],
    x_interval: Mapping[str, Any] | None = None,
) -> None:
    colour, marker = _style(name, len(axes.containers))
    axes.errorbar(
        x,
        y["value"],
        yerr=_error(y),
        xerr=None if x_interval is None else _error(x_interval),
        color=colour,
        marker=marker,
        markersize=10 if marker == "*" else 7,
        markeredgecolor="white",
        markeredgewidth=0.6,
        elinewidth=1.1,
    )


def _error(interval: Mapping[str, Any]) -> list[list[float]]:
    return [[interval["value"] - interval["low"]], [interval["high"] - interval["value"]]]


def _log_axis_with_zero(axes: Axes, values: Sequence[float]) -> list[float]:
    """Makes x logarithmic, with a tick for 0 left of the data; returns a position for each value.

    Values that would fall onto one another are set side by side, so that their intervals stay
    readable.
    """
    positive = [value for value in values if value > 0] or [1.0]
    low, high = math.log10(min(positive)), math.log10(max(positive))
    span = max(high - low, 0.8)
    zero = low - 0.45 * span
    place_N = np.array([math.log10(value) if value > 0 else zero for value in values])
    if min(values) > 0:
        left, ticks, labels = low - 0.15 * span, [], []
    else:
        left, ticks, labels = zero - 0.1 * span, [10.0**zero], ["0"]
    right = low + 1.2 * span
    steps = (1, 2, 5) if span < 2 else (1,)
    decades = range(math.floor(low - 0.1 * span), math.ceil(right) + 1)
    every = max(1, math.ceil(len(decades) / 6))
    marks = [step * 10.0**decade for decade in decades[::every] for step in steps]
    marks = [mark for mark in marks if low - 0.25 * span <= math.log10(mark) <= right]
    axes.set_xscale("log")
    axes.set_xlim(10.0**left, 10.0**right)
    axes.set_xticks(ticks + marks, labels + [f"{mark:,.10g}" for mark in marks])
    axes.minorticks_off()
    return list(10.0 ** _side_by_side(place_N, 0.022 * (right - left)))


def _side_by_side(place_N: np.ndarray, gap: float) -> np.ndarray:
    """Moves places closer than `gap` to their left neighbour's group apart, each group about its
    own middle."""
    order = np.argsort(place_N, kind="stable")
    moved_N = place_N.copy()
    for group in np.split(order, np.flatnonzero(np.diff(place_N[order]) >= gap) + 1):
        moved_N[group] = place_N[group].mean() + gap * (
            np.arange(group.size) - (group.size - 1) / 2
        )
    return moved_N


def _percent_axis(axis: Any, label: str) -> None:
    axis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axis.set_label_text(label)


def _style(name: str, index: int) -> tuple[str, str]:
    return METHOD_STYLE.get(name) or list(METHOD_STYLE.values())[index % len(METHOD_STYLE)]


def _readable_on(colour: str) -> str:
    red, green, blue = matplotlib.colors.to_rgb(colour)
    return "white" if 0.299 * red + 0.587 * green + 0.114 * blue < 0.6 else INK


def _smooth(loss_N: np.ndarray, half_window: int) -> np.ndarray:
    """Centred moving average over up to `2 half_window + 1` values, fewer at the ends."""
    ones = np.ones(min(2 * half_window + 1, loss_N.size))
    return np.convolve(loss_N, ones, "same") / np.convolve(np.ones_like(loss_N), ones, "same")


def _colours(results: Results) -> dict[str, str]:
    return {name: _style(name, index)[0] for index, name in enumerate(results["methods"])}


def _with(results: Results, *keys: str | None) -> dict[str, Mapping[str, Any]]:
    """Methods that have a value for each of the quality keys."""
    return {
        name: method
        for name, method in results["methods"].items()
        if all((method["quality"].get(key) or {"n": 0})["n"] for key in keys)
    }


def new_figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Figure, path: Path) -> Path:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", facecolor="white", metadata={"Software": None})
    write_atomic(path, buffer.getvalue())
    return path
