"""Tables as data, and what their cells show: numbers with about three digits, shares and factors
with their intervals.

A `Table` has three faces: aligned markdown, which reads as well in a terminal, LaTeX, and HTML in
report.py.
"""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from kafjax.core.text import visible

WIDTH = 160
NONE = "-"  # does not apply, or was not measured
PENDING = "…"


@dataclasses.dataclass(frozen=True)
class Table:
    """`rows[i][j]` belongs to `headers[j]`. The first column is left-aligned, the others
    right-aligned."""

    title: str
    headers: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()


def number(value: float | None, digits: int = 3) -> str:
    """About three significant digits without an exponent: 0.0123, 1.23, 12.3, 1,234. `-` for
    None."""
    if value is None:
        return NONE
    if value == 0:
        return "0"
    for limit, decimals in ((100, digits - 3), (10, digits - 2), (1, digits - 1)):
        if abs(value) >= limit:
            return f"{value:,.{max(decimals, 0)}f}"
    return f"{value:.{digits - 1}g}"


def percent(interval: Mapping[str, Any] | None, *, signed: bool = False) -> str:
    """A share in percent with its interval, `92.7 [86, 96]`; signed for differences in points."""
    if interval is None or interval["value"] is None:
        return NONE
    sign = "+" if signed else ""
    value = f"{100 * interval['value']:{sign}.1f}"
    return (
        value
        if interval["low"] is None
        else f"{value} [{100 * interval['low']:{sign}.0f}, {100 * interval['high']:{sign}.0f}]"
    )


def ratio(interval: Mapping[str, Any] | None) -> str:
    """A factor with its interval, `1.42 [1.31, 1.55]`."""
    if interval is None or interval["value"] is None:
        return NONE
    value = number(interval["value"])
    return (
        value
        if interval["low"] is None
        else f"{value} [{number(interval['low'])}, {number(interval['high'])}]"
    )


def to_markdown(table: Table) -> str:
    """Pipe table whose columns also line up as plain text, under its title and above its notes."""
    lines = [table.headers, *table.rows]
    widths = [
        max(len(_cell(line[column])) for line in lines) for column in range(len(table.headers))
    ]
    rule = [":" + "-" * (widths[0] - 1), *("-" * (width - 1) + ":" for width in widths[1:])]

    def row(line: Sequence[str]) -> str:
        first, *rest = (_cell(cell) for cell in line)
        cells = [
            first.ljust(widths[0]),
            *(cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True)),
        ]
        return f"| {' | '.join(cells)} |"

    body = "\n".join([row(table.headers), row(rule), *(row(line) for line in table.rows)])
    notes = "\n\n".join(textwrap.fill(note, WIDTH) for note in table.notes)
    return "\n\n".join(part for part in (f"### {table.title}", body, notes) if part) + "\n"


_LATEX = str.maketrans(
    {
        **{c: f"\\{c}" for c in "&%$#_{}"},
        **{"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"},
        **{"<": r"\textless{}", ">": r"\textgreater{}", PENDING: r"\dots{}"},
    }
)


def to_latex(table: Table) -> str:
    """Writes a tabular with booktabs' rules; title and notes are its caption. Every text is
    escaped."""

    def row(line: Sequence[str]) -> str:
        return (
            " & ".join(" ".join(visible(cell).split()).translate(_LATEX) for cell in line) + r" \\"
        )

    caption = " ".join([f"{table.title}.", *table.notes]).translate(_LATEX)
    lines = [
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{caption}}}",
        rf"\begin{{tabular}}{{l{'r' * (len(table.headers) - 1)}}}",
    ]
    lines += [
        r"\toprule",
        row(table.headers),
        r"\midrule",
        *map(row, table.rows),
        r"\bottomrule",
        r"\end{tabular}",
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"


def render(tables: Sequence[Table], footer: Sequence[str] = ()) -> str:
    """Tables one below the other as markdown, then the footer as a list."""
    bullets = "\n".join(
        textwrap.fill(visible(line), WIDTH, initial_indent="- ", subsequent_indent="  ")
        for line in footer
    )
    return "\n".join([*(to_markdown(table) for table in tables), bullets]).rstrip() + "\n"


def _cell(text: str) -> str:
    """A cell must stay on one line and inside its column."""
    return " ".join(visible(text).split()).replace("|", "\\|")
