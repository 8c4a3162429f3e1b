"""Tables of a comparison's results.json: rows are methods in the same order throughout, cells carry
their error, headers their unit."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from kafjax.core.records import RELATIONS
from kafjax.evaluation.clustered import FEW
from kafjax.evaluation.cost import OTHER, STAGES, TOTAL
from kafjax.evaluation.error_budget import CAUSES
from kafjax.evaluation.intervals import ALPHA, MARGIN
from kafjax.evaluation.results import (
    ALL,
    BASE,
    CONTROL,
    DEVELOPMENT,
    LIKELIEST,
    RAG,
    REALIGNED,
    RETENTION,
    headline,
    splits_of,
)
from kafjax.evaluation.table import NONE, PENDING, Table, number, percent, ratio

Column = tuple[str, Callable[[Mapping[str, Any]], str]]


COMPARABLE = {  # by the verdict on the accuracies of a trained and a retrieving method
    "greater": "no: trained is better",
    "less": "no: retrieval is better",
    "equivalent": "yes: equal",
    "undecided": "yes: no difference shown",
}


def quality_table(results: Mapping[str, Any]) -> Table:
    """Tabulates what each method learnt and what it forgot."""
    splits = splits_of(results)
    columns: list[Column] = [
        (f"{split} %{_n(results, split)}", _percent_of(split))
        for split in splits
        if split != RETENTION
    ]
    if (first := headline(splits)) is not None:
        # Containment also counts an answer that goes on past the right one: the stricter scores
        # stand beside the headline.
        columns.insert(1, ("EM / F1 %", lambda method: _matches(method["quality"], first)))
    if RETENTION in splits:
        columns.append((f"{RETENTION} %{_n(results, RETENTION)}", _percent_of(RETENTION)))
    if _has(results, f"{RETENTION}_change"):
        columns.append(
            (
                "change, points",
                lambda method: percent(method["quality"].get(f"{RETENTION}_change"), signed=True),
            )
        )
    if _has(results, "perplexity_ratio"):
        columns.append(
            ("prose, nats", lambda method: _nats(method["quality"].get("perplexity_ratio")))
        )
    meaning = {
        "untrained": "untrained (the headline): subjects of which only documents were trained, no questions",
        "paraphrase": "paraphrase: facts whose questions were trained, in unseen wording",
        "seen": "seen: trained questions asked again",
        ALL: "all (the headline): every question about the documents; nothing is trained, so none is set apart",
        DEVELOPMENT: "development: subjects like those of untrained, by which settings may be chosen",
        CONTROL: "control: subjects in no document, so that what is right there is guessed",
        RETENTION: "retention: other facts, of which the base model knows many",
    }
    notes = [
        "Correct: an accepted answer stands in the reply's first line as whole words, case, punctuation and articles aside. "
        "EM / F1: SQuAD's exact match and token F1 of the column before; their intervals are in a table of their own.",
        "; ".join(meaning[split] for split in splits if split in meaning).capitalize() + ".",
        "Change: of retention, paired with the base model. Prose: cross entropy of held-out texts in nats a token, less the base "
        "model's (the log of the ratio of perplexities).",
        "[low, high]: 95% interval over subjects (bootstrap of whole subjects, Wilson where each has one question or all agree) "
        "or texts (prose: BCa bootstrap). n=Q of S: Q questions about S subjects.",
    ]
    return _method_table("Quality and forgetting", results, columns, notes)


def retention_table(results: Mapping[str, Any]) -> Table | None:
    """Tabulates the retention suite, by relation and in all; None where it was not asked."""
    parts = [
        (f"{relation}{kind}", f"{RETENTION}_{relation}{key}")
        for relation in RELATIONS
        for kind, key in (("", ""), (", likeliest", f"_{LIKELIEST}"))
    ]
    parts += [
        ("all, said", RETENTION),
        ("all, likeliest", f"{RETENTION}_{LIKELIEST}"),
        ("all, realigned", f"{RETENTION}_{REALIGNED}"),
    ]
    columns = [
        (f"{label} %{_n(results, key)}", _percent_of(key))
        for label, key in parts
        if _has(results, key)
    ]
    if len(columns) < 2:
        return None
    notes = [
        "Said: in the reply. Likeliest: likelier than three wrong answers of its kind (by chance 25%). Realigned: said after "
        "the weights have learned a few questions about other countries: what comes back was out of form, not lost. "
        "To be compared with base's, which gains by them, too. "
        "Methods that retrieve answer with passages in the prompt, as forced."
    ]
    return _method_table("What is kept of other matters", results, columns, notes)


def _nats(perplexity_ratio: Mapping[str, Any] | None) -> str:
    """Change of the cross entropy, `+0.12 [+0.08, +0.15]`."""
    if perplexity_ratio is None or perplexity_ratio["value"] is None:
        return NONE
    value, *bounds = (
        f"{math.log(x):+.2f}" for key in ("value", "low", "high") if (x := perplexity_ratio[key])
    )
    return f"{value} [{', '.join(bounds)}]" if bounds else value


def _matches(quality: Mapping[str, Any], split: str) -> str:
    found = [quality.get(f"{split}_{metric}") for metric in ("exact_match", "f1")]
    return (
        NONE
        if None in found
        else " / ".join(
            percent({**interval, "low": None}) for interval in found if interval is not None
        )
    )


def matches_table(results: Mapping[str, Any]) -> Table:
    """Exact match and F1 of each split."""
    names = (("exact_match", "EM"), ("f1", "F1"))
    columns = [
        (f"{split} {label} %", _percent_of(f"{split}_{key}"))
        for split in splits_of(results)
        for key, label in names
    ]
    return _method_table(
        "Exact match and F1",
        results,
        columns,
        ["SQuAD's exact match (EM) and token F1 on the reply's first line."],
    )


def retrieval_table(results: Mapping[str, Any]) -> Table:
    """Retrieval by itself, and perplexity on held-out text."""
    names = (("recall_at_k", "recall@k"), ("mrr", "MRR"))
    columns: list[Column] = [
        (f"{label} %{_n(results, key)}", _percent_of(key))
        for key, label in names
        if _has(results, key)
    ]
    if _has(results, "perplexity"):
        columns.append(
            (
                f"perplexity{_n(results, 'perplexity')}",
                lambda method: ratio(method["quality"].get("perplexity")),
            )
        )
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
        ("compile s", lambda m: number(m["cost"].get("compile_seconds"))),
        ("index s", lambda m: number(m["cost"]["index_seconds"])),
        ("TFLOP formula", _scaled("train_flops_formula", 1e12)),
        ("useful", _scaled("train_flops_useful", 1e12)),
        ("executed", _scaled("train_flops_measured", 1e12)),
        ("optimizer MB", _scaled("optimizer_bytes", 1e6)),
        ("step GB", _scaled("train_memory_bytes", 1e9)),
        ("process GB", _scaled("peak_memory_bytes", 1e9)),
        ("keep MB", _scaled("artifact_bytes", 1e6)),
    ]
    notes = [
        "Tokens: all passes over the training data. Formula: 6N a token for full, 4N for LoRA, plus attention and logits. "
        "Useful and executed: XLA's count for the compiled step, TFLOP; executed with places of the loss that have no target. "
        "Step: what the compiled training step needs, by XLA. Process: highest of the process until then, which depends on what "
        "ran before. Keep: bytes for this corpus beside the base model. MB = 10^6 bytes."
    ]
    return _method_table("Cost of learning and keeping", results, columns, notes)


def query_cost_table(results: Mapping[str, Any]) -> Table:
    """Tabulates the cost of each method per query, with the latency of its stages."""
    present = {
        stage
        for method in results["methods"].values()
        for stage in method["cost"]["latency_seconds"]
    }
    stages = [stage for stage in (TOTAL, *STAGES, OTHER) if stage in present] + sorted(
        present - {TOTAL, *STAGES, OTHER}
    )
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
    """Shows after how many queries training has been cheaper than retrieval, and on which questions
    the two are comparable.

    A row for each split of each pair of a trained and a retrieving method. The counts of queries
    stand in the pair's first row.
    """
    if not results["break_even"]:
        return None
    rows = []
    for pair in results["break_even"]:
        queries = [
            _queries(pair, key) for key in ("queries_rule", "queries_flops", "queries_seconds")
        ]
        lead = (f"{pair['trained']} vs {pair['retrieval']}", *queries)
        for split, accuracy in pair["accuracy"].items():
            difference = percent(accuracy["difference"], signed=True)
            rows.append(
                (
                    *lead,
                    split,
                    difference,
                    _p_value(accuracy["p_value"]),
                    _comparable(accuracy),
                )
            )
            lead = ("", "", "", "")
    headers = (
        "pair",
        "rule of thumb",
        "FLOPs",
        "seconds",
        "questions",
        "accuracy, points",
        "p",
        "comparable",
    )
    notes = (
        "Queries after which training once has cost less than retrieving each time. Rule of thumb: 3 D / (k L) for full, "
        "2 D / (k L) for LoRA (D training tokens, k L retrieved tokens a query). Never: a query saves nothing. "
        "Seconds: [95% interval over the queries that were timed]. "
        f"Comparable on a kind of questions unless accuracy differs (sign flips of whole subjects, p < {ALPHA}); equal: within "
        f"{100 * MARGIN:.0f} points. Where one is better the other is no substitute at any price.",
    )
    return Table("Break-even, queries", headers, tuple(rows), notes)


def _comparable(accuracy: Mapping[str, Any]) -> str:
    n = accuracy["difference"]["n"]
    return COMPARABLE[accuracy["verdict"]] if n >= FEW else f"cannot be told: {n} subjects"


def error_budget_table(results: Mapping[str, Any]) -> Table:
    """Tabulates the sources of right answers and the causes of wrong ones for each method, in
    percent of the questions of the headline split."""
    budgets = results["error_budget"]
    causes = [cause for cause in CAUSES if any(cause in budget for budget in budgets.values())]
    numbers = {name: next(iter(budget.values()))["n"] for name, budget in budgets.items()}
    same = len(set(numbers.values())) == 1
    rows = [
        (
            name if same else f"{name} (n={numbers[name]})",
            *(percent(budget.get(cause)) for cause in causes),
        )
        for name, budget in budgets.items()
    ]
    notes = (
        "Each question has one cause: "
        + "; ".join(f"{cause}: {CAUSES[cause]}" for cause in causes)
        + ".",
    )
    title = f"Error budget, % of {headline(splits_of(results)) or ALL} questions"
    n = f" (n={next(iter(numbers.values()))})" if same else ""
    return Table(title + n, ("method", *causes), tuple(rows), notes)


def pairwise_tables(results: Mapping[str, Any]) -> list[Table]:
    """Shows the paired differences that were tested, row minus column: a table for each split, the
    headline first."""
    splits = dict.fromkeys(pair["split"] for pair in results["comparisons"])
    return [
        _pairwise_table(
            split, [pair for pair in results["comparisons"] if pair["split"] == split], results
        )
        for split in splits
    ]


def _pairwise_table(
    split: str, pairs: Sequence[Mapping[str, Any]], results: Mapping[str, Any]
) -> Table:
    names = list(results["methods"])
    against = list(dict.fromkeys(pair["b"] for pair in pairs))
    cells = {}
    for pair in pairs:
        value, mark = pair["difference"]["value"], _MARKS.get(pair["verdict"], "")
        for a, b, sign in ((pair["a"], pair["b"], 1), (pair["b"], pair["a"], -1)):
            cells[a, b] = NONE if value is None else f"{100 * sign * value or 0.0:+.1f}{mark}"
    rows = tuple((a, *(cells.get((a, b), "") for b in against)) for a in names)
    found = [pair["smallest"] for pair in pairs if pair.get("smallest") is not None]
    notes = (
        f"Row minus column, in points. *: p < {ALPHA} when whole subjects' signs are flipped, after Holm's correction for "
        f"{len(pairs)} comparisons. =: equal within {100 * MARGIN:.0f} points (two one-sided tests). Neither: not shown.",
        *_power(found),
    )
    return Table(f"Who is better on {split}", ("", *against), rows, notes)


_MARKS = {"greater": "*", "less": "*", "equivalent": "="}


def _power(smallest: Sequence[float]) -> list[str]:
    """Says how small a difference a comparison of this size finds, in four of five cases."""
    if not smallest:
        return [f"Fewer than {FEW} subjects can show no difference, whatever it is."]
    span = " to ".join(f"{100 * x:.0f}" for x in dict.fromkeys((min(smallest), max(smallest))))
    return [
        f"Smallest true difference that so many subjects show with a power of 80%, one comparison alone: {span} points, by pair."
    ]


def verdict(results: Mapping[str, Any]) -> str | None:
    """Says how the methods stand against rag, or else against base, on the headline split. None
    where nothing was compared."""
    split = headline({pair["split"] for pair in results["comparisons"]})
    pairs = [pair for pair in results["comparisons"] if pair["split"] == split]
    reference = next((name for name in (RAG, BASE) if any(p["b"] == name for p in pairs)), None)
    if reference is None:
        return None
    found: dict[str, list[str]] = {}
    for pair in pairs:
        if pair["b"] == reference:
            found.setdefault(_WORDS[pair["verdict"]], []).append(pair["a"])
    told = "; ".join(f"{word}: {', '.join(names)}" for word, names in found.items())
    return f"On {split}, against {reference}: {told}."


_WORDS = {
    "greater": "better",
    "less": "worse",
    "equivalent": "equal",
    "undecided": "no difference shown",
}


def main_tables(results: Mapping[str, Any]) -> list[Table]:
    """The tables for the terminal, top to bottom."""
    tables = (
        quality_table,
        retention_table,
        learning_cost_table,
        query_cost_table,
        error_budget_table,
        break_even_table,
    )
    return [table for make in tables if (table := make(results)) is not None]


def all_tables(results: Mapping[str, Any]) -> list[Table]:
    """The tables for table.md and the report."""
    return [
        *main_tables(results),
        matches_table(results),
        retrieval_table(results),
        *pairwise_tables(results),
    ]


def footer(results: Mapping[str, Any]) -> list[str]:
    """Lists what stands under the tables: the setting of the run and the notes of its methods."""
    return [*setting(results), *method_notes(results)]


def setting(results: Mapping[str, Any]) -> list[str]:
    """Lists the setting of a run: the machine with its versions, the corpus, model, numeric type and
    seed, and how often training tells a fact."""
    environment, config = results["environment"], results["config"]
    cores = f"{environment['cores']} cores" if environment.get("cores") else None
    packages = environment.get("packages") or {}
    versions = [f"{name} {packages[name]}" for name in ("jax", "flax") if packages.get(name)]
    machine = [
        str(part)
        for part in (environment.get("device"), environment.get("processor"), cores, *versions)
        if part
    ]
    run = [
        f"{key} {config[key]}"
        for key in ("corpus", "model", "profile", "dtype", "seed")
        if key in config
    ]
    return [", ".join(parts) for parts in (machine, run, tellings(config)) if parts]


def tellings(config: Mapping[str, Any]) -> list[str]:
    """Says how often training tells each fact of a generated corpus, and of how many subjects
    questions are trained: the same for all methods that train, but for regimes that say so."""
    epochs, documents = config.get("epochs"), config.get("documents")
    known = config.get("corpus") in GENERATED and epochs and documents and "subjects" in config
    if not known or config.get("steps"):
        return []
    return [
        f"each fact is told {epochs} times in training: {documents} documents in other words and order, "
        f"one of them a pass, {epochs} passes; {-(-config['subjects'] // 2)} subjects have trained questions"
    ]


GENERATED = ("biographies", "biographies-control", "factbook")
"""Corpora of which every document of a subject tells all of its facts."""
_CODE = {
    "git_sha": "commit",
    "git_dirty": "uncommitted changes:",
    "weights": "weights",
    "processor": "processor",
    "python": "Python",
}


def method_notes(results: Mapping[str, Any]) -> list[str]:
    """Lists the notes of the methods."""
    notes = [
        f"{name}: {method['note']}" for name, method in results["methods"].items() if method["note"]
    ]
    if cut := {
        name: n for name, method in results["methods"].items() if (n := method.get("replies_cut"))
    }:
        of_methods = ", ".join(f"{name} {n}" for name, n in cut.items())
        limit = results["config"].get("max_new_tokens")
        notes.append(
            f"replies cut at --max_new_tokens={limit} before they ended: {of_methods}; a higher limit lets them end"
        )
    return notes + [f"{name}: {other}" for name, other in _computed_otherwise(results).items()]


def _computed_otherwise(results: Mapping[str, Any]) -> dict[str, str]:
    """Notes arms of an earlier start that were computed by other code, on another machine or from
    other weights."""
    now, told = results["environment"], {}
    for name, method in results["methods"].items():
        if (then := method.get("environment")) is None:
            continue
        differing = {key: then.get(key) for key in _CODE if then.get(key) != now.get(key)}
        packages = then.get("packages") or {}
        differing |= {
            package: packages.get(package)
            for package, version in (now.get("packages") or {}).items()
            if packages.get(package) != version
        }
        if not then:
            told[name] = "computed by an earlier start, of which nothing is recorded"
        elif differing:
            told[name] = "computed by an earlier start with " + ", ".join(
                f"{_CODE.get(k, k)} {v}" for k, v in differing.items()
            )
    return told


def _method_table(
    title: str, results: Mapping[str, Any], columns: Sequence[Column], notes: Sequence[str]
) -> Table:
    rows = [
        (name, *(cell(method) for _, cell in columns))
        for name, method in results["methods"].items()
    ]
    rows += [(name, *(PENDING for _ in columns)) for name in results["pending"]]
    return Table(title, ("method", *(header for header, _ in columns)), tuple(rows), tuple(notes))


def _n(results: Mapping[str, Any], key: str) -> str:
    """Numbers of questions and of their subjects, where they are the same for all methods."""
    counts = {
        (method["quality"][key]["n"], method["quality"][key].get("subjects"))
        for method in results["methods"].values()
        if key in method["quality"]
    }
    if len(counts) != 1:
        return ""
    n, subjects = counts.pop()
    return f" (n={n})" if subjects in (None, n) else f" (n={n} of {subjects})"


def _has(results: Mapping[str, Any], key: str) -> bool:
    return any(key in method["quality"] for method in results["methods"].values())


def _percent_of(key: str) -> Callable[[Mapping[str, Any]], str]:
    return lambda method: percent(method["quality"].get(key))


def _scaled(key: str, unit: float) -> Callable[[Mapping[str, Any]], str]:
    return lambda method: number(
        None if method["cost"].get(key) is None else method["cost"][key] / unit
    )


def _latency_of(stage: str) -> Callable[[Mapping[str, Any]], str]:
    def cell(method: Mapping[str, Any]) -> str:
        seconds = method["cost"]["latency_seconds"].get(stage)
        return (
            NONE
            if seconds is None
            else f"{number(1e3 * seconds['p50'])} / {number(1e3 * seconds['p95'])}"
        )

    return cell


def _p_value(value: float) -> str:
    return "<0.001" if value < 0.001 else f"{value:.3f}"


def _queries(pair: Mapping[str, Any], key: str) -> str:
    if key not in pair:
        return NONE
    value, bounds = pair[key], pair.get(f"{key}_interval")
    shown = [_never(x) for x in (value, *(bounds or ()))]
    return shown[0] if not bounds else f"{shown[0]} [{shown[1]}, {shown[2]}]"


def _never(queries: float | None) -> str:
    return "never" if queries is None else number(queries)
