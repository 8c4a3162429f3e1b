"""Names written next to the points of a plot, where they cover neither each other nor markers nor
error bars."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.container import ErrorbarContainer
from matplotlib.transforms import Bbox

_MARKER = 5.0  # half the size of a marker, in points


def label_points(
    axes: Axes, points: Mapping[str, tuple[float, float]], colours: Mapping[str, str]
) -> None:
    """Writes each name beside its point (data coordinates) in its colour, with a hairline back
    where it had to move away.

    Greedy: names are placed one after another, each at the candidate position with the least
    overlap and distance. Axis limits and scales must be final.
    """
    figure = axes.figure
    figure.canvas.draw()  # settles the layout, on which display positions depend
    pixels = figure.dpi / 72
    at = {name: axes.transData.transform(point) for name, point in points.items()}
    clearance = (_MARKER + 2) * pixels
    taken = [
        _around(centre, _MARKER * pixels, _MARKER * pixels) for centre in at.values()
    ] + _error_bars(axes, pixels)
    for name, point in points.items():
        # Offsets are set in points, so that saving at another resolution keeps the picture.
        style: dict[str, Any] = {"xy": point, "textcoords": "offset points"}
        text = axes.annotate(
            name,
            xytext=(0, 0),
            color=colours[name],
            ha="center",
            va="center",
            fontsize=8.5,
            weight="bold",
            **style,
        )
        extent = text.get_window_extent()
        half = np.array([extent.width / 2 + pixels, extent.height / 2])
        offset = _best_offset(at[name], half, clearance, taken, axes.bbox)
        text.set_position(offset / pixels)
        taken.append(_around(at[name] + offset, *half))
        if (np.abs(offset) - half).max() > clearance + pixels:
            nearest_edge = offset - np.sign(offset) * np.minimum(np.abs(offset), half)
            line: dict[str, Any] = {
                "arrowstyle": "-",
                "color": colours[name],
                "linewidth": 0.6,
                "shrinkA": 0,
            }
            axes.annotate("", xytext=nearest_edge / pixels, arrowprops=line, **style)


def _best_offset(
    point: np.ndarray, half: np.ndarray, clearance: float, taken: Sequence[Bbox], inside: Bbox
) -> np.ndarray:
    offsets = np.array(list(_offsets(*half, clearance)))
    return offsets[_costs(point + offsets, half, offsets, taken, inside).argmin()]


def _offsets(half_width: float, half_height: float, clearance: float) -> Iterable[np.ndarray]:
    """Candidate centres of a label relative to its point: sides, above and below, then rows further
    up and down."""
    side, row = clearance + half_width, 1.6 * half_height
    yield from (np.array([sign * side, 0.0]) for sign in (1, -1))
    yield from (np.array([0.0, sign * (clearance + half_height)]) for sign in (1, -1))
    for step in np.arange(0.5, 8, 0.5):
        yield from (np.array([x * side, y * step * row]) for x in (1, -1) for y in (1, -1))


def _costs(
    centres: np.ndarray,
    half: np.ndarray,
    offsets: np.ndarray,
    taken: Sequence[Bbox],
    inside: Bbox,
) -> np.ndarray:
    """Cost of a label at each of the centres: its overlap with what is there in label heights, plus
    a fraction of the distance. Leaving the axes costs the most."""
    low, high = centres - half, centres + half
    outside = np.maximum(inside.min - low, 0).sum(1) + np.maximum(high - inside.max, 0).sum(1)
    others = np.array([box.extents for box in taken])
    common = np.minimum(high[:, None], others[:, 2:]) - np.maximum(low[:, None], others[:, :2])
    overlap = np.where((common >= 0).all(-1), common.sum(-1), 0.0).sum(1)
    distance = np.hypot(*offsets.T)
    return (20 * outside + 3 * overlap + 0.2 * distance) / (2 * half[1]) + np.where(
        offsets[:, 0] > 0, 0.0, 0.3
    )


def _error_bars(axes: Axes, pixels: float) -> list[Bbox]:
    boxes = []
    for container in axes.containers:
        if isinstance(container, ErrorbarContainer):
            segments = [segment for lines in container.lines[2] for segment in lines.get_segments()]
            boxes += [
                Bbox(axes.transData.transform(segment)).padded(pixels) for segment in segments
            ]
    return [Bbox.from_extents(box.xmin, box.ymin, box.xmax, box.ymax) for box in boxes]


def _around(centre: np.ndarray, half_width: float, half_height: float) -> Bbox:
    x, y = centre
    return Bbox.from_extents(x - half_width, y - half_height, x + half_width, y + half_height)
