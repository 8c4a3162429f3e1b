"""Follows knowledge that changes: facts are added, edited and deleted step by step, and each way to
keep a model up to date is asked after every step. One table, one figure.

    python -m experiments.evolve                                    invented people, three steps, six ways
    python -m experiments.evolve --profile=smoke                    the same with fewer, a few minutes on two cores
    python -m experiments.evolve --ways=rag,lora-on+rag --seeds=0,1,2
    python -m experiments.evolve --ways=lora-on,full-on,dora-on     weights that go on, of three kinds
    python -m experiments.evolve --corpus=factbook --old=package    countries between the Factbook of 2015 and that of 2025

Ways: base (never trained), full and lora (trained again from the base on all that holds),
lora-newest (a new adapter a step, trained on what the step brought alone; the newest answers),
lora-on (one adapter that goes on), rag (passages upserted and deleted in one index), and both:
lora-on+rag. Any weights of experiments.compare go with -newest, -on and a reader.

Measured after each step: new facts answered right, stale answers (a value that an edit replaced),
deleted facts (asked for, and by the likelihood of their value among others of its kind), unchanged
facts, seconds until a new fact is answered right, and what the update cost: seconds, tokens, FLOPs,
bytes written. Only subjects without training questions change.

The run's folder, runs/NAME, holds config.json, seed-SEED/WAY/STEP.json(l) (every answer and cost),
predictions.jsonl, results.json, table.md and evolve.png. The same command again goes on at the step
and way where a broken run stopped; more --ways or --seeds add to it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

from experiments import build
from experiments.configs.evolve import PROFILES, Evolve
from experiments.latency import alone
from kafjax import hub
from kafjax.core.config import changed
from kafjax.core.config_record import config_hash
from kafjax.core.errors import UserError
from kafjax.core.progress import Progress, say
from kafjax.core.records import Corpus, Prediction
from kafjax.core.rundir import (
    Run,
    environment,
    find_run,
    open_run,
    write_atomic,
    write_json,
    write_jsonl,
)
from kafjax.core.schema import Amount, read, read_rows
from kafjax.corpus.stream import DELETED, NEW, Asked, Snapshot, draw, snapshot
from kafjax.corpus.worlds import FACTBOOK, open_world
from kafjax.evaluation import evolve, table
from kafjax.evaluation.evolve import STALE, WEIGHED
from kafjax.evaluation.score import contains, first_line
from kafjax.methods import Lab, Method
from kafjax.methods.ways import Update, Way, check, follow, forget, way
from kafjax.training.checksum import weights_hash


@dataclasses.dataclass(frozen=True)
class Done:
    """Cost of a step to a way: its update, and the seconds of single queries about new facts."""

    update: Update
    latencies: list[Amount]

    def row(self) -> dict[str, Any]:
        """Returns what the tables read."""
        return {**dataclasses.asdict(self.update), "latencies": self.latencies}


def run(config: Evolve) -> dict[str, Any]:
    """Follows every way through all steps and seeds, resuming what an earlier start of the same run
    has finished. Returns the contents of results.json.

    Raises:
      UserError: anything that the user can mend, before the first file is written wherever it can
        be known.
    """
    ways = [way(name) for name in dict.fromkeys(config.ways)]
    seeds = list(dict.fromkeys(config.seeds))
    if not ways or not seeds:
        raise UserError("--ways and --seeds need one each, such as --ways=rag,lora-on --seeds=0")
    worlds = {seed: snapshots_of(config, seed) for seed in seeds}
    whole = union([one for of_seed in worlds.values() for one in of_seed])
    config = build.with_limit(config, whole, hub.tokenizer(config.model.model), label="evolve")
    template = build.open_template(config.model.model, config.model.chat)
    also = build.chat_identity(template)
    if config.corpus.corpus == FACTBOOK:  # the editions are no setting
        told = [document.text for document in union(snapshots_of(config, 0)).documents]
        also |= {build.CORPUS_HASH: config_hash({"documents": told})}
    where = {"prefix": "evolve", "also": also}
    root, name = Path(config.run.runs), config.run.name
    settings = dataclasses.replace(config.settings, document_parts=config.corpus.document_parts)
    found = find_run(root, name, config, **where)
    trains = any(one.follows is not None for one in ways)
    lab = build.open_lab(config.model, settings, config.mesh, found, whole, template, trains=trains)
    for one in ways:
        check(lab, one)
    folder = open_run(root, name, config, **where)
    say(
        "evolve",
        f"{config.corpus.corpus}: {len(ways)} ways, {config.n_steps} steps, seeds {', '.join(map(str, seeds))}; writing to {folder.path}",
    )
    for seed, snapshots in worlds.items():
        _follow_all(folder, lab, ways, snapshots, seed, config)
    results = _write_results(folder, lab, ways, seeds, config)
    print(f"\n{table.render(evolve.tables(results['ways']), results['notes'])}")
    print(
        f"Look at {folder.path}/evolve.png, or at {folder.path}/predictions.jsonl for every answer."
    )
    print("Next: more seeds narrow the intervals, in the same folder:")
    more = tuple(range(max(seeds) + 1, max(seeds) + 3))
    print(
        build.next_command(
            "experiments.evolve",
            Evolve,
            config,
            seeds=(*seeds, *more),
            name=folder.path.name,
            profile="default",
            old=config.old,
        )
    )
    return results


def snapshots_of(config: Evolve, seed: int) -> list[Snapshot]:
    """Draws the changes of a seed. Returns the world before them and after each step."""
    corpus = config.corpus
    old = None if config.old is None else Path(config.old)
    world = open_world(
        corpus.corpus, corpus.subjects, config.added * config.n_steps, corpus.attributes, seed, old
    )
    steps = draw(
        world,
        config.n_steps,
        added=config.added,
        edited=config.edited,
        deleted=config.deleted,
        seed=seed,
    )
    return [
        snapshot(
            world,
            steps[:number],
            n_documents=corpus.documents,
            questions_per_fact=corpus.questions_per_fact,
            seed=seed,
        )
        for number in range(len(steps) + 1)
    ]


def union(snapshots: Sequence[Snapshot]) -> Corpus:
    """Everything that is ever told or asked, without passages: for the checks of texts, and for
    worked examples that hold no answer."""
    first = snapshots[0].corpus
    return dataclasses.replace(
        first,
        documents=tuple(dict.fromkeys(d for one in snapshots for d in one.corpus.documents)),
        passages=(),
        training_questions=tuple(
            dict.fromkeys(q for one in snapshots for q in one.corpus.training_questions)
        ),
        questions=tuple(dict.fromkeys(q for one in snapshots for q in one.corpus.questions)),
    )


def _follow_all(
    run: Run,
    lab: Lab,
    ways: Sequence[Way],
    snapshots: Sequence[Snapshot],
    seed: int,
    config: Evolve,
) -> None:
    """Brings all ways through a step before the next one, so that weights which no way needs any
    more can go."""
    own = dataclasses.replace(
        lab,
        settings=changed(lab.settings, seed=seed),
        log=lambda **row: lab.log(seed=seed, **row),
    ).over(lab.corpus, lab.folder / f"seed-{seed}")
    for number in range(len(snapshots)):
        for one in ways:
            _step(run, own, one, snapshots[: number + 1], seed, config)
        if number:
            forget(own, number - 1)
    forget(own, len(snapshots) - 1)


def _step(
    run: Run, lab: Lab, one: Way, snapshots: Sequence[Snapshot], seed: int, config: Evolve
) -> None:
    number = len(snapshots) - 1
    answers, record = _files(run, seed, one, number)
    if record.exists():
        return
    label = f"{one.name}, step {number}"
    say(label, "learning" if number == 0 else "following the change")
    method, update = follow(lab, one, snapshots, config.step_epochs)
    asked = snapshots[-1].asked
    with Progress(label, len(asked), unit="question") as bar:
        predictions = method.answer(
            [each.question for each in asked], lambda n: bar.advance(n, "answering")
        )
    weighed = weigh(method, [each for each in asked if each.others])
    new = [each.question for each in asked if each.question.split == NEW]
    latencies = [alone(method, question)["total"] for question in new[: config.latency_queries]]
    scored = [
        judge(prediction, each, weighed.get(each.question.id))
        for prediction, each in zip(predictions, asked, strict=True)
    ]
    write_jsonl(answers, [dataclasses.replace(p, method=one.name).to_json() for p in scored])
    # last: a step with this file is finished
    write_json(record, dataclasses.asdict(Done(update, latencies)))


def weigh(method: Method, asked: Sequence[Asked]) -> dict[str, float]:
    """Compares the likelihood of each deleted value, as the reply to its question, with that of
    others of its kind. Returns the share that it is more likely than, ties counted half."""
    if not asked:
        return {}
    replies = [(each.question.answers[0], *each.others) for each in asked]
    found = method.weigh([each.question for each in asked], replies)
    return {
        each.question.id: sum((own > other) + 0.5 * (own == other) for other in others)
        / len(others)
        for each, (own, *others) in zip(asked, found, strict=True)
    }


def judge(prediction: Prediction, asked: Asked, weighed: float | None) -> Prediction:
    """Adds to a prediction whether it tells a value that an edit replaced, and how a deleted value
    is weighed."""
    score = dict(prediction.score)
    if asked.past and asked.question.split != DELETED:
        reply = first_line(prediction.answer)
        score[STALE] = float(not prediction.correct and bool(contains(reply, asked.past)))
    if weighed is not None:
        score[WEIGHED] = weighed
    return dataclasses.replace(prediction, score=score)


def _files(run: Run, seed: int, one: Way, number: int) -> tuple[Path, Path]:
    folder = run.file(f"seed-{seed}") / one.name
    return folder / f"{number}.jsonl", folder / f"{number}.json"


def _write_results(
    run: Run, lab: Lab, ways: Sequence[Way], seeds: Sequence[int], config: Evolve
) -> dict[str, Any]:
    answers: dict[str, dict[int, list[list[Prediction]]]] = {}
    updates: dict[str, dict[int, list[dict[str, Any]]]] = {}
    rows = []
    for one in ways:
        for seed in seeds:
            files = [_files(run, seed, one, number) for number in range(config.n_steps + 1)]
            again = f"delete {files[0][0].parent} to answer again"
            told = [read_rows(Prediction, file, fix=again) for file, _ in files]
            answers.setdefault(one.name, {})[seed] = told
            updates.setdefault(one.name, {})[seed] = [
                read(Done, file, fix=again).row() for _, file in files
            ]
            rows += [
                {"seed": seed, "step": number, **p.to_json()}
                for number, of_step in enumerate(told)
                for p in of_step
            ]
    found = evolve.collect(answers, updates)
    results = {
        "ways": found,
        "seeds": list(seeds),
        "notes": [one.note for one in ways],
        "environment": environment() | {"weights": weights_hash(lab.params)},
    }
    write_jsonl(run.file("predictions.jsonl"), rows)
    write_atomic(run.file("table.md"), table.render(evolve.tables(found), results["notes"]))
    evolve.draw(found, run.file("evolve.png"))
    write_json(run.file("results.json"), results)  # last: a run with this file is whole
    return results


def _profile() -> dict[str, Any]:
    # an unknown one is refused by the configuration
    return PROFILES.get(flags.FLAGS.profile, {})


def main() -> None:
    build.start(Evolve, run, _profile)


if __name__ == "__main__":
    main()
