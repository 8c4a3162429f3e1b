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
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from absl import flags

from experiments import common
from kafjax import hub
from kafjax.core.errors import UserError, nearest, run_main
from kafjax.core.progress import Progress
from kafjax.core.records import Passage
from kafjax.corpus import NAMES as GENERATED
from kafjax.corpus import load_passages
from kafjax.models import Encoder
from kafjax.retrieval import Embedder, Store, folder, open_index
from kafjax.retrieval.folder import size_on_disk

common.define_corpus_flags()
flags.adopt_module_key_flags(common)
flags.DEFINE_integer("seed", 0, "Seed of the generated corpus.")
flags.DEFINE_string("out", None, "Folder of the index.", required=True)
flags.DEFINE_string("embedder", "minilm", "Embedding model, the same at every call for one index: minilm, or a folder of a BERT model.")
flags.DEFINE_string("engine", "auto", "Index engine: auto (ScaNN where it is installed), scann, exact.")
flags.DEFINE_string("append", None, "File of documents to add, in the format of corpus.jsonl.")
flags.DEFINE_list("delete", [], "Ids of documents or passages to remove.")
flags.DEFINE_string("query", None, "Text to search for.")
flags.DEFINE_integer("k", 5, "Passages to find.", lower_bound=1)


def main(_: list[str]) -> None:
    values = flags.FLAGS
    out = Path(values.out)
    common.use_compilation_cache()
    opens = not values["corpus"].present and (values.append or values.delete or values.query)
    writes = not opens or values.delete or values.append
    embedder = _open_embedder()
    # From before it is read until it is saved: a change that another process makes meanwhile would be lost.
    with folder.writing(out) if writes else contextlib.nullcontext():
        store = Store.load(out, embedder.fingerprint) if opens else _build(out, embedder)
        if values.delete:
            store.delete(_passage_ids(values.delete, store.index.ids))
        if values.append:
            passages = load_passages(values.append, values.chunk)
            with _timed(len(passages)):
                store.append(passages, _embed(embedder, passages))
        if writes:
            store.save(out)
            size = f"{len(store)} passages, {store.index.dimension} dimensions, {store.index.engine}, {size_on_disk(out):,} bytes"
            print(f"{out}: {size}")
    if values.query:
        for rank, (passage, score) in enumerate(_search(store, embedder, values.query, values.k), 1):
            print(f"{rank:3d}. {score:.3f}  [{passage.id}] {passage.text}")


def _open_embedder() -> Embedder:
    name = flags.FLAGS.embedder
    model, params = hub.load(name)
    if not isinstance(model, Encoder):
        raise UserError(f"--embedder={name} is a language model; an encoder is needed (minilm, or a folder of a BERT model)")
    return Embedder(model, params, hub.tokenizer(name))


def _build(out: Path, embedder: Embedder) -> Store:
    generated = flags.FLAGS.corpus in GENERATED
    passages = common.corpus_from_flags().passages if generated else load_passages(flags.FLAGS.corpus, flags.FLAGS.chunk)
    index = open_index(flags.FLAGS.engine)
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

        return embedder.embed([passage.text for passage in passages], on_progress)


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
    query_1xD = embedder.embed([query])
    (passages,), scores_1xK = store.search(query_1xD, k), store.index.search(query_1xD, k)[1]
    return list(zip(passages, scores_1xK[0].tolist(), strict=True))


if __name__ == "__main__":
    run_main(main)
