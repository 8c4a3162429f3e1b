"""kafjax beside its peers: one command, one table.

    python -m benchmarks.bench                         every row but the last; hours on two cores
    python -m benchmarks.bench --quick                 seven rows, two turns, peers not compiled; 5 minutes
    python -m benchmarks.bench --rows='decode|LoRA r8'    the rows that this pattern is found in
    python -m benchmarks.bench --compare               the whole default compare beside the same work by hand, too
    python -m benchmarks.bench --page=docs/bench.md    the table between the marks of that page, too

Both sides of a row get the same weights, data, precision and threads, and each runs in a process of
its own, which gives its peak memory. First their results are compared: losses and gradient norms,
logits, tokens or vectors. Sides that differ have no ratio, and the command ends with code 2. Then
they take turns, every other round backwards, with a rest between. A ratio is that of the median
times (above 1, kafjax is faster), with a 95% bootstrap over the turns.

Peers: fused AdamW, autocast and bfloat16 weights, SDPA, logits only where the loss looks, and
`torch.compile` where it is faster. The ceilings, products of large matrices and reading memory, are
measured first. Writes OUT/bench.json and .md, row by row.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import tempfile
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from benchmarks import ceilings
from benchmarks.bench_rows import COMPARE, Different, Row, rows
from benchmarks.processes import COLD, Measured, Missing, measure
from benchmarks.turns import listed, ratio
from kafjax import hub
from kafjax.core.errors import UserError, run_main
from kafjax.core.progress import say, waiting
from kafjax.core.rundir import environment, write_atomic, write_json
from kafjax.evaluation import table

MEMORY = 0.8
"""Target: our peak memory over the peer's, at most."""

PEERS = ("torch", "transformers", "peft", "sentence-transformers", "faiss-cpu")
SIDES = ("ours", "peer")
MARKS = ("<!-- bench -->", "<!-- /bench -->")
PAGE_WIDTH = 100


def define_flags() -> None:
    """Defines the flags. Not done at import: tests import several benchmarks, whose flags share
    names."""
    flags.DEFINE_string("model", "gemma3-270m", "gemma3-270m, or a folder of a decoder.")
    flags.DEFINE_string("rows", None, "Measure the rows that this regular expression is found in.")
    flags.DEFINE_boolean("quick", False, "Few rows, two turns, peers not compiled.")
    flags.DEFINE_boolean("compare", False, "Measure the whole default compare, too: an hour.")
    flags.DEFINE_enum("profile", "default", ["default", "smoke"], "Size of --compare.")
    flags.DEFINE_integer("turns", None, "Turns of each side (default: 7, or 2).", lower_bound=1)
    flags.DEFINE_integer("threads", os.cpu_count() or 1, "Cores of both sides.", lower_bound=1)
    flags.DEFINE_string(
        "page", None, f"Page that the table is written into, between {MARKS[0]} and {MARKS[1]}."
    )
    flags.DEFINE_string("out", "benchmarks/results", "Folder that the results are written to.")


def main(_: list[str]) -> None:
    values = flags.FLAGS
    if values.page:
        with_table(Path(values.page), "")  # refused now rather than after hours
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: values.threads])  # sides inherit it
    with tempfile.TemporaryDirectory() as temporary:
        scratch, model = Path(temporary), str(hub.folder_of(values.model).resolve())
        options = {"compiled": not values.quick, "profile": values.profile}
        made = rows(model, "float32", scratch, **options)
        names = [row.name for row in chosen(made, values.rows, values.quick, values.compare)]
        with waiting("machine", "measuring products and memory"):
            most = ceilings.measure(scratch)
        say("machine", told(most))
        made = rows(model, most.best_dtype, scratch, **options)
        settings = {"model": values.model, "threads": len(os.sched_getaffinity(0))}
        settings |= {
            "turns": values.turns or (2 if values.quick else 7),
            "quick": values.quick,
            "profile": values.profile,
        }
        kept = [row for row in made if row.name in names]
        results = run(kept, most, settings, scratch, Path(values.out))
    text = page(results)
    print(f"\n{text}")
    if values.page:
        write_atomic(Path(values.page), with_table(Path(values.page), text))
    if failed := [name for name, row in results["rows"].items() if row.get("failed")]:
        raise UserError(f"no ratio for {'; '.join(failed)}: see the notes under the table")


def chosen(made: Sequence[Row], pattern: str | None, quick: bool, compare: bool) -> list[Row]:
    """Rows to measure. Raises `UserError` for a pattern that is none or found in no row."""
    if pattern is not None:
        try:
            found = [row for row in made if re.search(pattern, row.name)]
        except re.error as error:
            raise UserError(f"--rows={pattern}: no regular expression: {error}") from error
        if not found:
            names = "; ".join(row.name for row in made)
            raise UserError(f"--rows={pattern} is found in no row; there are: {names}")
        return found
    kept = [row for row in made if row.quick or not quick]
    return [row for row in kept if compare or row.name != COMPARE]


def run(
    made: Sequence[Row],
    most: ceilings.Ceilings,
    settings: Mapping[str, Any],
    scratch: Path,
    out: Path,
) -> dict[str, Any]:
    """Measures rows and writes the results after each. Returns what OUT/bench.json holds."""
    results: dict[str, Any] = {
        "settings": settings,
        "ceilings": {"flops": most.flops, "bandwidth": most.bandwidth},
        "peers": {name: _version(name) for name in PEERS},
        "environment": environment(),
        "rows": {},
    }
    for row in made:
        results["rows"][row.name] = told_of = outcome(row, most, settings["turns"], scratch)
        say(row.name, reason(told_of) or f"ratio {table.ratio(told_of['ratio'])}")
        write_json(out / "bench.json", results)
        write_atomic(out / "bench.md", page(results))
    return results


def outcome(row: Row, most: ceilings.Ceilings, turns: int, scratch: Path) -> dict[str, Any]:
    """One row's figures, or why there are none: `missing` a package, or `failed`."""
    jobs = dict(zip(SIDES, (row.ours, row.peer), strict=True))
    folder = scratch / row.name.replace(" ", "_")
    told_of = {"against": row.against, "dtype": row.dtype, "target": row.target, "share": row.share}
    warmup = 0 if row.timed == COLD else 1
    turns = min(turns, row.most_turns)
    try:
        taken = measure(row.name, jobs, row.timed, turns, warmup, row.check, folder)
    except Missing as missing:
        return told_of | {"missing": str(missing)}
    except Different as error:
        return told_of | {"failed": f"the sides do not do the same work: {error}"}
    except UserError as error:
        return told_of | {"failed": str(error)}
    facts = dict(taken["ours"].facts)
    return told_of | {
        "facts": facts,
        "note": taken["peer"].facts.get("note"),
        **{name: side(taken[name], facts, row.dtype, most) for name in SIDES},
        "ratio": ratio(*(np.array(taken[name].seconds) for name in SIDES)),
        "memory": taken["ours"].peak / taken["peer"].peak,
    }


def side(
    measured: Measured, facts: dict[str, Any], dtype: str, most: ceilings.Ceilings
) -> dict[str, Any]:
    seconds = float(np.median(measured.seconds))
    return {
        "seconds": measured.seconds,
        "rate": facts.get("units", 1) / seconds,
        "peak_bytes": measured.peak,
        "of_ceiling": most.share(dtype, seconds, facts),
    }


def page(results: Mapping[str, Any]) -> str:
    """The table, with what it was measured on."""
    notes = [
        "Per second: tokens, texts or starts, median turn. Ratio: the peer's median time over ours "
        "[95% bootstrap over turns]. Memory: highest resident of each side's process, and ours over "
        f"the peer's, at most {MEMORY} wanted. Of the ceiling: the least time that the arithmetic, and "
        "in decoding the reading of the weights, takes at this machine's measured rates, over the time "
        "taken.",
        *(f"{name}: {why}" for name, row in results["rows"].items() if (why := reason(row))),
    ]
    headers = ("work", "against", "ours/s", "peer/s", "ratio", "at least")
    headers += ("MB, ours / peer", "memory", "of the ceiling, ours / peer", "peer's form")
    lines = tuple(cells(name, row) for name, row in results["rows"].items())
    shown = table.Table("kafjax beside its peers", headers, lines, tuple(notes))
    most = ceilings.Ceilings(**results["ceilings"])
    processor = results["environment"]["processor"]
    footer = [listed(results["settings"]), f"{processor}: {told(most)}", listed(results["peers"])]
    return table.render([shown], footer)


def with_table(file: Path, text: str) -> str:
    """The contents of a page with `text` between its marks, wrapped. Raises `UserError` for a page
    without them."""
    if not file.is_file() or any(mark not in file.read_text() for mark in MARKS):
        raise UserError(f"--page={file} has no lines {MARKS[0]} and {MARKS[1]} for the table")
    before, _, rest = file.read_text().partition(MARKS[0])
    after = rest.partition(MARKS[1])[2]
    wrapped = "\n\n".join(
        part if part.startswith("|") else textwrap.fill(part, PAGE_WIDTH)
        for part in text.replace("\n- ", "\n\n- ").split("\n\n")
    )
    return f"{before}{MARKS[0]}\n\n{wrapped}\n\n{MARKS[1]}{after}"


def cells(name: str, row: Mapping[str, Any]) -> tuple[str, ...]:
    target = f"{row['target']:g}"
    if "ratio" not in row:
        return (name, row["against"], *["-"] * 2, "none", target, *["-"] * 4)
    ours, peer = (row[name] for name in SIDES)
    share = "" if row["share"] is None else f" ({verdict(ours['of_ceiling'] >= row['share'])})"
    shares = " / ".join(
        "-" if s["of_ceiling"] is None else f"{s['of_ceiling']:.0%}" for s in (ours, peer)
    )
    return (
        name,
        row["against"],
        table.number(ours["rate"]),
        table.number(peer["rate"]),
        table.ratio(row["ratio"]),
        f"{target}: {verdict(row['ratio']['value'] >= row['target'])}",
        f"{ours['peak_bytes'] / 1e6:,.0f} / {peer['peak_bytes'] / 1e6:,.0f}",
        f"{row['memory']:.2f}: {verdict(row['memory'] <= MEMORY)}",
        shares + share,
        row["note"] or "-",
    )


def verdict(is_met: bool) -> str:
    return "met" if is_met else "missed"


def reason(row: Mapping[str, Any]) -> str:
    """Says why a row has no ratio; "" for one that has."""
    if "missing" in row:
        return f"{row['missing']} is not installed: pip install -e '.[test,bench]'"
    return row.get("failed", "")


def told(most: ceilings.Ceilings) -> str:
    """The ceilings in a line."""
    products = ", ".join(f"{dtype} {rate / 1e9:,.0f}" for dtype, rate in most.flops.items())
    return (
        f"products {products} GFLOP/s, reading {most.bandwidth / 1e9:.1f} GB/s; "
        f"the faster type is {most.best_dtype}"
    )


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    define_flags()
    run_main(main)
