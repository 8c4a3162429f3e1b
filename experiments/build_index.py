"""Builds, grows and asks an index of passages: what retrieval needs to know of a corpus, in a
folder that may be moved.

    python -m experiments.build_index --corpus=DIR --out=INDEX               embeds the documents of a folder (no questions needed)
    python -m experiments.build_index --corpus=biographies --out=INDEX       or those of a generated corpus
    python -m experiments.build_index --out=INDEX --query="Who makes maps?"  the nearest passages, with their scores
    python -m experiments.build_index --out=INDEX --query="Who makes maps?" --retriever=hybrid    by meaning and by words (BM25)
    python -m experiments.build_index --corpus=DIR --out=INDEX --retriever=lexical    for BM25 alone: no vectors, no embedding model
    python -m experiments.build_index --out=INDEX --append=NEW.jsonl         more documents, a {"id", "contents"} a line, without a rebuild
    python -m experiments.build_index --out=INDEX --delete=17,18#2           fewer: ids of documents, or of single passages
    python -m experiments.build_index --out=gs://BUCKET/INDEX ...                     in a bucket; read from a copy on this machine

Documents are cut into passages by --chunk. --delete comes before --append, so that both together
replace a document, and --query last. A change appears whole or not at all; a folder that holds
anything but an index is left alone. What a killed command has embedded lies beside it, and the same
command goes on from there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from experiments import build
from experiments.configs.build_index import BuildIndex
from kafjax import hub
from kafjax.core.errors import UserError, nearest
from kafjax.core.paths import as_path, is_address
from kafjax.core.progress import Advance, Progress
from kafjax.core.text import visible
from kafjax.corpus import CorpusConfig, load_passages, open_corpus
from kafjax.models import Encoder
from kafjax.retrieval import (
    Embedder,
    Store,
    build_store,
    folder,
    mirror,
    open_retriever,
    open_scorer,
)
from kafjax.retrieval.config import RetrievalConfig
from kafjax.retrieval.folder import size_on_disk
from kafjax.retrieval.kinds import LEXICAL, check_kind, embed_passages


def run(config: BuildIndex) -> None:
    """Builds an index, or changes and asks the one that is there.

    Raises:
      UserError: anything that the user can mend, before the index is touched.
    """
    if not config.out:
        raise UserError("say where the index is, or shall be: --out=FOLDER")
    out = as_path(config.out)
    build.use_compilation_cache()
    changes = bool(config.append or config.delete)
    opens = not config.corpus.corpus and bool(changes or config.query)
    writes = not opens or changes
    embedder = functools.cache(lambda: open_embedder(config.retrieval))
    check_kind(config.retrieval.retriever)
    home = mirror.copy_of(out) if is_address(out) else out.resolve()
    parts = home.parent / f".{home.name}.parts"
    with_vectors = config.retrieval.retriever != LEXICAL
    if with_vectors:
        embedder()  # refused before the index is touched
    scorer = None if config.retrieval.reranker is None else open_scorer(config.retrieval.reranker)
    # From before it is read until it is saved: a change that another process makes meanwhile would
    # be lost.
    with folder.writing(out) if writes else contextlib.nullcontext():
        if opens:
            store = Store.load(out, embedder().fingerprint if with_vectors else None)
        else:
            store = _build(config, embedder, parts)
        if config.delete:
            store.delete(_passage_ids(config.delete, store.ids))
        if config.append:
            passages = load_passages(config.append, config.corpus.chunk)
            if store.index is None:
                store.append(passages)
            else:
                with _timed(len(passages)) as advance:
                    vectors_MxD = embed_passages(embedder(), passages, advance, parts)
                store.append(passages, vectors_MxD)
        if writes:
            store.save(out)
            shutil.rmtree(parts, ignore_errors=True)
            vectors = (
                "no vectors"
                if store.index is None
                else f"{store.index.dimension} dimensions, {store.index.engine}"
            )
            print(
                f"{out}: {len(store)} passages, {vectors}, {size_on_disk(mirror.fetched(out)):,} bytes"
            )
            print(f"search: {store.stats.search}")
    if config.query:
        settings = config.retrieval
        retriever = open_retriever(
            store,
            settings.retriever,
            embedder,
            scorer,
            settings.candidates,
            settings.dense_weight,
        )
        (hits,) = retriever.search([config.query], settings.k)
        for rank, hit in enumerate(hits, 1):
            print(
                f"{rank:3d}. {hit.score:.3f}  [{visible(hit.passage.id)}] {visible(hit.passage.text)}"
            )
        if not hits:
            print("no passage holds a word of the query")


def open_embedder(config: RetrievalConfig) -> Embedder:
    """Loads the embedding model. Raises `UserError` for a language model."""
    name = config.embedder
    model, params = hub.load(name)
    if not isinstance(model, Encoder):
        raise UserError(
            f"--embedder={name} is a language model; an encoder is needed (minilm, or a folder of a BERT model)"
        )
    return Embedder(model, params, hub.tokenizer(name), dtype=config.embedder_dtype)


def _build(config: BuildIndex, open_embedder: Callable[[], Embedder], parts: Path) -> Store:
    corpus = dataclasses.replace(
        config.corpus, corpus=config.corpus.corpus or CorpusConfig().corpus
    )
    passages = (
        open_corpus(corpus, config.seed).passages
        if corpus.is_generated
        else load_passages(corpus.corpus, corpus.chunk)
    )
    settings = config.retrieval
    if settings.retriever == LEXICAL:
        return build_store(passages, settings.retriever, settings.engine, open_embedder)
    with _timed(len(passages)) as advance:
        return build_store(
            passages,
            settings.retriever,
            settings.engine,
            open_embedder,
            advance,
            parts,
            settings.recall,
        )


@contextlib.contextmanager
def _timed(n_passages: int) -> Iterator[Advance]:
    """Yields what is told of every n passages that are done, for a progress bar, and prints how
    long the block took."""
    began = time.perf_counter()
    with Progress("embedding", n_passages, unit="passage") as bar:
        yield bar.advance
    seconds = time.perf_counter() - began
    print(
        f"embedded and indexed {n_passages} passages in {seconds:.1f} s, {n_passages / seconds:.0f} passages/s"
    )


def _passage_ids(given: Sequence[str], ids: Sequence[str]) -> list[str]:
    """The ids of passages that are meant by ids of documents or passages."""
    of_document: dict[str, list[str]] = {}
    for id in ids:
        of_document.setdefault(id, []).append(id)
        of_document.setdefault(id.rpartition("#")[0], []).append(id)
    for name in given:
        if name not in of_document:
            raise UserError(
                f"--delete: no document or passage '{name}' in the index. {nearest(name, of_document)}"
            )
    return list(dict.fromkeys(id for name in given for id in of_document[name]))


def main() -> None:
    build.start(BuildIndex, run)


if __name__ == "__main__":
    main()
