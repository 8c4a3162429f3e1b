"""Tables of results.json: rows are methods in the same order throughout, cells carry their error, headers their unit.

A table is data (`Table`) with two faces: aligned markdown, which reads as well in a terminal, and HTML in report.py.
"""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from kafjax.core.text import visible
from kafjax.evaluation.cost import OTHER, STAGES, TOTAL
from kafjax.evaluation.error_budget import CAUSES
from kafjax.evaluation.results import ALPHA, MARGIN, RETENTION, headline, splits_of

WIDTH = 160
NONE = "-"  # does not apply, or was not measured
PENDING = "…"
COMPARABLE = {  # by the verdict on the accuracies of a trained and a retrieving method
    "greater": "no: trained is better",
    "less": "no: retrieval is better",
    "equivalent": "yes: equal",
    "undecided": "yes: no difference shown",
}


@dataclasses.dataclass(frozen=True)
class Table:
    """`rows[i][j]` belongs to `headers[j]`. The first column is left-aligned, the others right-aligned."""

    title: str
    headers: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()


Column = tuple[str, Callable[[Mapping[str, Any]], str]]


def number(value: float | None, digits: int = 3) -> str:
    """About three significant digits without an exponent: 0.0123, 1.23, 12.3, 1,234. `-` for None."""
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
    return value if interval["low"] is None else f"{value} [{100 * interval['low']:{sign}.0f}, {100 * interval['high']:{sign}.0f}]"


def ratio(interval: Mapping[str, Any] | None) -> str:
    """A factor with its interval, `1.42 [1.31, 1.55]`."""
    if interval is None or interval["value"] is None:
        return NONE
    value = number(interval["value"])
    return value if interval["low"] is None else f"{value} [{number(interval['low'])}, {number(interval['high'])}]"


def quality_table(results: Mapping[str, Any]) -> Table:
    """Tabulates what each method learnt and what it forgot."""
    splits = splits_of(results)
    columns: list[Column] = [(f"{split} %{_n(results, split)}", _percent_of(split)) for split in splits if split != RETENTION]
    if (first := headline(splits)) is not None:
        # Containment also counts an answer that goes on past the right one: the stricter scores stand beside the headline.
        columns.insert(1, ("EM / F1 %", lambda method: _matches(method["quality"], first)))
    if RETENTION in splits:
        columns.append((f"{RETENTION} %{_n(results, RETENTION)}", _percent_of(RETENTION)))
    if _has(results, f"{RETENTION}_change"):
        columns.append(("change, points", lambda method: percent(method["quality"].get(f"{RETENTION}_change"), signed=True)))
    if _has(results, "perplexity_ratio"):
        columns.append(("perplexity / base", lambda method: ratio(method["quality"].get("perplexity_ratio"))))
    meaning = {
        "untrained": "untrained (the headline): subjects of which only documents were trained, no questions",
        "paraphrase": "paraphrase: facts whose questions were trained, in unseen wording",
        "seen": "seen: trained questions asked again",
        RETENTION: "retention: other facts, which the base model knows",
    }
    notes = [
        "Correct: an accepted answer stands in the reply's first line as whole words, case, punctuation and articles aside. "
        "EM / F1: SQuAD's exact match and token F1 of the column before; their intervals are in a table of their own.",
        "; ".join(meaning[split] for split in splits if split in meaning).capitalize() + ".",
        "Change: of retention, paired with the base model. Perplexity: on held-out text, over the base model's.",
        "[low, high]: 95% interval over questions (Wilson; change: Bonett-Price for pairs) or texts (perplexity: BCa bootstrap).",
    ]
    return _method_table("Quality and forgetting", results, columns, notes)


def _matches(quality: Mapping[str, Any], split: str) -> str:
    found = [quality.get(f"{split}_{metric}") for metric in ("exact_match", "f1")]
    return NONE if None in found else " / ".join(percent({**interval, "low": None}) for interval in found if interval is not None)


def matches_table(results: Mapping[str, Any]) -> Table:
    """Exact match and F1 of each split."""
    names = (("exact_match", "EM"), ("f1", "F1"))
    columns = [(f"{split} {label} %", _percent_of(f"{split}_{key}")) for split in splits_of(results) for key, label in names]
    return _method_table("Exact match and F1", results, columns, ["SQuAD's exact match (EM) and token F1 on the reply's first line."])


def retrieval_table(results: Mapping[str, Any]) -> Table:
    """Retrieval by itself, and perplexity on held-out text."""
    names = (("recall_at_k", "recall@k"), ("mrr", "MRR"))
    columns: list[Column] = [(f"{label} %{_n(results, key)}", _percent_of(key)) for key, label in names if _has(results, key)]
    if _has(results, "perplexity"):
        columns.append((f"perplexity{_n(results, 'perplexity')}", lambda method: ratio(method["quality"].get("perplexity"))))
    notes = [
        "Recall@k: a gold passage is in the prompt. MRR: mean reciprocal rank of the first gold passage. "
        "Perplexity: exp of the mean negative log-likelihood per token of held-out texts."
    ]
    return _method_table("Retrieval and perplexity", results, columns, notes)


def learning_cost_table(results: Mapping[str, Any]) -> Table:
    """Tabulates the cost of each method before the first query."""
    columns: list[Column] = [
        ("trained parameters", lambda m: number(m["cost"]["trainable_parameters"])),
        ("tokens", lambda m: number(m["cost"]["train_tokens"])),
        ("train s", lambda m: number(m["cost"]["train_seconds"])),
        ("index s", lambda m: number(m["cost"]["index_seconds"])),
        ("TFLOP formula", _scaled("train_flops_formula", 1e12)),
        ("TFLOP measured", _scaled("train_flops_measured", 1e12)),
        ("optimizer MB", _scaled("optimizer_bytes", 1e6)),
        ("peak memory GB", _scaled("peak_memory_bytes", 1e9)),
        ("keep MB", _scaled("artifact_bytes", 1e6)),
    ]
    notes = [
        "Tokens: all passes over the training data. Formula: 6N a token for full, 4N for LoRA, plus attention and logits. "
        "Measured: XLA's count for the compiled step. Keep: bytes for this corpus beside the base model. MB = 10^6 bytes."
    ]
    return _method_table("Cost of learning and keeping", results, columns, notes)


def query_cost_table(results: Mapping[str, Any]) -> Table:
    """Tabulates the cost of each method per query, with the latency of its stages."""
    present = {stage for method in results["methods"].values() for stage in method["cost"]["latency_seconds"]}
    stages = [stage for stage in (TOTAL, *STAGES, OTHER) if stage in present] + sorted(present - {TOTAL, *STAGES, OTHER})
    columns: list[Column] = [
        ("LLM calls", lambda m: number(m["cost"]["llm_calls_per_query"])),
        ("prompt tokens", lambda m: number(m["cost"]["llm_tokens_per_query"]["prompt"])),
        ("of them cached", lambda m: number(m["cost"]["llm_tokens_per_query"]["cached"])),
        ("output tokens", lambda m: number(m["cost"]["llm_tokens_per_query"]["output"])),
        ("GFLOP", _scaled("query_flops_formula", 1e9)),
        *((f"{stage} ms", _latency_of(stage)) for stage in stages),
    ]
    latencies = [method["cost"]["latency_seconds"] for method in results["methods"].values()]
    timed = sorted({latency[TOTAL]["n"] for latency in latencies if latency})
    over = f" over {' or '.join(map(str, timed))} queries" if timed else ""
    notes = [
        f"Means per query; GFLOP by formula. Latency: p50 / p95{over}, one at a time, after compilation. "
        "Percentiles of stages do not add up to the total's."
    ]
    return _method_table("Cost of a query", results, columns, notes)


def break_even_table(results: Mapping[str, Any]) -> Table | None:
    """Shows after how many queries training has been cheaper than retrieval, and on which questions the two are comparable.

    A row for each split of each pair of a trained and a retrieving method. The counts of queries stand in the pair's first row.
    """
    if not results["break_even"]:
        return None
    rows = []
    for pair in results["break_even"]:
        queries = [_queries(pair, key) for key in ("queries_rule", "queries_flops", "queries_seconds")]
        lead = (f"{pair['trained']} vs {pair['retrieval']}", *queries)
        for split, accuracy in pair["accuracy"].items():
            difference = percent(accuracy["difference"], signed=True)
            rows.append((*lead, split, difference, _p_value(accuracy["p_value"]), COMPARABLE[accuracy["verdict"]]))
            lead = ("", "", "", "")
    headers = ("pair", "rule of thumb", "FLOPs", "seconds", "questions", "accuracy, points", "p", "comparable")
    notes = (
        "Queries after which training once has cost less than retrieving each time. Rule of thumb: 3 D / (k L) for full, "
        "2 D / (k L) for LoRA (D training tokens, k L retrieved tokens a query). Never: a query saves nothing. "
        f"Comparable on a kind of questions unless accuracy differs (exact McNemar, p < {ALPHA}); equal: within {100 * MARGIN:.0f} points. "
        "Where one is better the other is no substitute at any price.",
    )
    return Table("Break-even, queries", headers, tuple(rows), notes)


def error_budget_table(results: Mapping[str, Any]) -> Table:
    """Tabulates the sources of right answers and the causes of wrong ones for each method, in percent of the knowledge questions."""
    budgets = results["error_budget"]
    causes = [cause for cause in CAUSES if any(cause in budget for budget in budgets.values())]
    rows = [
        (name, str(next(iter(budget.values()))["n"]), *(percent(budget.get(cause)) for cause in causes)) for name, budget in budgets.items()
    ]
    notes = ("Each question has one cause: " + "; ".join(f"{cause}: {CAUSES[cause]}" for cause in causes) + ".",)
    return Table("Error budget, % of knowledge questions", ("method", "n", *causes), tuple(rows), notes)


def comparison_tables(results: Mapping[str, Any]) -> list[Table]:
    """Shows paired differences between all methods, row minus column: a table for each split, the headline first."""
    splits = dict.fromkeys(pair["split"] for pair in results["comparisons"])
    return [_comparison_table(split, [pair for pair in results["comparisons"] if pair["split"] == split], results) for split in splits]


def _comparison_table(split: str, pairs: Sequence[Mapping[str, Any]], results: Mapping[str, Any]) -> Table:
    names = list(results["methods"])
    cells = {(a, a): "" for a in names}
    for pair in pairs:
        value, mark = pair["difference"]["value"], "*" if pair["p_holm"] < ALPHA else ""
        for a, b, sign in ((pair["a"], pair["b"], 1), (pair["b"], pair["a"], -1)):
            cells[a, b] = NONE if value is None else f"{100 * sign * value or 0.0:+.1f}{mark}"
    rows = tuple((a, *(cells[a, b] for b in names)) for a in names)
    notes = (f"Row minus column, in points. *: p < {ALPHA} in McNemar's exact test after Holm's correction for {len(pairs)} comparisons.",)
    return Table(f"Who is better on {split}", ("", *names), rows, notes)


def main_tables(results: Mapping[str, Any]) -> list[Table]:
    """The tables for the terminal, top to bottom."""
    tables = (quality_table, learning_cost_table, query_cost_table, error_budget_table, break_even_table)
    return [table for make in tables if (table := make(results)) is not None]


def all_tables(results: Mapping[str, Any]) -> list[Table]:
    """The tables for table.md and the report."""
    return [*main_tables(results), matches_table(results), retrieval_table(results), *comparison_tables(results)]


def to_markdown(table: Table) -> str:
    """Pipe table whose columns also line up as plain text, under its title and above its notes."""
    lines = [table.headers, *table.rows]
    widths = [max(len(_cell(line[column])) for line in lines) for column in range(len(table.headers))]
    rule = [":" + "-" * (widths[0] - 1), *("-" * (width - 1) + ":" for width in widths[1:])]

    def row(line: Sequence[str]) -> str:
        first, *rest = (_cell(cell) for cell in line)
        cells = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True))]
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
    """Writes a tabular with booktabs' rules; title and notes are its caption. Every text is escaped."""

    def row(line: Sequence[str]) -> str:
        return " & ".join(" ".join(visible(cell).split()).translate(_LATEX) for cell in line) + r" \\"

    caption = " ".join([f"{table.title}.", *table.notes]).translate(_LATEX)
    lines = [r"\begin{table}", r"\centering", rf"\caption{{{caption}}}", rf"\begin{{tabular}}{{l{'r' * (len(table.headers) - 1)}}}"]
    lines += [r"\toprule", row(table.headers), r"\midrule", *map(row, table.rows), r"\bottomrule", r"\end{tabular}", r"\end{table}"]
    return "\n".join(lines) + "\n"


def render(tables: Sequence[Table], footer: Sequence[str] = ()) -> str:
    """Tables one below the other as markdown, then the footer as a list."""
    bullets = "\n".join(textwrap.fill(visible(line), WIDTH, initial_indent="- ", subsequent_indent="  ") for line in footer)
    return "\n".join([*(to_markdown(table) for table in tables), bullets]).rstrip() + "\n"


def setting(results: Mapping[str, Any]) -> list[str]:
    """Lists the setting of a run: the machine with its versions, and the corpus, model, numeric type and seed."""
    environment, config = results["environment"], results["config"]
    cores = f"{environment['cores']} cores" if environment.get("cores") else None
    packages = environment.get("packages") or {}
    versions = [f"{name} {packages[name]}" for name in ("jax", "flax") if packages.get(name)]
    machine = [str(part) for part in (environment.get("device"), environment.get("processor"), cores, *versions) if part]
    run = [f"{key} {config[key]}" for key in ("corpus", "model", "profile", "dtype", "seed") if key in config]
    return [", ".join(parts) for parts in (machine, run) if parts]


_CODE = {"git_sha": "commit", "git_dirty": "uncommitted changes:", "weights": "weights", "processor": "processor", "python": "Python"}


def method_notes(results: Mapping[str, Any]) -> list[str]:
    """Lists the notes of the methods."""
    notes = [f"{name}: {method['note']}" for name, method in results["methods"].items() if method["note"]]
    if cut := {name: n for name, method in results["methods"].items() if (n := method.get("replies_cut"))}:
        of_methods = ", ".join(f"{name} {n}" for name, n in cut.items())
        limit = results["config"].get("max_new_tokens")
        notes.append(f"replies cut at --max_new_tokens={limit} before they ended: {of_methods}")
    return notes + [f"{name}: {other}" for name, other in _computed_otherwise(results).items()]


def _computed_otherwise(results: Mapping[str, Any]) -> dict[str, str]:
    """Notes arms of an earlier start that were computed by other code, on another machine or from other weights."""
    now, told = results["environment"], {}
    for name, method in results["methods"].items():
        if (then := method.get("environment")) is None:
            continue
        differing = {key: then.get(key) for key in _CODE if then.get(key) != now.get(key)}
        packages = then.get("packages") or {}
        differing |= {
            package: packages.get(package) for package, version in (now.get("packages") or {}).items() if packages.get(package) != version
        }
        if not then:
            told[name] = "computed by an earlier start, of which nothing is recorded"
        elif differing:
            told[name] = "computed by an earlier start with " + ", ".join(f"{_CODE.get(k, k)} {v}" for k, v in differing.items())
    return told


def _method_table(title: str, results: Mapping[str, Any], columns: Sequence[Column], notes: Sequence[str]) -> Table:
    rows = [(name, *(cell(method) for _, cell in columns)) for name, method in results["methods"].items()]
    rows += [(name, *(PENDING for _ in columns)) for name in results["pending"]]
    return Table(title, ("method", *(header for header, _ in columns)), tuple(rows), tuple(notes))


def _n(results: Mapping[str, Any], key: str) -> str:
    counts = {method["quality"][key]["n"] for method in results["methods"].values() if key in method["quality"]}
    return f" (n={counts.pop()})" if len(counts) == 1 else ""


def _has(results: Mapping[str, Any], key: str) -> bool:
    return any(key in method["quality"] for method in results["methods"].values())


def _percent_of(key: str) -> Callable[[Mapping[str, Any]], str]:
    return lambda method: percent(method["quality"].get(key))


def _scaled(key: str, unit: float) -> Callable[[Mapping[str, Any]], str]:
    return lambda method: number(None if method["cost"][key] is None else method["cost"][key] / unit)


def _latency_of(stage: str) -> Callable[[Mapping[str, Any]], str]:
    def cell(method: Mapping[str, Any]) -> str:
        seconds = method["cost"]["latency_seconds"].get(stage)
        return NONE if seconds is None else f"{number(1e3 * seconds['p50'])} / {number(1e3 * seconds['p95'])}"

    return cell


def _p_value(value: float) -> str:
    return "<0.001" if value < 0.001 else f"{value:.3f}"


def _queries(pair: Mapping[str, Any], key: str) -> str:
    if key not in pair:
        return NONE
    return "never" if pair[key] is None else number(pair[key])


def _cell(text: str) -> str:
    """A cell must stay on one line and inside its column."""
    return " ".join(visible(text).split()).replace("|", "\\|")
