"""Ablates the number of passages in the prompt. Asks the same questions with 0, 1, 2, ... of them:
one command, one table, one figure.

    python -m experiments.ablate_depth                                       rag over invented biographies
    python -m experiments.ablate_depth --depths=0,1,5 --n_questions=50       a first look, in a minute or two
    python -m experiments.ablate_depth --corpus=DIR --retriever=hybrid       your own documents, found by meaning and by words
    python -m experiments.ablate_depth --reranker=FOLDER                     the same, read again by a cross-encoder
    python -m experiments.ablate_depth --method=lora+rag                     with weights that are trained first

The first table has a row for each depth: accuracy, recall@k, MRR and nDCG, and the paired
difference to k=1 and to the best depth; the second one prompt tokens and latency. Intervals and
tests take the questions about one subject as one observation.

One prefill serves all depths. Passages stand in the order of their rank, the best first, so that
the prompt with 5 passages begins like the one with 20; a question branches off at each depth and
gets the reply that it would get alone. (experiments.compare has the best passage last, next to the
question, so its numbers differ.) Worked examples are the same at every depth, k=0 included.
--latency_queries questions are asked alone at each depth, for the latency, and their replies are
compared with the shared ones.

A last table puts the passage with the answer at each place among --places of them, and leaves it
out: does the model prefer a place, does it abstain, or copy a wrong passage?

The run's folder, runs/NAME, holds config.json, predictions.jsonl (every answer), results.json,
table.md and depth.png. The same command again goes on where a broken run stopped.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments import build, configs
from experiments.compiling import compiling
from experiments.configs import AblateDepth
from kafjax import hub
from kafjax.core.errors import UserError
from kafjax.core.progress import Progress, say
from kafjax.core.records import Passage, Prediction, Question
from kafjax.core.rundir import (
    Run,
    environment,
    find_run,
    open_run,
    write_atomic,
    write_json,
    write_jsonl,
)
from kafjax.core.schema import Amount, Count, read, read_rows
from kafjax.corpus import open_corpus
from kafjax.evaluation import depth, table
from kafjax.evaluation.results import headline
from kafjax.generation import Sampling
from kafjax.hub.text import Prompt
from kafjax.methods import BASE, Lab, open_method, parts
from kafjax.methods.rag import RAG, Found
from kafjax.prompts import prompt
from kafjax.retrieval import Hit
from kafjax.training.checksum import weights_hash

PART = 32
"""Questions that are answered at all depths before their answers are written."""
SHOTS = 3
"""Passages in each worked example."""


@dataclasses.dataclass(frozen=True)
class Alone:
    """Single queries, asked alone: seconds by stage at each depth, and how many replies were those
    of the shared prefill."""

    seconds: dict[str, list[dict[str, Amount]]]
    identical: Count
    asked: Count


def run(config: AblateDepth) -> dict[str, Any]:
    """Answers at every depth, resuming what an earlier start of the same run has finished. Returns
    the contents of results.json.

    Raises:
      UserError: anything that the user can mend, before the first file is written wherever it can
        be known.
    """
    depths = sorted(set(config.depths))
    if not depths or depths[-1] == 0:
        raise UserError("--depths needs a depth of 1 or more, such as --depths=0,1,2,3,5,10,20")
    weights, _ = parts(config.method)
    corpus = open_corpus(config.corpus, config.settings.seed)
    config = build.with_limit(config, corpus, hub.tokenizer(config.model.model), label="depth")
    settings = dataclasses.replace(config.settings, document_parts=config.corpus.document_parts)
    template = build.open_template(config.model.model, config.model.chat)
    where = {
        "prefix": "depth",
        "also": build.corpus_identity(config.corpus, corpus) | build.chat_identity(template),
    }
    root, name = Path(config.run.runs), config.run.name
    found = find_run(root, name, config, **where)
    lab = build.open_lab(
        config.model, settings, config.mesh, found, corpus, template, trains=weights != BASE
    )
    method = open_method(lab, config.method)
    if not isinstance(method, RAG):
        raise UserError(
            f"--method={config.method} searches for nothing, so it has no depth; choose rag, hyde or WEIGHTS+rag"
        )
    method.check()
    questions = _questions(lab, weights, config.n_questions)
    if not questions:
        raise UserError(f"{corpus.name} has no questions to ask")
    run = open_run(root, name, config, **where)
    say(
        "depth",
        f"{corpus.name}: {len(questions)} questions, k = {', '.join(map(str, depths))}; writing to {run.path}",
    )
    method.learn()
    answers = _answer_all(run, method, questions, depths, config.places)
    alone = _ask_alone(run, method, questions, depths, answers, config.latency_queries)
    results = _write_results(run, lab, method, questions, depths, answers, alone)
    print(f"\n{table.render(all_tables(results), results['notes'])}")
    print(f"Look at {run.path}/depth.png, or at {run.path}/predictions.jsonl for every answer.")
    methods = tuple(dict.fromkeys((config.method, "lora", "full")))
    print(
        f"Next: --k={results['best']} is the best depth here; compare retrieval at that depth with training:"
    )
    values = {"k": results["best"], "methods": methods, "latency_queries": None}
    print(build.next_command("experiments.compare", configs.Compare, config, **values))
    return results


def _questions(lab: Lab, weights: str, most: int | None) -> list[Question]:
    """Lists what is asked: all questions of the corpus, or where weights are trained those about
    subjects they were not asked about."""
    questions = list(lab.corpus.questions)
    if weights != BASE:
        split = headline({question.split for question in questions})
        questions = [question for question in questions if question.split == split]
    if most is None or most >= len(questions):
        return questions
    return [questions[i * len(questions) // most] for i in range(most)]


def write_prompt(
    lab: Lab, question: Question, passages: Sequence[Passage]
) -> tuple[Prompt, tuple[Passage, ...]]:
    """Writes the question behind passages, the first one first. Returns the prompt and the passages
    that the model's context holds."""
    generator, write = lab.generator, lab.prompts
    room = (
        lab.model.config.max_length
        - lab.settings.generation.limit
        - generator.count(prefix_of(lab))
        - 1
    )
    reading = functools.partial(write.reading, best_last=False)
    kept = prompt.fit(question.text, [p.text for p in passages], room, generator.count, reading)
    return reading(question.text, kept), tuple(passages[: len(kept)])


def prefix_of(lab: Lab) -> Prompt:
    """The worked examples before every question, whatever its depth."""
    return lab.prompts.reading_prefix(SHOTS, best_last=False)


def at_depths(hits: Sequence[Hit], depths: Sequence[int]) -> dict[str, list[Passage]]:
    """Lists the first k passages for each depth, by the name of the depth."""
    return {f"k={k}": [hit.passage for hit in hits[:k]] for k in depths}


def at_places(
    hits: Sequence[Hit], gold: Sequence[Passage], places: int
) -> dict[str, list[Passage]]:
    """Puts the first gold passage at each place among the best others, and leaves it out. Empty
    where there are too few others."""
    ids = {passage.id for passage in gold}
    others = [hit.passage for hit in hits if hit.passage.id not in ids][:places]
    if not (gold and places and len(others) == places):
        return {}
    put = {
        f"gold at {i + 1}": [*others[:i], gold[0], *others[i : places - 1]] for i in range(places)
    }
    return {**put, "no gold": others}


def answer_shared(
    method: RAG,
    questions: Sequence[Question],
    found: Found,
    arranged: Sequence[dict[str, list[Passage]]],
) -> list[list[Prediction]]:
    """Answers each question once for each arrangement of its passages, from one prefill for all
    that begin alike."""
    lab = method.lab
    written = [
        [(name, *write_prompt(lab, question, passages)) for name, passages in of_question.items()]
        for question, of_question in zip(questions, arranged, strict=True)
    ]
    sampling = Sampling(max_new_tokens=lab.settings.generation.limit, seed=lab.settings.seed)
    groups = [[asked for _, asked, _ in of_question] for of_question in written]
    replies = lab.generator.generate_branches(
        method.params, groups, sampling, method.prefix(prefix_of(lab))
    )
    answered = []
    for question, calls, of_question, of_reply in zip(
        questions, found.calls, written, replies, strict=True
    ):
        answered.append([])
        for (name, _, passages), reply in zip(of_question, of_reply, strict=True):
            # nothing is searched for no passage
            before, seconds = (calls, found.seconds) if passages else ([], {})
            prediction = method.prediction(question, [*before, reply], passages, **seconds)
            answered[-1].append(dataclasses.replace(prediction, method=name))
    return answered


def _answer_all(
    run: Run, method: RAG, questions: Sequence[Question], depths: Sequence[int], places: int
) -> dict[str, list[Prediction]]:
    """Answers part by part; a part whose file is there was answered by an earlier start. Returns
    predictions by arrangement."""
    answers: dict[str, list[Prediction]] = {}
    by_id = {passage.id: passage for passage in method.lab.corpus.passages}
    with Progress(method.name, len(questions), unit="question") as bar:
        for at in range(0, len(questions), PART):
            asked = questions[at : at + PART]
            file = run.file("answers") / f"{at:06d}.jsonl"
            if not file.exists():
                gold = [[by_id[id] for id in question.passages] for question in asked]
                found = method.find(asked, max(depths[-1], places + max(map(len, gold))))
                deep = answer_shared(
                    method, asked, found, [at_depths(hits, depths) for hits in found.hits]
                )
                put = [
                    at_places(hits, of_question, places)
                    for hits, of_question in zip(found.hits, gold, strict=True)
                ]
                placed = answer_shared(method, asked, found, put)
                write_jsonl(
                    file, [p.to_json() for of_question in (*deep, *placed) for p in of_question]
                )
            rows = read_rows(Prediction, file, fix=f"delete {file} to answer again")
            if list(dict.fromkeys(p.id for p in rows)) != [question.id for question in asked]:
                raise UserError(
                    f"{file} holds the answers to other questions; delete it to answer again"
                )
            for prediction in rows:
                answers.setdefault(prediction.method, []).append(prediction)
            bar.advance(len(asked), "answering")
    return answers


def _ask_alone(
    run: Run,
    method: RAG,
    questions: Sequence[Question],
    depths: Sequence[int],
    answers: dict[str, list[Prediction]],
    n: int,
) -> Alone:
    """Asks some questions alone at each depth, as a user would, once their programs are
    compiled."""
    file = run.file("alone.json")
    if file.exists():
        return read(Alone, file, fix=f"delete {file} to measure again")
    rows = [i * len(questions) // n for i in range(min(n, len(questions)))] if n else []
    seconds: dict[str, list[dict[str, float]]] = {str(k): [] for k in depths}
    identical = 0
    with Progress(method.name, len(rows) * len(depths), unit="query") as bar:
        for row in rows:
            for k in depths:
                with compiling() as compiled:
                    text, took = _ask(method, questions[row], k)
                if compiled:
                    text, took = _ask(method, questions[row], k)
                seconds[str(k)].append(took)
                identical += text == answers[f"k={k}"][row].answer
                bar.advance(1, "one at a time, for the latency")
    alone = Alone(seconds, identical, len(rows) * len(depths))
    write_json(file, dataclasses.asdict(alone))
    return alone


def _ask(method: RAG, question: Question, k: int) -> tuple[str, dict[str, float]]:
    """Asks one question at one depth, with a prefill of its own. Returns the reply and the seconds
    of its stages."""
    began = time.perf_counter()
    found = method.find([question], k) if k else Found([[]], [[]], {})
    asked, _ = write_prompt(method.lab, question, [hit.passage for hit in found.hits[0]])
    (reply,) = method.generate(prefix_of(method.lab), [asked], method.lab.settings.generation.limit)
    prediction = method.prediction(question, [*found.calls[0], reply], **found.seconds)
    return prediction.answer, {**prediction.seconds, "total": time.perf_counter() - began}


def prefill_tokens(predictions: Sequence[Sequence[Prediction]], n_prefix: int) -> dict[str, int]:
    """Counts the prompt tokens that are computed to answer some questions at all depths, in three
    ways.

    Args:
      predictions: of each question, at all depths.
      n_prefix: tokens of the worked examples.

    Returns:
      `alone`: each prompt from its first token. `behind_examples`: each prompt behind worked
        examples that are computed once.
      `shared`: with the passages computed once, too.
    """
    alone = sum(p.prompt_tokens for of_question in predictions for p in of_question)
    behind = n_prefix + sum(
        p.prompt_tokens - n_prefix for of_question in predictions for p in of_question
    )
    trunks = sum(
        max(p.prompt_tokens for p in of_question) - n_prefix for of_question in predictions
    )
    branches = sum(
        p.prompt_tokens - p.cached_tokens for of_question in predictions for p in of_question
    )
    return {"alone": alone, "behind_examples": behind, "shared": n_prefix + trunks + branches}


def _write_results(
    run: Run,
    lab: Lab,
    method: RAG,
    questions: Sequence[Question],
    depths: Sequence[int],
    answers: dict[str, list[Prediction]],
    alone: Alone,
) -> dict[str, Any]:
    subjects = {question.id: question.subject or question.id for question in questions}
    deep = {k: answers[f"k={k}"] for k in depths}
    results = depth.collect(deep, subjects, {k: alone.seconds[str(k)] for k in depths})
    placed = {name: rows for name, rows in answers.items() if not name.startswith("k=")}
    results["places"] = depth.collect_places(
        placed, subjects, {p.id: p.text for p in lab.corpus.passages}
    )
    tokens = prefill_tokens(
        list(zip(*deep.values(), strict=True)), method.prefix(prefix_of(lab)).n_tokens
    )
    times, behind = (tokens[name] / tokens["shared"] for name in ("alone", "behind_examples"))
    notes = [
        f"{method.name}: passages found by {lab.retriever_note}, in the order of their rank, the best first",
        f"prefill: {tokens['shared']:,} prompt tokens computed instead of {tokens['alone']:,}, {times:.1f} times fewer; "
        f"{behind:.2f} times fewer than behind worked examples that are computed once",
        f"replies of {alone.asked} prompts asked alone: {alone.identical} identical",
    ]
    results |= {
        "prefill_tokens": tokens,
        "alone": {"asked": alone.asked, "identical": alone.identical},
        "notes": notes,
    }
    results |= {"environment": environment() | {"weights": weights_hash(lab.params)}}
    write_jsonl(
        run.file("predictions.jsonl"), [p.to_json() for rows in answers.values() for p in rows]
    )
    write_atomic(run.file("table.md"), table.render(all_tables(results), notes))
    depth.draw(results, run.file("depth.png"))
    write_json(run.file("results.json"), results)  # last: a run with this file is whole
    return results


def all_tables(results: dict[str, Any]) -> list[table.Table]:
    """Tables of results.json: depth, cost, and places where the corpus names passages that
    answer."""
    return [
        *depth.tables(results),
        *([depth.places_table(results["places"])] if results["places"] else []),
    ]


def main() -> None:
    build.start(AblateDepth, run)


if __name__ == "__main__":
    main()
