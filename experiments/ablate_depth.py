"""How many passages should be in the prompt? Asks the same questions with 0, 1, 2, ... of them: one command, one table, one figure.

    python -m experiments.ablate_depth                                       rag over invented biographies
    python -m experiments.ablate_depth --depths=0,1,5 --n_questions=50       a first look, in a minute or two
    python -m experiments.ablate_depth --corpus=DIR --retriever=hybrid       your own documents, found by meaning and by words
    python -m experiments.ablate_depth --reranker=FOLDER                     the same, read again by a cross-encoder
    python -m experiments.ablate_depth --method=lora+rag                     with weights that are trained first

The table has a row for each depth: accuracy, recall@k, MRR and nDCG, prompt tokens and latency, and the paired difference to k=1 and to
the best depth. Intervals and tests take the questions about one subject as one observation.

One prefill serves all depths. Passages stand in the order of their rank, the best first, so that the prompt with 5 passages begins like
the one with 20; a question branches off at each depth and gets the reply that it would get alone. (experiments.compare has the best
passage last, next to the question, so its numbers differ.) Worked examples are the same at every depth, k=0 included. --latency_queries
questions are asked alone at each depth, for the latency, and their replies are compared with the shared ones.

The run's folder, runs/NAME, holds config.json, predictions.jsonl (every answer), results.json, table.md and depth.png. The same command
again goes on where a broken run stopped.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments import build
from experiments.compiling import compiling
from experiments.configs import AblateDepth
from kafjax.core.errors import UserError
from kafjax.core.progress import Progress, say
from kafjax.core.records import Passage, Prediction, Question
from kafjax.core.rundir import Run, environment, find_run, open_run, write_atomic, write_json, write_jsonl
from kafjax.core.schema import Amount, Count, read, read_rows
from kafjax.corpus import open_corpus
from kafjax.evaluation import depth, table
from kafjax.evaluation.results import headline
from kafjax.generation import Generation, Sampling
from kafjax.hub.text import Prompt
from kafjax.methods import BASE, Lab, open_method, parts
from kafjax.methods.rag import RAG, Found
from kafjax.retrieval import prompt
from kafjax.training.checksum import weights_hash

PART = 32
"""Questions that are answered at all depths before their answers are written."""
SHOTS = 3
"""Passages in each worked example."""


@dataclasses.dataclass(frozen=True)
class Alone:
    """Single queries, asked alone: seconds by stage at each depth, and how many replies were those of the shared prefill."""

    seconds: dict[str, list[dict[str, Amount]]]
    identical: Count
    asked: Count


def run(config: AblateDepth) -> dict[str, Any]:
    """Answers at every depth, resuming what an earlier start of the same run has finished. Returns the contents of results.json.

    Raises:
      UserError: anything that the user can mend, before the first file is written wherever it can be known.
    """
    depths = sorted(set(config.depths))
    if not depths or depths[-1] == 0:
        raise UserError("--depths needs a depth of 1 or more, such as --depths=0,1,2,3,5,10,20")
    weights, _ = parts(config.method)
    settings = dataclasses.replace(config.settings, document_parts=config.corpus.document_parts)
    corpus = open_corpus(config.corpus, settings.seed)
    template = build.open_template(config.model.model, config.model.chat)
    where = {"prefix": "depth", "also": build.corpus_identity(config.corpus, corpus) | build.chat_identity(template)}
    root, name = Path(config.run.runs), config.run.name
    found = find_run(root, name, config, **where)
    lab = build.open_lab(config.model, settings, config.mesh, found, corpus, template, trains=weights != BASE)
    method = open_method(lab, config.method)
    if not isinstance(method, RAG):
        raise UserError(f"--method={config.method} searches for nothing, so it has no depth; choose rag, hyde or WEIGHTS+rag")
    method.check()
    questions = _questions(lab, weights, config.n_questions)
    if not questions:
        raise UserError(f"{corpus.name} has no questions to ask")
    run = open_run(root, name, config, **where)
    say("depth", f"{corpus.name}: {len(questions)} questions, k = {', '.join(map(str, depths))}; writing to {run.path}")
    method.learn()
    answers = _answer_all(run, method, questions, depths)
    alone = _ask_alone(run, method, questions, depths, answers, config.latency_queries)
    results = _write_results(run, lab, method, questions, depths, answers, alone)
    print(f"\n{table.render(depth.tables(results), results['notes'])}")
    print(f"Look at {run.path}/depth.png, or at {run.path}/predictions.jsonl for every answer.")
    print(f"Next: --k={results['best']} is the best depth here; compare retrieval at that depth with training: experiments.compare")
    return results


def _questions(lab: Lab, weights: str, most: int | None) -> list[Question]:
    """Lists what is asked: all questions of the corpus, or where weights are trained those about subjects they were not asked about."""
    questions = list(lab.corpus.questions)
    if weights != BASE:
        split = headline({question.split for question in questions})
        questions = [question for question in questions if question.split == split]
    if most is None or most >= len(questions):
        return questions
    return [questions[i * len(questions) // most] for i in range(most)]


def prompts_of(
    lab: Lab, question: Question, passages: Sequence[Passage], depths: Sequence[int]
) -> list[tuple[Prompt, tuple[Passage, ...]]]:
    """Writes the question behind the first k passages, for each depth, with the passages that fit into the model's context."""
    generator, write = lab.generator, lab.prompts
    room = lab.model.config.max_length - lab.settings.generation.max_new_tokens - generator.count(prefix_of(lab)) - 1
    reading = functools.partial(write.reading, best_last=False)
    written = []
    for k in depths:
        kept = prompt.fit(question.text, [p.text for p in passages[:k]], room, generator.count, reading)
        written.append((reading(question.text, kept), tuple(passages[: len(kept)])))
    return written


def prefix_of(lab: Lab) -> Prompt:
    """The worked examples before every question, whatever its depth."""
    return lab.prompts.reading_prefix(SHOTS, best_last=False)


def answer_depths(method: RAG, questions: Sequence[Question], depths: Sequence[int]) -> list[list[Prediction]]:
    """Answers each question at each depth, from one prefill for all depths of a question."""
    lab = method.lab
    found = method.find(questions, max(depths))
    written = [
        prompts_of(lab, question, [hit.passage for hit in hits], depths) for question, hits in zip(questions, found.hits, strict=True)
    ]
    sampling = Sampling(max_new_tokens=lab.settings.generation.max_new_tokens, seed=lab.settings.seed)
    groups = [[asked for asked, _ in of_question] for of_question in written]
    replies = lab.generator.generate_branches(method.params, groups, sampling, method.prefix(prefix_of(lab)))
    return [
        [
            _prediction(method, question, k, reply, passages, found, row)
            for k, reply, (_, passages) in zip(depths, of_question, written[row], strict=True)
        ]
        for row, (question, of_question) in enumerate(zip(questions, replies, strict=True))
    ]


def _prediction(
    method: RAG, question: Question, k: int, reply: Generation, passages: Sequence[Passage], found: Found, row: int
) -> Prediction:
    calls, seconds = (found.calls[row], found.seconds) if k else ([], {})  # nothing is searched for no passage
    return dataclasses.replace(method.prediction(question, [*calls, reply], passages, **seconds), method=f"k={k}")


def _answer_all(run: Run, method: RAG, questions: Sequence[Question], depths: Sequence[int]) -> dict[int, list[Prediction]]:
    """Answers part by part; a part whose file is there was answered by an earlier start."""
    answers: dict[int, list[Prediction]] = {k: [] for k in depths}
    with Progress(method.name, len(questions), unit="question") as bar:
        for at in range(0, len(questions), PART):
            asked = questions[at : at + PART]
            file = run.file("answers") / f"{at:06d}.jsonl"
            if not file.exists():
                write_jsonl(file, [p.to_json() for of_question in answer_depths(method, asked, depths) for p in of_question])
            rows = read_rows(Prediction, file, fix=f"delete {file} to answer again")
            if [p.id for p in rows] != [question.id for question in asked for _ in depths]:
                raise UserError(f"{file} holds the answers to other questions; delete it to answer again")
            for i, k in enumerate(depths):
                answers[k] += rows[i :: len(depths)]
            bar.advance(len(asked), "answering")
    return answers


def _ask_alone(
    run: Run, method: RAG, questions: Sequence[Question], depths: Sequence[int], answers: dict[int, list[Prediction]], n: int
) -> Alone:
    """Asks some questions alone at each depth, as a user would, once their programs are compiled."""
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
                identical += text == answers[k][row].answer
                bar.advance(1, "one at a time, for the latency")
    alone = Alone(seconds, identical, len(rows) * len(depths))
    write_json(file, dataclasses.asdict(alone))
    return alone


def _ask(method: RAG, question: Question, k: int) -> tuple[str, dict[str, float]]:
    """Asks one question at one depth, with a prefill of its own. Returns the reply and the seconds of its stages."""
    began = time.perf_counter()
    found = method.find([question], k) if k else Found([[]], [[]], {})
    ((asked, _),) = prompts_of(method.lab, question, [hit.passage for hit in found.hits[0]], [k])
    (reply,) = method.generate(prefix_of(method.lab), [asked], method.lab.settings.generation.max_new_tokens)
    prediction = method.prediction(question, [*found.calls[0], reply], **found.seconds)
    return prediction.answer, {**prediction.seconds, "total": time.perf_counter() - began}


def prefill_tokens(predictions: Sequence[Sequence[Prediction]], n_prefix: int) -> dict[str, int]:
    """Counts the prompt tokens that are computed to answer some questions at all depths, in three ways.

    Args:
      predictions: of each question, at all depths.
      n_prefix: tokens of the worked examples.

    Returns:
      `alone`: each prompt from its first token. `behind_examples`: each prompt behind worked examples that are computed once.
      `shared`: with the passages computed once, too.
    """
    alone = sum(p.prompt_tokens for of_question in predictions for p in of_question)
    behind = n_prefix + sum(p.prompt_tokens - n_prefix for of_question in predictions for p in of_question)
    trunks = sum(max(p.prompt_tokens for p in of_question) - n_prefix for of_question in predictions)
    branches = sum(p.prompt_tokens - p.cached_tokens for of_question in predictions for p in of_question)
    return {"alone": alone, "behind_examples": behind, "shared": n_prefix + trunks + branches}


def _write_results(
    run: Run,
    lab: Lab,
    method: RAG,
    questions: Sequence[Question],
    depths: Sequence[int],
    answers: dict[int, list[Prediction]],
    alone: Alone,
) -> dict[str, Any]:
    subjects = {question.id: question.subject or question.id for question in questions}
    results = depth.collect(answers, subjects, {k: alone.seconds[str(k)] for k in depths})
    tokens = prefill_tokens(list(zip(*answers.values(), strict=True)), method.prefix(prefix_of(lab)).n_tokens)
    times, behind = (tokens[name] / tokens["shared"] for name in ("alone", "behind_examples"))
    notes = [
        f"{method.name}: passages found by {lab.retriever_note}, in the order of their rank, the best first",
        f"prefill: {tokens['shared']:,} prompt tokens computed instead of {tokens['alone']:,}, {times:.1f} times fewer; "
        f"{behind:.2f} times fewer than behind worked examples that are computed once",
        f"replies of {alone.asked} prompts asked alone: {alone.identical} identical",
    ]
    results |= {"prefill_tokens": tokens, "alone": {"asked": alone.asked, "identical": alone.identical}, "notes": notes}
    results |= {"environment": environment() | {"weights": weights_hash(lab.params)}}
    write_jsonl(run.file("predictions.jsonl"), [p.to_json() for rows in answers.values() for p in rows])
    write_atomic(run.file("table.md"), table.render(depth.tables(results), notes))
    depth.draw(results, run.file("depth.png"))
    write_json(run.file("results.json"), results)  # last: a run with this file is whole
    return results


def main() -> None:
    build.start(AblateDepth, run)


if __name__ == "__main__":
    main()
