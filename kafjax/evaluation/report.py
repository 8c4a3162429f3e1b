"""report.html: one self-contained page. Inline CSS, figures as data URIs, no network; every text is
escaped. Only the section of all answers has a script (`answers`)."""

from __future__ import annotations

import base64
import html
import random
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kafjax.core.records import Prediction
from kafjax.core.rundir import write_atomic
from kafjax.core.text import visible
from kafjax.evaluation import comparison_tables
from kafjax.evaluation.answers import Answered, answers_section
from kafjax.evaluation.hints import hints
from kafjax.evaluation.results import RETENTION
from kafjax.evaluation.score import first_line
from kafjax.evaluation.style import CSS
from kafjax.evaluation.table import Table

SAMPLES = 4  # right and wrong answers shown of each method


def write_report(
    path: Path,
    results: Mapping[str, Any],
    *,
    title: str,
    predictions: Mapping[str, Sequence[Prediction]],
    figures: Mapping[str, Path],
    reproduce: str,
    passages: Mapping[str, str] | None = None,
    causes: Mapping[str, Mapping[str, str]] | None = None,
) -> None:
    """Writes the page.

    `figures` are {caption: PNG path} as from `figures.draw_all`, `reproduce` the commands that make
    this run again, `passages` the texts of the retrieved passages by id (ids are shown where a text
    is missing), `causes` why answers are right or wrong, by method and question (`causes_of`).
    """
    quality, *other_tables = map(html_table, comparison_tables.all_tables(results))
    setting, notes = comparison_tables.setting(results), comparison_tables.method_notes(results)
    body = [
        f"<h1>{_escape(title)}</h1><p class='sub'>{'<br>'.join(map(_escape, setting))}</p>",
        f"<p class='sub'>Still to come: {_escape(', '.join(results['pending']))}.</p>"
        if results["pending"]
        else "",
        quality,
        _list("<b>What stands out</b>", hints(results), "hints"),
        html_figures(figures),
        *other_tables,
        _list("<h2>Notes on the methods</h2>", notes, "methods"),
        answers_section(
            [Answered(rows, (causes or {}).get(name, {})) for name, rows in predictions.items()],
            passages or {},
        ),
        "<h2>Sample answers</h2>",
        *(_samples(name, rows, passages or {}) for name, rows in predictions.items()),
        f"<h2>Reproduce</h2><pre>{_escape(reproduce.strip())}</pre>",
        f"<div class='columns'><div><h2>Configuration</h2>{_mapping(results['config'])}</div>",
        f"<div><h2>Environment</h2>{_mapping(results['environment'])}</div></div>",
    ]
    write_page(path, title, body)


def write_page(path: Path, title: str, body: Sequence[str]) -> None:
    """Writes a page of parts that are HTML already. Raises `UserError` if it cannot be written."""
    head = [
        "<meta charset='utf-8'>",
        "<meta name='viewport' content='width=device-width, initial-scale=1'>",
        f"<title>{_escape(title)}</title>",
        f"<style>{CSS}</style>",
    ]
    lines = [
        "<!doctype html>",
        "<html lang='en'>",
        "<head>",
        *head,
        "</head>",
        "<body>",
        *_with_contents([part for part in body if part]),
        "</body>",
        "</html>",
    ]
    write_atomic(path, "\n".join(lines) + "\n")


def _with_contents(body: Sequence[str]) -> list[str]:
    """Gives each heading a name, and lists them behind the first part."""
    titles: list[str] = []

    def named(match: re.Match[str]) -> str:
        titles.append(match[1])
        return f"<h2 id='part-{len(titles)}'>{match[1]}</h2>"

    first, *rest = [re.sub(r"<h2>(.*?)</h2>", named, part) for part in body]
    links = "".join(f"<a href='#part-{n}'>{title}</a>" for n, title in enumerate(titles, 1))
    return [first, f"<nav>{links}</nav>", *rest]


def html_table(data: Table) -> str:
    """Writes a table under its title and above its notes."""
    head = "".join(f"<th>{_escape(header)}</th>" for header in data.headers)
    rows = "".join(
        f"<tr><th>{_escape(row[0])}</th>{''.join(map(_cell, row[1:]))}</tr>" for row in data.rows
    )
    notes = "".join(f"<p class='notes'>{_escape(note)}</p>" for note in data.notes)
    grid = f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
    return f"<h2>{_escape(data.title)}</h2><div class='scroll'>{grid}</div>{notes}"


def _cell(text: str) -> str:
    """A table cell: the value in full ink, its interval or second figure softer."""
    for separator in (" [", " / "):
        value, found, rest = text.partition(separator)
        if found:
            return f"<td>{_escape(value)}<small>{_escape(separator + rest)}</small></td>"
    return f"<td>{_escape(text)}</td>"


def _list(heading: str, lines: Sequence[str], kind: str) -> str:
    """A headed list, or nothing for no lines. `heading` is HTML."""
    items = "".join(f"<li>{_escape(line)}</li>" for line in lines)
    return f"<div class='{kind}'>{heading}<ul>{items}</ul></div>" if lines else ""


def html_figures(figures: Mapping[str, Path]) -> str:
    """Writes PNG files by their captions into the page."""
    shown = "".join(_figure(caption, file) for caption, file in figures.items())
    return f"<h2>Figures</h2><div class='figures'>{shown}</div>" if figures else ""


def _figure(caption: str, file: Path) -> str:
    data = base64.b64encode(file.read_bytes()).decode()
    return f"<figure><img alt='{_escape(caption)}' src='data:image/png;base64,{data}'><figcaption>{_escape(caption)}</figcaption></figure>"


def _samples(name: str, predictions: Sequence[Prediction], passages: Mapping[str, str]) -> str:
    """Right and wrong answers of one method to knowledge questions: a fixed random draw, the same
    questions whatever the scores."""
    shuffled = sorted(
        (p for p in predictions if p.split != RETENTION), key=lambda p: random.Random(p.id).random()
    )
    wrong = [p for p in shuffled if not p.correct]
    right = [p for p in shuffled if p.correct]
    shown = "".join(_sample(p, passages) for p in (*wrong[:SAMPLES], *right[:SAMPLES]))
    return f"<details><summary>{_escape(name)} <span>{len(right)} right, {len(wrong)} wrong</span></summary>{shown}</details>"


def _sample(prediction: Prediction, passages: Mapping[str, str]) -> str:
    verdict = "right" if prediction.correct else "wrong"
    reply = _escape(first_line(prediction.answer)) or "<i>empty reply</i>"
    lines = [
        f"<div><b>{_escape(prediction.question)}</b> <span class='soft'>{_escape(prediction.split)}, {_escape(prediction.id)}</span></div>",
        f"<div><b class='mark'>{verdict}</b>{reply}</div>",
        f"<div class='soft'>accepted: {_escape(' | '.join(prediction.answers))}</div>",
    ]
    for rank, id_ in enumerate(prediction.passages, 1):
        gold = " (gold)" if id_ in prediction.gold_passages else ""
        lines.append(
            f"<div class='soft'>passage {rank}{gold}: {_escape(passages.get(id_, id_))}</div>"
        )
    return f"<div class='sample {verdict}'>{''.join(lines)}</div>"


def _mapping(values: Mapping[str, Any]) -> str:
    rows = "".join(
        f"<tr><th>{_escape(key)}</th><td>{_value(value)}</td></tr>" for key, value in values.items()
    )
    return f"<div class='scroll'><table><tbody>{rows}</tbody></table></div>"


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        return "<br>".join(
            f"{_escape(key)} {_escape(one)}" for key, one in value.items() if one is not None
        )
    return _escape(", ".join(map(str, value)) if isinstance(value, list | tuple) else value)


def _escape(value: Any) -> str:
    return html.escape(visible(str(value)), quote=True)
