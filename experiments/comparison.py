"""One arm of a comparison after the other: learn, answer, measure, write down. What is finished is
read, not run again."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.latency import alone
from kafjax.core.errors import UserError
from kafjax.core.progress import Progress, say
from kafjax.core.records import Corpus, Prediction, Question
from kafjax.core.rundir import Run, read_jsonl, read_object, write_atomic, write_json, write_jsonl
from kafjax.core.schema import read, read_rows
from kafjax.core.text import shortened
from kafjax.corpus import is_dealt
from kafjax.evaluation import comparison_tables, figures, table
from kafjax.evaluation.cost import Cost, TokensPerQuery, latency_summary, query_flops
from kafjax.evaluation.prompts import read_prompts, write_prompts
from kafjax.evaluation.report import write_report
from kafjax.evaluation.results import RETENTION, Arm, as_one_split, causes_of, collect
from kafjax.methods import BASE, Lab, Method, open_method, parts, retention
from kafjax.methods.oracle import Oracle
from kafjax.training import discard_checkpoints
from kafjax.training.memory import PeakMemory

PROMPTS = "prompts.json"
"""File beside an arm's predictions with what the model was asked, word for word."""


def run_arm(lab: Lab, name: str, n_latency: int, base: Arm | None, n_realign: int = 0) -> Arm:
    """Runs one method from end to end. `n_realign`: see `retention.examine`."""
    method = open_method(lab, name)
    say(name, method.activity)
    method.learn()
    questions = method.questions()
    if not questions:
        say(name, "no question of this corpus names a passage that answers it: nothing to measure")
    with (
        PeakMemory() as peak,
        Progress(name, len(questions), unit="question", text="answering") as bar,
    ):
        predictions = method.answer(questions, bar.advance)
    if base is not None and method.params is lab.params:
        nll, tokens = base.held_out_nll, base.held_out_tokens
    else:
        told = "perplexity of held-out text"
        with Progress(name, len(lab.corpus.held_out_texts), unit="text", text=told) as bar:
            nll, tokens = lab.held_out_nll(method.params, bar.advance)
    latencies = _latencies(method, [q for q in questions if q.split != RETENTION], n_latency)
    cost = _with_queries(method.cost(), predictions, latencies, lab, peak.n_bytes)
    predictions = retention.examine(method, predictions, n_realign)
    return Arm(
        predictions, cost, nll, tokens, _oracle_of_misses(method, predictions, lab), method.note
    )


def _latencies(method: Method, questions: Sequence[Question], n: int) -> list[dict[str, float]]:
    """Seconds of each stage of single queries, as a user would wait for them once their programs
    are compiled."""
    by_length = sorted(questions, key=lambda q: len(q.text))
    chosen = by_length[:: max(1, len(by_length) // n)][:n] if n else []
    latencies = []
    told = "one at a time, for the latency"
    with Progress(method.name, len(chosen), unit="query", text=told) as bar:
        for question in chosen:
            latencies.append(alone(method, question))
            bar.advance(1)
    return latencies


def _with_queries(
    cost: Cost,
    predictions: Sequence[Prediction],
    latencies: Sequence[Mapping[str, float]],
    lab: Lab,
    peak: int,
) -> Cost:
    """The bill of learning, completed by that of asking: means over the knowledge questions."""
    asked = [p for p in predictions if p.split != RETENTION] or list(predictions)

    def mean(field: str) -> float:
        return sum(getattr(p, field) for p in asked) / len(asked) if asked else 0.0

    tokens = TokensPerQuery(mean("prompt_tokens"), mean("cached_tokens"), mean("output_tokens"))
    return dataclasses.replace(
        cost,
        peak_memory_bytes=max(cost.peak_memory_bytes or 0, peak),
        llm_calls_per_query=mean("calls"),
        llm_tokens_per_query=tokens,
        query_flops_formula=query_flops(
            lab.shape, tokens.prompt, tokens.output, tokens.cached, calls=mean("calls")
        ),
        latency_seconds=latency_summary(latencies),
    )


def _oracle_of_misses(
    method: Method, predictions: Sequence[Prediction], lab: Lab
) -> list[Prediction]:
    """Answers of a hybrid's own weights from the gold passage alone, for the questions it missed
    with that passage in the prompt.

    Arms that read with the base model's weights have the oracle arm for this.
    """
    if not method.searches or method.params is lab.params:
        return []
    missed = {
        p.id
        for p in predictions
        if not p.correct and not set(p.passages).isdisjoint(p.gold_passages)
    }
    questions = [q for q in lab.corpus.questions if q.id in missed]
    if not questions:
        return []
    told = "missed ones, from the gold passage alone"
    with Progress(method.name, len(questions), unit="question", text=told) as bar:
        return Oracle(lab, "oracle", method.weights).answer(questions, bar.advance)


def clear_finished(run: Run) -> None:
    """Deletes the checkpoints of trainings whose result is saved: a start may have ended in
    between."""
    for record in run.file("artifacts").glob("*/learned.json"):
        discard_checkpoints(record.parent)


@dataclasses.dataclass(frozen=True)
class _StoredArm:
    """Contents of `arm.json`. Older releases noted no environment. A loss that was not finite is
    null."""

    cost: Cost
    held_out_nll: list[float | None]
    held_out_tokens: list[int]
    note: str
    environment: dict[str, Any] = dataclasses.field(default_factory=dict)


def save_arm(run: Run, name: str, arm: Arm) -> None:
    folder = run.file("arms") / name
    write_jsonl(folder / "predictions.jsonl", [p.to_json() for p in arm.predictions])
    write_prompts(folder / PROMPTS, {p.id: p.prompts for p in arm.predictions})
    write_jsonl(folder / "oracle.jsonl", [p.to_json() for p in arm.oracle])
    # Last: an arm with this file is finished.
    write_json(
        folder / "arm.json",
        {
            "cost": arm.cost.to_json(),
            "held_out_nll": list(arm.held_out_nll),
            "held_out_tokens": list(arm.held_out_tokens),
            "note": arm.note,
            "environment": dict(arm.environment),
        },
    )


def load_arm(run: Run, name: str) -> Arm | None:
    """The finished arm of an earlier start of this run, if there is one."""
    folder = run.file("arms") / name
    if not (folder / "arm.json").exists():
        return None
    again = f"delete {folder} to answer again"
    stored = read(_StoredArm, folder / "arm.json", fix=again)
    predictions, oracle = (
        read_rows(Prediction, folder / file, fix=again)
        for file in ("predictions.jsonl", "oracle.jsonl")
    )
    prompts = read_prompts(folder / PROMPTS, fix=again)
    return Arm(
        [dataclasses.replace(p, prompts=prompts.get(p.id, ())) for p in predictions],
        stored.cost,
        stored.held_out_nll,
        stored.held_out_tokens,
        oracle,
        stored.note,
        stored.environment,
    )


def refuse_other_questions(run: Run, arms: Mapping[str, Arm], corpus: Corpus) -> None:
    """Raises `UserError` if a finished arm was asked other questions than the corpus has now.

    Another release may word a generated corpus in another way, and paired tests need the same
    questions.
    """
    asked = {question.id: question.text for question in (*corpus.questions, *corpus.retention)}
    for name, arm in arms.items():
        for prediction in arm.predictions:
            if asked.get(prediction.id) != prediction.question:
                raise UserError(
                    f"{run.path}: {name} has answered '{shortened(prediction.question, 60, str)}', which this release's corpus "
                    f"does not ask; give the run another --name, or delete the folder"
                )


def write_results(
    run: Run,
    lab: Lab,
    names: Sequence[str],
    arms: Mapping[str, Arm],
    environment: Mapping[str, Any],
    command: str,
) -> dict[str, Any]:
    """Writes everything that the arms so far allow: results.json, table.md, predictions.jsonl,
    report.html; figures with the last arm.

    `names` are all arms asked for, in the order of the rows.
    """
    config = read_object(run.file("config.json"))
    pending = [name for name in names if name not in arms]
    arms = {name: arms[name] for name in names if name in arms}
    if all(parts(name)[0] == BASE for name in names) and is_dealt(lab.corpus):
        arms = as_one_split(arms)
    results = collect(arms, config=config, environment=environment, pending=pending)
    write_json(run.file("results.json"), results)
    write_atomic(
        run.file("table.md"),
        table.render(comparison_tables.all_tables(results), comparison_tables.footer(results)),
    )
    write_jsonl(
        run.file("predictions.jsonl"),
        [p.to_json() for arm in arms.values() for p in arm.predictions],
    )
    drawn = {} if pending else figures.draw_all(results, run.file("figures"), _metrics(run))
    write_report(
        run.file("report.html"),
        results,
        title=f"kafjax: {lab.corpus.name}, {config['model']}",
        predictions={name: arm.predictions for name, arm in arms.items()},
        figures=drawn,
        reproduce=command,
        passages={p.id: p.text for p in lab.corpus.passages},
        causes=causes_of(arms),
    )
    return results


def _metrics(run: Run) -> list[dict[str, Any]]:
    file = run.file("metrics.jsonl")
    return read_jsonl(file, skip_broken_tail=True) if file.exists() else []
