"""Runs side by side: every method of every run, what differs between them, and nothing made up of
what is still to come."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest

from experiments import table
from experiments.configs.table import SideBySide
from kafjax.core.errors import UserError
from kafjax.evaluation.results import collect
from tests.evaluation.conftest import make_arm


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """`runs(name, methods, pending, **config)`: the folder of a comparison with those methods
    finished."""
    root = tmp_path_factory.mktemp("runs")

    def make(name, methods=("base", "rag"), pending=(), **config):
        folder = root / name
        folder.mkdir(exist_ok=True)
        record = {
            "methods": [*methods, *pending],
            "corpus": "docs",
            "model": "m",
            "mesh": name,
            **config,
        }
        (folder / "config.json").write_text(json.dumps(record))
        if methods:
            results = collect(
                {m: make_arm(m) for m in methods}, config=record, environment={}, pending=pending
            )
            (folder / "results.json").write_text(json.dumps(results))
        return str(folder)

    return make


def test_each_method_of_each_run_is_a_row_with_what_differs(runs, tmp_path, capsys):
    folders = [
        runs("k1", k=1),
        runs("k5", pending=("lora",), k=5),
        runs("k9", methods=(), pending=("rag",), k=9),
    ]
    out = tmp_path / "out"
    table.run(SideBySide(out=str(out)), folders)
    rows = list(csv.DictReader(io.StringIO((out / "table.csv").read_text())))
    assert [(row["run"], row["method"], row["k"]) for row in rows] == [
        *((folders[0], m, "1") for m in ("base", "rag")),
        *((folders[1], m, "5") for m in ("base", "rag", "lora")),
        (folders[2], "rag", "9"),
    ]
    stored = json.loads((Path(folders[0]) / "results.json").read_text())["methods"]["rag"]
    assert (
        float(rows[1]["correct"]) == stored["quality"]["untrained"]["value"]
        and rows[1]["split"] == "untrained"
    )
    assert float(rows[1]["forgetting"]) == stored["quality"]["retention_change"]["value"]
    assert float(rows[1]["index s"]) == stored["cost"]["index_seconds"]
    assert (
        rows[4]["correct"] == rows[5]["correct"] == ""
        and "model" not in rows[0]
        and "mesh" not in rows[0]
    )
    assert (out / "quality.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "table.md").read_text() in capsys.readouterr().out


def test_what_is_no_one_number_is_not_drawn(runs, tmp_path):
    two = table.rows_of([Path(runs("a", k=1, epochs=2)), Path(runs("b", k=2, epochs=3))])
    words = table.rows_of([Path(runs("c", retriever="dense")), Path(runs("d", retriever="hybrid"))])
    assert list(two[0].settings) == ["k", "epochs"] and list(words[0].settings) == ["retriever"]
    assert (
        table.draw(two, tmp_path / "x.png") is None
        and table.draw(words, tmp_path / "x.png") is None
    )


def test_what_is_no_comparison_is_refused_by_name(runs, tmp_path):
    with pytest.raises(UserError, match="name the runs"):
        table.run(SideBySide(), [])
    with pytest.raises(UserError, match=f"{tmp_path} holds no run"):
        table.rows_of([tmp_path])
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"is no run of experiments\.compare"):
        table.rows_of([tmp_path])
    broken = Path(runs("broken"))
    (broken / "results.json").write_text('{"methods": {"rag": {}}, "pending": []}')
    with pytest.raises(UserError, match=r"results.json: methods.rag"):
        table.rows_of([broken])
