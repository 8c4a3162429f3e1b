"""Tables, figures and the report, of a whole run and of one that has only begun."""

from __future__ import annotations

import base64
import collections
import csv
import dataclasses
import html.parser
import io
import json
import re
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
from PIL import Image

from kafjax.evaluation import comparison_tables, table
from kafjax.evaluation.answers import Answered, answers_section
from kafjax.evaluation.figures import draw_all, loss_curves
from kafjax.evaluation.report import write_report
from kafjax.evaluation.results import causes_of, collect

METRICS = [
    {"method": name, "step": step, "loss": 3 / (step + 1)}
    for name in ("lora", "full")
    for step in range(50)
]
METRICS += [
    {"method": "rag", "event": "indexed"},
    {"method": "lora", "step": 50, "loss": float("nan")},
]


def pipe_tables(text: str) -> list[list[str]]:
    return [block.splitlines() for block in re.findall(r"(?:^\|.*\|\n)+", text, flags=re.M)]


@pytest.mark.parametrize("which", ["results", "partial_results"])
def test_tables_line_up_fit_the_terminal_and_hold_every_method(which, request):
    results = request.getfixturevalue(which)
    text = table.render(comparison_tables.all_tables(results), comparison_tables.footer(results))
    assert max(len(line) for line in text.splitlines()) <= table.WIDTH
    for lines in pipe_tables(text):
        bars = [[i for i, letter in enumerate(line) if letter == "|"] for line in lines]
        assert all(columns == bars[0] for columns in bars)
    for shown in (
        comparison_tables.quality_table,
        comparison_tables.learning_cost_table,
        comparison_tables.query_cost_table,
    ):
        assert [row[0] for row in shown(results).rows] == [*results["methods"], *results["pending"]]


def test_methods_still_to_come_are_marked(partial_results):
    rows = {row[0]: row[1:] for row in comparison_tables.quality_table(partial_results).rows}
    assert set(rows["lora"]) == {table.PENDING}
    assert table.PENDING not in rows["rag"]
    assert comparison_tables.break_even_table(partial_results) is None


def test_cells_show_the_numbers_of_the_results(results):
    quality = comparison_tables.quality_table(results)
    cell = dict(
        zip(quality.headers, next(row for row in quality.rows if row[0] == "lora"), strict=True)
    )["paraphrase % (n=96)"]
    value, low, high = map(float, re.findall(r"[\d.]+", cell))
    stored = results["methods"]["lora"]["quality"]["paraphrase"]
    assert value == pytest.approx(100 * stored["value"], abs=0.05)
    assert (low, high) == pytest.approx((100 * stored["low"], 100 * stored["high"]), abs=0.5)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"),
        (0, "0"),
        (0.01234, "0.012"),
        (1.5, "1.50"),
        (12.34, "12.3"),
        (123.4, "123"),
        (100_270_080, "100,270,080"),
    ],
)
def test_numbers_keep_about_three_digits(value, text):
    assert table.number(value) == text


def test_a_method_name_cannot_break_the_table():
    text = table.to_markdown(table.Table("t", ("method", "n"), (("a|b\nc", "1"),)))
    (lines,) = pipe_tables(text)
    assert len(lines) == 3
    assert "a\\|b c" in lines[2]


@pytest.fixture(scope="module")
def figures(results, tmp_path_factory) -> dict[str, Path]:
    return draw_all(results, tmp_path_factory.mktemp("figures"), METRICS)


def test_figures_are_drawn_and_none_stays_open(figures):
    assert {path.stem for path in figures.values()} == {
        "quality_cost",
        "forgetting",
        "error_budget",
        "latency",
        "loss",
    }
    for path in figures.values():
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("L"))
        assert min(pixels.shape) > 400
        assert (pixels < 200).mean() > 0.002
    assert plt.get_fignums() == []


def test_a_step_that_a_resumed_run_did_twice_is_one_point_of_the_loss_curve():
    again = [row for row in METRICS if row["method"] == "lora" and 20 <= row["step"] < 30]
    curves = loss_curves([*METRICS, *again])
    plain = loss_curves(METRICS)
    assert [line.get_xydata().tolist() for line in curves.axes[0].lines] == [
        line.get_xydata().tolist() for line in plain.axes[0].lines
    ]
    assert all(len(line.get_xdata()) == 50 for line in curves.axes[0].lines)


def test_figures_of_a_run_that_has_begun(partial_results, tmp_path):
    paths = draw_all(partial_results, tmp_path)
    assert {path.stem for path in paths.values()} == {
        "quality_cost",
        "forgetting",
        "error_budget",
        "latency",
    }
    nothing = collect({}, config={}, environment={}, pending=["base"])
    assert draw_all(nothing, tmp_path) == {}


class Page(html.parser.HTMLParser):
    """Collects tags, text and addresses, and checks that tags are closed in order."""

    VOID = ("meta", "img", "br", "link", "input")

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.text, self.addresses, self.open = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.addresses += [value for name, value in attributes if name in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture
def hostile(arms):
    attack = "<script>alert('x')</script> & \"quoted\""
    rag = arms["rag"]
    predictions = [
        dataclasses.replace(p, answer=attack, question=attack, answers=(attack,))
        for p in rag.predictions
    ]
    return attack, dataclasses.replace(rag, predictions=predictions, note=attack)


def test_report_escapes_what_people_and_models_write(hostile, arms, figures, tmp_path):
    attack, rag = hostile
    results = collect(
        {"rag": rag},
        config={"corpus": attack},
        environment={"processor": attack},
        pending=[attack],
    )
    path = tmp_path / "report.html"
    texts = {passage: attack for p in rag.predictions for passage in p.passages}
    shown = {attack: next(iter(figures.values()))}
    write_report(
        path,
        results,
        title=attack,
        predictions={attack: rag.predictions},
        figures=shown,
        reproduce=attack,
        passages=texts,
    )
    page = Page(path.read_text(encoding="utf-8"))
    assert page.open == []
    assert not {"link", "iframe"} & set(page.tags)
    # The answers as JSON, and a program that is the same for every run.
    assert page.tags.count("script") == 2
    stored, program = re.findall(
        r"<script[^>]*>(.*?)</script>", path.read_text(encoding="utf-8"), re.DOTALL
    )
    assert "<" not in stored and attack not in program
    assert {row["answer"] for row in json.loads(stored)["rows"]} == {attack}
    assert sum(attack in text for text in page.text) > 10


def test_report_is_one_file_with_everything_in_it(results, arms, figures, tmp_path):
    path = tmp_path / "report.html"
    predictions = {name: arm.predictions for name, arm in arms.items()}
    write_report(
        path,
        results,
        title="A run",
        predictions=predictions,
        figures=figures,
        reproduce="make compare",
    )
    page = Page(path.read_text(encoding="utf-8"))
    assert page.open == []
    assert page.tags.count("img") == len(figures)
    kinds = ("data:image/png;base64,", "data:text/csv;base64,", "#part-")
    assert all(address.startswith(kinds) for address in page.addresses)
    text = " ".join(page.text)
    assert all(shown.title in text for shown in comparison_tables.all_tables(results))
    assert all(name in page.text for name in arms)
    assert "make compare" in text


def test_every_answer_can_be_looked_up(results, arms, tmp_path):
    predictions = {name: arm.predictions for name, arm in arms.items()}
    causes = causes_of(arms)
    groups = [Answered(of_arm, causes[name]) for name, of_arm in predictions.items()]
    section = answers_section(groups, {"p0.0": "Gold </script> text."})
    (stored,) = re.findall(r"id='answers'>(.*?)</script>", section, re.DOTALL)
    data = json.loads(stored)
    assert len(data["rows"]) == sum(map(len, predictions.values()))
    assert data["passages"] == {"p0.0": "Gold </script> text."}
    (file,) = re.findall(r"data:text/csv;base64,([^']+)'", section)
    rows = list(csv.DictReader(io.StringIO(base64.b64decode(file).decode())))
    assert [row["id"] for row in rows] == [row["id"] for row in data["rows"]]
    # Causes are those that the error budget counts.
    for name, budget in results["error_budget"].items():
        counted = collections.Counter(
            row["cause"] for row in rows if (row["method"], row["split"]) == (name, "untrained")
        )
        for cause, share in budget.items():
            assert counted[cause] == round(share["value"] * share["n"]), (name, cause)


def test_prompts_stand_in_the_report_word_for_word_each_line_once(arms):
    asked = [
        dataclasses.replace(p, prompts=(f"Question: a\nAnswer: b\n\n{p.question}", "\n</script>"))
        for p in arms["rag"].predictions
    ]
    section = answers_section([Answered(asked, run="a"), Answered(asked, run="b")], {})
    (stored,) = re.findall(r"id='answers'>(.*?)</script>", section, re.DOTALL)
    data = json.loads(stored)
    assert len(data["lines"]) == len(set(data["lines"]))
    for row, p in zip(data["rows"], [*asked, *asked], strict=True):
        texts = ["\n".join(data["lines"][at] for at in text) for text in row["prompts"]]
        assert texts == list(p.prompts) and row["run"] in "ab"
    (file,) = re.findall(r"data:text/csv;base64,([^']+)'", section)
    rows = list(csv.DictReader(io.StringIO(base64.b64decode(file).decode())))
    assert {row["run"] for row in rows} == {"a", "b"}


def test_control_characters_and_direction_overrides_reach_no_table_and_no_page(arms, tmp_path):
    odd = "\x1b[31mred\x07 \u202eabc"
    rag = dataclasses.replace(
        arms["rag"],
        note=odd,
        predictions=[dataclasses.replace(p, answer=odd) for p in arms["rag"].predictions],
    )
    results = collect({odd: rag}, config={"corpus": odd}, environment={"processor": odd})
    text = table.render(comparison_tables.all_tables(results), comparison_tables.footer(results))
    write_report(
        tmp_path / "report.html",
        results,
        title=odd,
        predictions={odd: rag.predictions},
        figures={},
        reproduce=odd,
    )
    for shown in (text, (tmp_path / "report.html").read_text(encoding="utf-8")):
        assert not set("\x1b\x07\u202e") & set(shown) and "\\x1b[31mred\\x07" in shown


def test_arms_that_other_code_has_computed_are_named():
    now = {
        "git_sha": "new",
        "git_dirty": False,
        "weights": "w1",
        "processor": "p",
        "packages": {"jax": "0.9", "optax": "1"},
    }
    then = {
        "base": now,
        "rag": {**now, "git_sha": "old"},
        "lora": {**now, "weights": "w0", "packages": {"jax": "0.8", "optax": "1"}},
        "full": {},
    }
    methods = {
        name: {"note": "said" if name == "base" else "", "environment": environment}
        for name, environment in then.items()
    }
    assert comparison_tables.method_notes({"methods": methods, "environment": now}) == [
        "base: said",
        "rag: computed by an earlier start with commit old",
        "lora: computed by an earlier start with weights w0, jax 0.8",
        "full: computed by an earlier start, of which nothing is recorded",
    ]


def test_replies_that_the_limit_cut_are_counted():
    methods = {
        "base": {"note": "", "replies_cut": 7},
        "rag": {"note": "", "replies_cut": 0},
        "lora": {"note": ""},
    }
    told = comparison_tables.method_notes(
        {"methods": methods, "environment": {}, "config": {"max_new_tokens": 12}}
    )
    assert told == [
        "replies cut at --max_new_tokens=12 before they ended: base 7; a higher limit lets them end"
    ]


def test_forgetting_of_prose_is_shown_in_nats(results):
    shown = comparison_tables.quality_table(results)
    column = shown.headers.index("prose, nats")
    cells = {row[0]: row[column] for row in shown.rows}
    ratio = results["methods"]["full"]["quality"]["perplexity_ratio"]
    expected = [f"{np.log(ratio[key]):+.2f}" for key in ("value", "low", "high")]
    assert cells["full"] == f"{expected[0]} [{expected[1]}, {expected[2]}]"
    assert cells["base"] == table.NONE
