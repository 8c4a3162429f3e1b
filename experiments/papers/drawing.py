"""The frame of a paper's figure: one pair of axes with its labels, saved as a file."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes

from kafjax.evaluation.figures import STYLE, new_figure, save_figure


@contextlib.contextmanager
def axes_in(path: Path, x: str, y: str, legend: str | None = None) -> Generator[Axes]:
    """Yields axes to draw on, and saves them to `path`. A legend names lines that have a label, under
    the title `legend`."""
    with matplotlib.rc_context(STYLE):
        drawn = new_figure(6.0, 4.0)
        axes = drawn.subplots()
        yield axes
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(title=legend)
        save_figure(drawn, path)


def log_ticks(axes: Axes, values: Sequence[int]) -> None:
    """Scales the horizontal axis by the logarithm, with ticks at these values alone."""
    axes.set_xscale("log")
    axes.set_xticks(values, list(map(str, values)))
    axes.minorticks_off()
