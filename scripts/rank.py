"""Ranks a corpus's documents for each of its questions, scores the ranking, and writes it in TREC's
and FlashRAG's form.

    python scripts/rank.py --corpus=BEIR/scifact --retriever=lexical --out=rankings    a folder as BEIR publishes them
    python scripts/rank.py --corpus=my_documents --retriever=hybrid --k=10             questions whose gold passages are named

A document ranks by its best passage. Scores are over the questions with known gold documents, each
relevant or not: nDCG@k, MAP@k, MRR@k, recall@k (the share of them among the k), and success@k (one
of them is). They equal ranx's; trec_eval computes others from run.trec. No language model is loaded.
"""

from __future__ import annotations

import functools
from pathlib import Path

from experiments import build
from experiments.build_index import open_embedder
from experiments.configs.rank import Rank
from kafjax.core.errors import UserError
from kafjax.core.rundir import write_atomic, write_json
from kafjax.corpus import open_corpus
from kafjax.evaluation import score
from kafjax.evaluation.intervals import mean_score
from kafjax.evaluation.rankings import by_document, to_flashrag, to_trec
from kafjax.evaluation.table import percent
from kafjax.retrieval import build_store, open_retriever, open_scorer
from kafjax.retrieval.kinds import check_kind

_DEPTH = 5  # passages looked at for each document that is ranked: several may be of one document
_BATCH = 256


def run(config: Rank) -> None:
    """Prints the scores and writes the rankings. Raises `UserError` for a corpus without
    questions."""
    settings = config.retrieval
    check_kind(settings.retriever)
    corpus = open_corpus(config.corpus, config.seed, needs_questions=False)
    questions = corpus.questions
    if not questions:
        raise UserError(
            f"{config.corpus.corpus} has no questions to rank for (questions.jsonl, or queries.jsonl and qrels)"
        )
    embedder = functools.cache(lambda: open_embedder(settings))
    scorer = None if settings.reranker is None else open_scorer(settings.reranker)
    store = build_store(
        corpus.passages, settings.retriever, settings.engine, embedder, recall=settings.recall
    )
    retriever = open_retriever(
        store,
        settings.retriever,
        embedder,
        scorer,
        max(settings.candidates, _DEPTH * settings.k),
        settings.dense_weight,
    )
    found = {}
    for start in range(0, len(questions), _BATCH):
        batch = questions[start : start + _BATCH]
        for question, hits in zip(
            batch, retriever.search([q.text for q in batch], _DEPTH * settings.k), strict=True
        ):
            found[question.id] = [(hit.passage, hit.score) for hit in hits]
    rankings = {id: by_document(hits, settings.k) for id, hits in found.items()}
    documents = {passage.id: passage.document for passage in corpus.passages}
    judged = [
        (rankings[q.id], {documents[id] for id in q.passages}) for q in questions if q.passages
    ]
    for name, metric in (
        ("nDCG", functools.partial(score.ndcg, k=settings.k)),
        ("MAP", score.average_precision),
        ("MRR", score.reciprocal_rank),
        ("recall", score.recall),
        ("success", score.recall_at_k),
    ):
        values = [metric([document for document, _ in ranking], gold) for ranking, gold in judged]
        print(f"{name}@{settings.k} %: {percent(mean_score(values).to_json())} (n={len(values)})")
    if config.out:
        out = Path(config.out)
        write_atomic(out / "run.trec", to_trec(rankings, f"kafjax-{settings.retriever}").encode())
        write_json(
            out / "retrieval.json",
            to_flashrag(questions, {id: hits[: settings.k] for id, hits in found.items()}),
        )
        print(f"written: {out / 'run.trec'}, {out / 'retrieval.json'}")


def main() -> None:
    build.start(Rank, run)


if __name__ == "__main__":
    main()
