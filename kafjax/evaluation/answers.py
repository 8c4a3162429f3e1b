"""The part of the report in which every answer can be looked up: filtered, sorted, and as CSV.

    <script type="application/json" id="answers">    rows, passages and lines of prompts, once each; "<" is escaped
    <script>                                         a constant program, which puts text into the page

What people and models wrote reaches the page through `textContent` alone, so it cannot become code.
Without a script the samples of the report remain.
"""

from __future__ import annotations

import base64
import csv
import dataclasses
import html
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

from kafjax.core.records import Prediction
from kafjax.core.text import visible
from kafjax.evaluation.prompts import Lines

COLUMNS = (
    "run",
    "method",
    "split",
    "id",
    "subject",
    "question",
    "answer",
    "accepted",
    "correct",
    "cause",
    "passages",
    "gold_passages",
    "prompt_tokens",
    "output_tokens",
    "cut",
)
_SHOWN = 50  # answers a page


@dataclasses.dataclass(frozen=True)
class Answered:
    """Answers of one method of a run. `causes` say why they are right or wrong, by the id of the
    question; `run` is a name, "" on the page of a single run."""

    predictions: Sequence[Prediction]
    causes: Mapping[str, str] = dataclasses.field(default_factory=dict)
    run: str = ""


def answers_section(groups: Sequence[Answered], passages: Mapping[str, str]) -> str:
    """Writes the section as HTML. `passages` are texts by id; ids are shown where a text is
    missing."""
    rows = [
        _row(prediction, group.causes.get(prediction.id, ""), group.run)
        for group in groups
        for prediction in group.predictions
    ]
    used = dict.fromkeys(id for row in rows for id in row["passages"])
    lines = Lines()
    prompts = [
        [lines.add(prompt) for prompt in prediction.prompts]
        for group in groups
        for prediction in group.predictions
    ]
    data = {
        "rows": [
            {**_visible(row), "prompts": asked} for row, asked in zip(rows, prompts, strict=True)
        ],
        "passages": {visible(id): visible(passages[id]) for id in used if id in passages},
        "lines": list(map(visible, lines.places)),
    }
    selects = "".join(
        f"<label>{label} <select id='by-{name}'><option value=''>all</option></select></label>"
        for name, label in (
            ("run", "run"),
            ("method", "method"),
            ("split", "questions"),
            ("cause", "cause"),
        )
    )
    order = "".join(
        f"<option value='{key}'>{html.escape(told)}</option>"
        for key, told in (
            ("", "as asked"),
            ("correct", "wrong first"),
            ("question", "by question"),
            ("prompt_tokens", "longest prompt first"),
        )
    )
    csv_file = base64.b64encode(_csv(rows).encode()).decode()
    return f"""<h2>All answers</h2>
<div class='answers'>
<div class='bar'>{selects}<label>order <select id='order'>{order}</select></label>
<label>words <input id='words' type='search'></label>
<a download='answers.csv' href='data:text/csv;base64,{csv_file}'>CSV</a></div>
<p class='notes' id='found'>These are shown by a script; the samples below need none.</p>
<div id='shown'></div>
<button id='more' type='button' hidden>more</button>
</div>
<script type='application/json' id='answers'>{_json(data)}</script>
<script>{_SCRIPT}</script>"""


def _row(prediction: Prediction, cause: str, run: str) -> dict[str, Any]:
    return {
        "run": run,
        "method": prediction.method,
        "split": prediction.split,
        "id": prediction.id,
        "subject": prediction.subject,
        "question": prediction.question,
        "answer": prediction.answer,
        "accepted": list(prediction.answers),
        "correct": prediction.correct,
        "cause": cause or ("right" if prediction.correct else "wrong"),
        "passages": list(prediction.passages),
        "gold_passages": list(prediction.gold_passages),
        "prompt_tokens": prediction.prompt_tokens,
        "output_tokens": prediction.output_tokens,
        "cut": prediction.cut,
    }


def _visible(row: Mapping[str, Any]) -> dict[str, Any]:
    """Makes control characters of a row's texts visible."""

    def shown(value: Any) -> Any:
        if isinstance(value, list):
            return [visible(one) for one in value]
        return visible(value) if isinstance(value, str) else value

    return {name: shown(value) for name, value in row.items()}


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Writes a row an answer; values of a list are joined by ` | `."""
    file = io.StringIO()
    writer = csv.writer(file)
    columns = COLUMNS if any(row["run"] for row in rows) else COLUMNS[1:]
    writer.writerow(columns)
    for row in rows:
        values = (row[name] for name in columns)
        writer.writerow([" | ".join(v) if isinstance(v, list) else v for v in values])
    return file.getvalue()


def _json(data: Any) -> str:
    """Writes JSON that can stand inside a script element: nothing in it ends the element."""
    return json.dumps(data, ensure_ascii=True, separators=(",", ":")).replace("<", "\\u003c")


_SCRIPT = (
    """
'use strict';
(() => {
  const data = JSON.parse(document.getElementById('answers').textContent);
  const get = (id) => document.getElementById(id);
  const filters = ['run', 'method', 'split', 'cause'];
  let count = PAGE;
  for (const name of filters) {
    const values = new Set(data.rows.map((row) => row[name]));
    for (const value of values) get('by-' + name).append(new Option(value, value));
    get('by-' + name).parentElement.hidden = values.size < 2;
  }
  const element = (kind, text, name) => {
    const made = document.createElement(kind);
    made.textContent = text;
    if (name) made.className = name;
    return made;
  };
  const card = (row) => {
    const made = element('div', '', 'sample ' + (row.correct ? 'right' : 'wrong'));
    const head = element('div', '');
    head.append(element('b', row.question));
    const from = [row.run, row.method, row.split, row.id].filter(Boolean);
    head.append(element('span', from.join(', '), 'soft'));
    const reply = element('div', '');
    reply.append(element('b', row.cause, 'mark'));
    reply.append(element('span', row.answer || 'empty reply'));
    if (row.cut) reply.append(element('span', ' (cut)', 'soft'));
    made.append(head, reply, element('div', 'accepted: ' + row.accepted.join(' | '), 'soft'));
    const tokens = row.prompt_tokens + ' tokens of prompt, ' + row.output_tokens + ' of reply';
    if (!row.passages.length && !row.prompts.length) {
      made.append(element('div', tokens, 'soft'));
      return made;
    }
    const more = element('details', '');
    const passages = row.passages.length ? row.passages.length + ' passages, ' : '';
    more.append(element('summary', passages + tokens));
    row.passages.forEach((id, i) => {
      const gold = row.gold_passages.includes(id) ? ' (gold)' : '';
      const text = data.passages[id] === undefined ? '' : data.passages[id];
      more.append(element('div', (i + 1) + gold + ' [' + id + '] ' + text, 'soft'));
    });
    row.prompts.forEach((places, i) => {
      const call = row.prompts.length > 1 ? ' of call ' + (i + 1) : '';
      more.append(element('div', 'prompt' + call + ', word for word:', 'soft'));
      more.append(element('pre', places.map((at) => data.lines[at]).join('\\n')));
    });
    made.append(more);
    return made;
  };
  const show = () => {
    const words = get('words').value.toLowerCase().split(' ').filter(Boolean);
    const chosen = data.rows.filter((row) => {
      const text = (row.question + ' ' + row.answer + ' ' + row.id).toLowerCase();
      return filters.every((name) => !get('by-' + name).value || get('by-' + name).value === row[name])
        && words.every((word) => text.includes(word));
    });
    const key = get('order').value;
    if (key === 'correct') chosen.sort((a, b) => a.correct - b.correct);
    if (key === 'question') chosen.sort((a, b) => a.question.localeCompare(b.question));
    if (key === 'prompt_tokens') chosen.sort((a, b) => b.prompt_tokens - a.prompt_tokens);
    const right = chosen.filter((row) => row.correct).length;
    get('found').textContent = chosen.length + ' answers, ' + right + ' right';
    get('shown').replaceChildren(...chosen.slice(0, count).map(card));
    get('more').hidden = chosen.length <= count;
  };
  const anew = () => { count = PAGE; show(); };
  for (const id of [...filters.map((name) => 'by-' + name), 'order']) {
    get(id).addEventListener('change', anew);
  }
  get('words').addEventListener('input', anew);
  get('more').addEventListener('click', () => { count += PAGE; show(); });
  show();
})();
"""
).replace("PAGE", str(_SHOWN))
