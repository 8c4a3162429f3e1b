"""Ablates the number of passages in the prompt. Asks the same questions with 0, 1, 2, ... of them:
one command, one table, one figure.

    python -m experiments.ablate_depth                                       rag over invented biographies
    python -m experiments.ablate_depth --depths=0,1,5 --n_questions=50       a first look, in a minute or two
    python -m experiments.ablate_depth --corpus=DIR --retriever=hybrid       your own documents, found by meaning and by words
    python -m experiments.ablate_depth --reranker=FOLDER                     the same, read again by a cross-encoder
    python -m experiments.ablate_depth --method=lora+rag                     with weights that are trained first
    python -m experiments.ablate_depth --method=raft+rag --seeds=0,1,2       with a reader trained among distractors, on other subjects

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
out: does the model prefer a place, does it abstain, or copy a wrong passage? The others are the
nearest, random ones, or contradict it (--distractors).

The run's folder, runs/NAME, holds config.json, predictions.jsonl (every answer), results.json,
table.md, depth.png and places.png. The same command again goes on where a broken run stopped; more
--seeds add to it.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments import build
from experiments.arranged import answer_shared, at_depths, at_places, prefix_of, write_prompt
from experiments.compiling import compiling
from experiments.configs.ablate_depth import AblateDepth
from experiments.configs.compare import Compare
from kafjax import hub
from kafjax.core.config import changed
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
from kafjax.corpus.distractors import (
    CONTRADICTING,
    NEAR,
    RANDOM,
    contradiction,
    random_passages,
)
from kafjax.evaluation import depth, table
from kafjax.evaluation.results import headline
from kafjax.methods import BASE, Lab, open_method, parts
from kafjax.methods.rag import RAG, Found
from kafjax.retrieval import Hit
from kafjax.training.checksum import weights_hash

PART = 32
"""Questions that are answered at all depths before their answers are written."""


@dataclasses.dataclass(frozen=True)
class Alone:
    """Single queries, asked alone: seconds by stage at each depth, and how many replies were those
    of the shared prefill."""

    seconds: dict[str, list[dict[str, Amount]]]
    identical: Count
    asked: Count


@dataclasses.dataclass(frozen=True)
class OfSeed:
    """Everything that one seed answered: predictions by arrangement, single queries, prompt tokens
    by how they are computed, and notes: of trained weights, of the retriever, the base's checksum."""

    seed: int
    answers: dict[str, list[Prediction]]
    alone: Alone
    tokens: dict[str, int]
    notes: tuple[str, str, str]


def run(config: AblateDepth) -> dict[str, Any]:
    """Answers at every depth with every seed, resuming what an earlier start of the same run has
    finished. Returns the contents of results.json.

    Raises:
      UserError: anything that the user can mend, before the first file is written wherever it can
        be known.
    """
    depths = sorted(set(config.depths))
    if not depths or depths[-1] == 0:
        raise UserError("--depths needs a depth of 1 or more, such as --depths=0,1,2,3,5,10,20")
    seeds = list(dict.fromkeys(config.seeds or (config.settings.seed,)))
    weights, _ = parts(config.method)
    corpora = {seed: open_corpus(config.corpus, seed) for seed in seeds}
    first = corpora[seeds[0]]
    config = build.with_limit(config, first, hub.tokenizer(config.model.model), label="depth")
    template = build.open_template(config.model.model, config.model.chat)
    where = {
        "prefix": "depth",
        "also": build.corpus_identity(config.corpus, first) | build.chat_identity(template),
    }
    root, name = Path(config.run.runs), config.run.name
    found = find_run(root, name, config, **where)
    run: Run | None = None
    answered = []
    for seed, corpus in corpora.items():
        own = found if seed == config.settings.seed else Run(found.file(f"seed-{seed}"))
        settings = dataclasses.replace(
            changed(config.settings, seed=seed), document_parts=config.corpus.document_parts
        )
        lab = build.open_lab(
            config.model, settings, config.mesh, own, corpus, template, trains=weights != BASE
        )
        method = open_method(lab, config.method)
        if not isinstance(method, RAG):
            raise UserError(
                f"--method={config.method} searches for nothing, so it has no depth; choose rag, hyde, rewrite or WEIGHTS+rag"
            )
        method.check()
        questions = _questions(lab, weights, config.n_questions)
        if not questions:
            raise UserError(f"{corpus.name} has no questions to ask")
        run = run or open_run(root, name, config, **where)
        say(
            "depth",
            f"{corpus.name}, seed {seed}: {len(questions)} questions, k = {', '.join(map(str, depths))}; writing to {own.path}",
        )
        method.learn()
        answers = _answer_all(own, method, questions, depths, config)
        alone = _ask_alone(own, method, questions, depths, answers, config.latency_queries)
        n_prefix = method.prefix(prefix_of(lab)).n_tokens
        deep = [answers[f"k={k}"] for k in depths]
        tokens = prefill_tokens(list(zip(*deep, strict=True)), n_prefix)
        trained = "" if weights == BASE else method.weights.note
        notes = (trained, lab.retriever_note, weights_hash(lab.params))
        answered.append(OfSeed(seed, answers, alone, tokens, notes))
    assert run is not None
    results = _write_results(run, config.method, depths, answered)
    print(f"\n{table.render(all_tables(results), results['notes'])}")
    print(f"Look at {run.path}/depth.png, or at {run.path}/predictions.jsonl for every answer.")
    methods = tuple(dict.fromkeys((config.method, "lora", "full")))
    print(
        f"Next: --k={results['best']} is the best depth here; compare retrieval at that depth with training:"
    )
    values = {"k": results["best"], "methods": methods, "latency_queries": None}
    print(build.next_command("experiments.compare", Compare, config, **values))
    return results


def _questions(lab: Lab, weights: str, most: int | None) -> list[Question]:
    """Lists what is asked: all questions of the corpus, or where weights are trained those about
    subjects that no training question is about."""
    questions = list(lab.corpus.questions)
    if weights != BASE:
        split = headline({question.split for question in questions})
        questions = [question for question in questions if question.split == split]
    if most is None or most >= len(questions):
        return questions
    return [questions[i * len(questions) // most] for i in range(most)]


def _answer_all(
    run: Run,
    method: RAG,
    questions: Sequence[Question],
    depths: Sequence[int],
    config: AblateDepth,
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
                wanted = config.places + 1 + max(map(len, gold))
                found = method.find(asked, max(depths[-1], wanted))
                deep = answer_shared(
                    method, asked, found, [at_depths(hits, depths) for hits in found.hits]
                )
                put = [
                    _placed(method.lab, question, of_question, hits, config)
                    for question, hits, of_question in zip(asked, found.hits, gold, strict=True)
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


def _placed(
    lab: Lab,
    question: Question,
    gold: Sequence[Passage],
    hits: Sequence[Hit],
    config: AblateDepth,
) -> dict[str, list[Passage]]:
    """Puts the first gold passage at each place among each kind of others, by `KIND: PLACE`."""
    ids, seed = {passage.id for passage in gold}, lab.settings.seed
    near = [hit.passage for hit in hits if hit.passage.id not in ids]
    others = {
        NEAR: lambda: near,
        RANDOM: lambda: random_passages(question, lab.corpus.passages, config.places, seed),
        CONTRADICTING: lambda: [*_contradiction(lab, question, gold, near), *near],
    }
    first = gold[0] if gold else None
    return {
        f"{kind}: {place}": passages
        for kind in (config.distractors if config.places else ())
        for place, passages in at_places(first, others[kind](), config.places).items()
    }


def _contradiction(
    lab: Lab, question: Question, gold: Sequence[Passage], near: list[Passage]
) -> list[Passage]:
    """Returns a passage that contradicts the gold one; none, and no others either, where it cannot
    be made."""
    made = (
        contradiction(question, gold[0], lab.corpus.questions, lab.settings.seed) if gold else None
    )
    if made is None:
        near.clear()
    return [] if made is None else [made]


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
    run: Run, method: str, depths: Sequence[int], answered: Sequence[OfSeed]
) -> dict[str, Any]:
    names = dict.fromkeys(name for one in answered for name in one.answers)
    by_name = {
        name: {one.seed: one.answers[name] for one in answered if name in one.answers}
        for name in names
    }
    latencies = {
        k: [seconds for one in answered for seconds in one.alone.seconds[str(k)]] for k in depths
    }
    results = depth.collect({k: by_name[f"k={k}"] for k in depths}, latencies)
    placed = {
        tuple(name.split(": ")): trials
        for name, trials in by_name.items()
        if not name.startswith("k=")
    }
    results["places"] = depth.collect_places(placed)
    tokens = {
        way: sum(one.tokens[way] for one in answered)
        for way in ("alone", "behind_examples", "shared")
    }
    times, behind = (tokens[name] / tokens["shared"] for name in ("alone", "behind_examples"))
    asked, identical = (
        sum(getattr(one.alone, name) for one in answered) for name in ("asked", "identical")
    )
    trained, found_by, checksum = answered[0].notes
    notes = [
        f"{method}: passages found by {found_by}, in the order of their rank, the best first",
        *([f"read by: {trained}"] if trained else []),
        f"prefill: {tokens['shared']:,} prompt tokens computed instead of {tokens['alone']:,}, {times:.1f} times fewer; "
        f"{behind:.2f} times fewer than behind worked examples that are computed once",
        f"replies of {asked} prompts asked alone: {identical} identical",
    ]
    results |= {
        "seeds": [one.seed for one in answered],
        "prefill_tokens": tokens,
        "alone": {"asked": asked, "identical": identical},
        "notes": notes,
        "environment": environment() | {"weights": checksum},
    }
    write_jsonl(
        run.file("predictions.jsonl"),
        [
            {"seed": one.seed, **p.to_json()}
            for one in answered
            for rows in one.answers.values()
            for p in rows
        ],
    )
    write_atomic(run.file("table.md"), table.render(all_tables(results), notes))
    depth.draw(results, run.file("depth.png"))
    if results["places"]:
        depth.draw_places(results["places"], run.file("places.png"))
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
