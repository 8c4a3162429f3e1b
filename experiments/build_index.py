"""Builds, grows and asks an index of passages: what retrieval needs to know of a corpus, in a folder that may be moved.

    python -m experiments.build_index --corpus=DIR --out=INDEX               embeds the documents of a folder (no questions needed)
    python -m experiments.build_index --corpus=biographies --out=INDEX       or those of a generated corpus
    python -m experiments.build_index --out=INDEX --query="Who makes maps?"  the nearest passages, with their scores
    python -m experiments.build_index --out=INDEX --append=NEW.jsonl         more documents, a {"id", "contents"} a line, without a rebuild
    python -m experiments.build_index --out=INDEX --delete=17,18#2           fewer: ids of documents, or of single passages

Documents are cut into passages by --chunk. --delete comes before --append, so that both together replace a document, and --query last.
A change appears whole or not at all; a folder that holds anything but an index is left alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from experiments import build
from experiments.configs import BuildIndex
from kafjax import hub
from kafjax.core.errors import UserError, nearest
from kafjax.core.progress import Progress
from kafjax.core.records import Passage
from kafjax.core.text import visible
from kafjax.corpus import CorpusConfig, load_passages, open_corpus
from kafjax.models import Encoder
from kafjax.retrieval import Embedder, Store, folder, open_index
from kafjax.retrieval.folder import size_on_disk


def run(config: BuildIndex) -> None:
    """Builds an index, or changes and asks the one that is there.

    Raises:
      UserError: anything that the user can mend, before the index is touched.
    """
    if not config.out:
        raise UserError("say where the index is, or shall be: --out=FOLDER")
    out = Path(config.out)
    build.use_compilation_cache()
    changes = bool(config.append or config.delete)
    opens = not config.corpus.corpus and bool(changes or config.query)
    writes = not opens or changes
    embedder = _open_embedder(config.retrieval.embedder)
    # From before it is read until it is saved: a change that another process makes meanwhile would be lost.
    with folder.writing(out) if writes else contextlib.nullcontext():
        store = Store.load(out, embedder.fingerprint) if opens else _build(config, embedder)
        if config.delete:
            store.delete(_passage_ids(config.delete, store.index.ids))
        if config.append:
            passages = load_passages(config.append, config.corpus.chunk)
            with _timed(len(passages)):
                store.append(passages, _embed(embedder, passages))
        if writes:
            store.save(out)
            size = f"{len(store)} passages, {store.index.dimension} dimensions, {store.index.engine}, {size_on_disk(out):,} bytes"
            print(f"{out}: {size}")
    if config.query:
        for rank, (passage, score) in enumerate(_search(store, embedder, config.query, config.retrieval.k), 1):
            print(f"{rank:3d}. {score:.3f}  [{visible(passage.id)}] {visible(passage.text)}")


def _open_embedder(name: str) -> Embedder:
    model, params = hub.load(name)
    if not isinstance(model, Encoder):
        raise UserError(f"--embedder={name} is a language model; an encoder is needed (minilm, or a folder of a BERT model)")
    return Embedder(model, params, hub.tokenizer(name))


def _build(config: BuildIndex, embedder: Embedder) -> Store:
    corpus = dataclasses.replace(config.corpus, corpus=config.corpus.corpus or CorpusConfig().corpus)
    passages = open_corpus(corpus, config.seed).passages if corpus.is_generated else load_passages(corpus.corpus, corpus.chunk)
    index = open_index(config.retrieval.engine)
    with _timed(len(passages)):
        index.build([passage.id for passage in passages], _embed(embedder, passages))
    return Store(index, passages, embedder.fingerprint)


def _embed(embedder: Embedder, passages: Sequence[Passage]) -> np.ndarray:
    """Unit vectors of the passages, `[N, D]`."""
    done = 0
    with Progress("embedding", len(passages), unit="passage") as bar:

        def on_progress(now: int, _: int) -> None:
            nonlocal done
            bar.advance(now - done)
            done = now

        return embedder.embed_documents([passage.text for passage in passages], on_progress)


@contextlib.contextmanager
def _timed(n_passages: int) -> Iterator[None]:
    began = time.perf_counter()
    yield
    seconds = time.perf_counter() - began
    print(f"embedded and indexed {n_passages} passages in {seconds:.1f} s, {n_passages / seconds:.0f} passages/s")


def _passage_ids(given: Sequence[str], ids: Sequence[str]) -> list[str]:
    """The ids of passages that are meant by ids of documents or passages."""
    of_document: dict[str, list[str]] = {}
    for id in ids:
        of_document.setdefault(id, []).append(id)
        of_document.setdefault(id.rpartition("#")[0], []).append(id)
    for name in given:
        if name not in of_document:
            raise UserError(f"--delete: no document or passage '{name}' in the index. {nearest(name, of_document)}")
    return list(dict.fromkeys(id for name in given for id in of_document[name]))


def _search(store: Store, embedder: Embedder, query: str, k: int) -> list[tuple[Passage, float]]:
    query_1xD = embedder.embed_queries([query])
    (passages,), scores_1xK = store.search(query_1xD, k), store.index.search(query_1xD, k)[1]
    return list(zip(passages, scores_1xK[0].tolist(), strict=True))


def main() -> None:
    build.start(BuildIndex, run)


if __name__ == "__main__":
    main()
