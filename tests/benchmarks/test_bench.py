"""The table of `make bench`, on sides that only sleep: targets, sides that differ, a package that is
missing."""

from __future__ import annotations

import json

import numpy as np
import pytest

from benchmarks import bench, bench_rows, ceilings
from benchmarks.bench_rows import Row
from benchmarks.processes import COLD, WARM, Job
from kafjax.core.errors import UserError

MOST = ceilings.Ceilings({"float32": 1e9, "bfloat16": 2e9}, 1e9)
OURS, SLOWER = (
    Job("tests.benchmarks.sides:sleeping", {"seconds": s, "result": [1.0, 2.0]})
    for s in (0.01, 0.1)
)
OTHER = Job("tests.benchmarks.sides:sleeping", {"seconds": 0.01, "result": [1.0, 3.0]})
MISSING = Job("tests.benchmarks.sides:missing")
BROKEN = Job("tests.benchmarks.sides:broken")


def row(name: str, peer: Job, **changes: object) -> Row:
    return Row(
        name, "a peer", OURS, peer, **{"target": 2.0, "check": bench_rows.same_tokens, **changes}
    )


@pytest.fixture
def results(tmp_path):
    rows = [
        row("ahead", SLOWER, share=0.5, timed=WARM),
        row("behind", SLOWER, target=1000.0, timed=COLD),
        row("differing", OTHER),
        row("without peer", MISSING),
        row("broken", BROKEN),
    ]
    return bench.run(rows, MOST, {"turns": 2}, tmp_path / "scratch", tmp_path / "out")


def test_table_tells_of_targets_and_of_each_row_without_a_ratio(results, tmp_path):
    ahead, behind, *others = (results["rows"][name] for name in results["rows"])
    assert ahead["ratio"]["value"] > 2 and len(ahead["ours"]["seconds"]) == 2
    assert ahead["ours"]["of_ceiling"] == pytest.approx(
        0.005 / np.median(ahead["ours"]["seconds"])  # 5e6 of 1e9 FLOP/s
    )
    assert all(row[side]["peak_bytes"] > 1e6 for row in (ahead, behind) for side in bench.SIDES)
    assert all("ratio" not in row for row in others)
    text = (tmp_path / "out" / "bench.md").read_text()
    lines = {line.split("|")[1].strip(): line for line in text.splitlines() if "a peer" in line}
    assert "2: met" in lines["ahead"] and "1000: missed" in lines["behind"]
    assert all("none" in lines[name] for name in ("differing", "without peer", "broken"))
    told = " ".join(text.split())
    assert (
        "differing: the sides do not do the same work: replies differ: [1. 2.] and [1. 3.]" in told
    )
    assert "without peer: no_such_package is not installed: pip install" in told
    assert "broken: tests.benchmarks.sides:broken has ended with code 1: ValueError: torn" in told
    assert json.loads((tmp_path / "out" / "bench.json").read_text())["rows"].keys() == lines.keys()


@pytest.mark.parametrize(
    ("pattern", "said"), [("decoode", "is found in no row; there are: a; b"), ("(", "no regular")]
)
def test_a_pattern_of_no_row_is_refused_with_the_names_there_are(pattern, said):
    with pytest.raises(UserError, match=said):
        bench.chosen([row("a", OTHER), row("b", OTHER)], pattern, quick=False, compare=False)


def test_quick_rows_exist_and_the_whole_comparison_is_asked_for(tmp_path):
    made = bench_rows.rows("folder", "float32", tmp_path, compiled=False)
    names = [row.name for row in made]
    assert len(set(names)) == len(names) and set(bench_rows.QUICK) < set(names)
    assert [r.name for r in bench.chosen(made, None, True, False)] == [
        name for name in names if name in bench_rows.QUICK
    ]
    assert [r.name for r in bench.chosen(made, None, False, False)] == names[:-1]
    assert [r.name for r in bench.chosen(made, None, False, True)] == names


def test_a_peer_that_computes_otherwise_is_told_apart():
    one = np.ones((2, 3), np.float32)
    near = one + np.float32(1e-6)
    bench_rows.same_logits(1e-3, one, near)
    bench_rows.same_vectors("float32", one, near)
    bench_rows.same_step(1e-3, np.array([2.0, 1.0]), np.array([2.0005, 1.0005]))
    bench_rows.same_runs(np.array([[2.0, 3.0], [1.0, 2.0]]), np.array([[2.0, 3.0], [1.1, 2.1]]))
    bench_rows.no_regret(lambda tokens: np.zeros(2), one, one)
    for differ in (
        lambda: bench_rows.same_logits(1e-3, one, 1.01 * one),
        lambda: bench_rows.same_vectors("float32", one, one + 1e-3),
        lambda: bench_rows.same_step(1e-3, np.array([2.0, 1.0]), np.array([2.01, 1.0])),
        lambda: bench_rows.same_step(1e-3, np.array([2.0, 1.0]), np.array([2.0, 1.1])),
        lambda: bench_rows.same_step(1e-3, np.array([np.nan, 1.0]), np.array([2.0, 1.0])),
        lambda: bench_rows.same_runs(np.array([[2.0], [2.0]]), np.array([[2.0], [1.0]])),
        lambda: bench_rows.no_regret(lambda tokens: np.array([0, 0.2]), one, one),
    ):
        with pytest.raises(bench_rows.Different):
            differ()


def test_the_table_replaces_what_stands_between_the_marks_of_a_page(tmp_path):
    file = tmp_path / "page.md"
    with pytest.raises(UserError, match="has no lines"):
        bench.with_table(file, "new")
    file.write_text(f"# Title\n{bench.MARKS[0]}\nold\n{bench.MARKS[1]}\nend\n")
    made = bench.with_table(file, f"| a |\n\n{'word ' * 40}\n- one\n- two")
    assert made.startswith("# Title\n<!-- bench -->\n\n| a |\n\nword") and "old" not in made
    assert made.endswith("- one\n\n- two\n\n<!-- /bench -->\nend\n")
    assert max(map(len, made.splitlines())) <= bench.PAGE_WIDTH
