"""The workshop that all methods of a comparison share: one base model, one generator, one index,
one folder for what is learned."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from tokenizers import Tokenizer

from kafjax import hub
from kafjax.core import trees
from kafjax.core.errors import UserError
from kafjax.core.lock import hold
from kafjax.core.programs import program
from kafjax.core.progress import Advance, unshown, waiting
from kafjax.core.records import Corpus, Passage
from kafjax.core.rundir import write_json
from kafjax.core.schema import Amount, Count, read
from kafjax.evaluation.cost import DecoderShape, encoder_flops
from kafjax.generation import Generator
from kafjax.methods.settings import Settings
from kafjax.models import Decoder, Encoder
from kafjax.prompts import prompt
from kafjax.prompts.prompt import Prompts
from kafjax.retrieval.embed import Embedder
from kafjax.retrieval.kinds import (
    HYBRID,
    LEXICAL,
    build_store,
    changes,
    check_kind,
    embed_passages,
    open_retriever,
)
from kafjax.retrieval.mirror import fetched
from kafjax.retrieval.rerank import CrossScorer, open_scorer
from kafjax.retrieval.retriever import Retriever
from kafjax.retrieval.scann_index import ScannIndex
from kafjax.retrieval.store import Store
from kafjax.training import make_batch, text_example
from kafjax.training.batches import pack
from kafjax.training.demand import decoder_shape
from kafjax.training.memory import PeakMemory
from kafjax.training.objective import loss


@dataclasses.dataclass(frozen=True)
class IndexRecord:
    """Cost of building an index: `built.json`."""

    seconds: Amount
    engine: str
    flops: Amount
    peak_memory_bytes: Count


@dataclasses.dataclass(frozen=True)
class Lab:
    """The state that methods learn and answer with. Only the cached properties change: they are
    made on first use.

    Attributes:
      mesh: on which `params` lie, and on which methods train and answer.
      folder: keeps trained weights, adapters and the index, for a run that is resumed.
      log: takes rows for `metrics.jsonl`.
      progress: `progress(label, total)` gives a context manager with `advance(n)`, a progress bar.
      index: a store that was made elsewhere. It is searched instead of one in `folder`, and never
        changed.
      prompts: how the model is asked, in training and in answering: as plain text, or as turns of a
        chat.
    """

    model: Decoder
    params: trees.Tree
    mesh: Mesh
    tokenizer: Tokenizer
    corpus: Corpus
    settings: Settings
    folder: Path
    log: Callable[..., None]
    progress: Callable[[str, int], Any]
    prompts: Prompts = prompt
    index: Path | None = None

    def over(self, corpus: Corpus, folder: Path) -> Lab:
        """Returns a lab with the same models over another corpus, which keeps what it learns in
        `folder`. Models that are loaded stay loaded."""
        other = dataclasses.replace(self, corpus=corpus, folder=folder)
        for name in ("generator", "embedder", "scorer"):
            if name in self.__dict__:
                other.__dict__[name] = self.__dict__[name]
        return other

    @property
    def embedder_name(self) -> str:
        """The embedding model, as the user named it."""
        return self.settings.retrieval.embedder

    @functools.cached_property
    def generator(self) -> Generator:
        config = self.settings.generation
        return Generator(self.model, self.tokenizer, config.batch, self.mesh, config.batch_tokens)

    @functools.cached_property
    def embedder(self) -> Embedder:
        with waiting("model", f"loading {self.embedder_name}", after=5.0):
            model, params = hub.load(self.embedder_name)
        if not isinstance(model, Encoder):
            raise UserError(
                f"'{self.embedder_name}' is no encoder; --embedder needs one (minilm, or a folder of a BERT model)"
            )
        dtype = self.settings.retrieval.embedder_dtype
        return Embedder(model, params, hub.tokenizer(self.embedder_name), dtype=dtype)

    @functools.cached_property
    def store(self) -> Store:
        """The passages and their index: `index`, or one in the folder, built once and from then on
        brought up to the corpus."""
        if self.index is not None:
            return self._open_given(self.index)
        path = self.folder / "index"
        if not (path / "built.json").exists():
            with hold(path):
                if not (path / "built.json").exists():
                    return self._build_store(path)
        store = Store.load(path / "store", self._encoder)
        if not any(changes(store, self.corpus.passages)):
            return store
        with hold(path):
            return self._update_store(path / "store", has_vectors=store.index is not None)

    @property
    def _encoder(self) -> str | None:
        """Fingerprint of the encoder of queries; None where words alone are searched."""
        return None if self.settings.retrieval.retriever == LEXICAL else self.embedder.fingerprint

    def _open_given(self, path: Path) -> Store:
        store, config = Store.load(path, self._encoder), self.settings.retrieval
        if store.index is not None and config.engine not in ("auto", store.index.engine):
            raise UserError(
                f"--engine={config.engine}: --index={path} is of engine {store.index.engine}; leave --engine out"
            )
        if isinstance(store.index, ScannIndex) and config.recall not in (None, store.index.recall):
            raise UserError(
                f"--recall={config.recall}: --index={path} was built with {store.index.recall or 'none'}; leave --recall out"
            )
        if self.corpus.passages:
            gone, new = changes(store, self.corpus.passages)
            if differing := [*gone, *(passage.id for passage in new)]:
                told = f"{len(differing)} differ, such as '{min(differing)}'"
                raise UserError(
                    f"--index={path} does not hold the passages of {self.corpus.name}: {told}; build it again, or leave it out"
                )
        return store

    def _update_store(self, path: Path, *, has_vectors: bool) -> Store:
        """Embeds what the corpus has that the store has not, and saves that beside it; `built.json`
        stays the bill of the first build."""
        store = Store.load(path, self.embedder.fingerprint if has_vectors else None)
        gone, new = changes(store, self.corpus.passages)
        with self.progress("indexing new passages", len(new)) as bar:
            vectors = (
                embed_passages(self.embedder, new, bar.advance) if has_vectors and new else None
            )
        store.delete(gone)
        if new:
            store.upsert(new, vectors)
        store.save(path)
        return store

    def _build_store(self, path: Path) -> Store:
        passages, config = self.corpus.passages, self.settings.retrieval
        began = time.perf_counter()
        with PeakMemory() as peak, self.progress("indexing passages", len(passages)) as bar:
            store = build_store(
                passages,
                config.retriever,
                config.engine,
                lambda: self.embedder,
                bar.advance,
                recall=config.recall,
            )
        seconds = time.perf_counter() - began
        store.save(path / "store")
        write_json(  # last: an index with this file is whole
            path / "built.json",
            {
                "seconds": seconds,
                "engine": config.retriever if store.index is None else store.index.engine,
                "flops": 0.0 if store.index is None else self.embedding_flops(passages),
                "peak_memory_bytes": peak.n_bytes,
            },
        )
        return store

    @functools.cached_property
    def scorer(self) -> CrossScorer | None:
        """The cross-encoder that reads passages again; None without `--reranker`."""
        reranker = self.settings.retrieval.reranker
        return None if reranker is None else open_scorer(reranker)

    @functools.cached_property
    def retriever(self) -> Retriever:
        """The retriever that finds passages for questions."""
        config = self.settings.retrieval
        return open_retriever(
            self.store,
            config.retriever,
            lambda: self.embedder,
            self.scorer,
            config.candidates,
            config.dense_weight,
        )

    def check_retriever(self) -> None:
        """Raises `UserError` for models that cannot find or rerank passages here, before anything
        is built."""
        check_kind(self.settings.retrieval.retriever)
        if self.settings.retrieval.retriever != LEXICAL:
            _ = self.embedder
        _ = self.scorer
        if self.index is not None:
            _ = self.retriever

    @property
    def retriever_note(self) -> str:
        """A name of the retriever, in words."""
        config, dense = (
            self.settings.retrieval,
            f"{self.embedder_name} + {self.index_record.engine}",
        )
        weight = config.dense_weight
        fused = "ranks fused" if weight is None else f"scores weighted {weight:g} to {1 - weight:g}"
        found = {LEXICAL: "BM25", HYBRID: f"{dense} and BM25, {fused}"}.get(config.retriever, dense)
        ranked = (
            ""
            if config.reranker is None
            else f", the best of {config.candidates} by {config.reranker}"
        )
        made = (
            ""
            if self.index is None
            else f" in {self.index}, whose seconds and memory are not on this bill"
        )
        return f"{found}{made}{ranked}"

    @property
    def store_folder(self) -> Path:
        """The folder of this machine that the passages and their index lie in."""
        return fetched(self.folder / "index" / "store" if self.index is None else self.index)

    @property
    def index_record(self) -> IndexRecord:
        """Reads the cost of building the index. Of one made elsewhere only the FLOPs are known.
        Raises `UserError` for a damaged record."""
        if self.index is not None:
            engine, flops = (
                (LEXICAL, 0.0)
                if self.store.index is None
                else (self.store.index.engine, self.embedding_flops(self.corpus.passages))
            )
            return IndexRecord(seconds=0.0, engine=engine, flops=flops, peak_memory_bytes=0)
        path = self.folder / "index" / "built.json"
        return read(IndexRecord, path, fix=f"delete {path.parent} to build it again")

    def embedding_flops(self, passages: Sequence[Passage]) -> float:
        """Computes the FLOPs of embedding passages, by formula."""
        model, params = hub.load(self.embedder_name)
        kernels = {
            path: leaf for path, leaf in trees.flatten(params).items() if path.endswith("kernel")
        }
        lengths = [
            min(n, self.embedder.max_length)
            for n in self.embedder.lengths([p.text for p in passages])
        ]
        config = model.config
        return sum(
            encoder_flops(
                trees.count(trees.unflatten(kernels)), config.n_layers, config.hidden_size, n, n
            )
            for n in lengths
        )

    @functools.cached_property
    def shape(self) -> DecoderShape:
        """Sizes of the decoder that the cost formulas need."""
        return decoder_shape(self.model)

    def held_out_nll(
        self, params: trees.Tree, advance: Advance = unshown
    ) -> tuple[list[float], list[int]]:
        """Computes the summed negative log-likelihood (nats) and the number of predicted tokens of
        each held-out text."""
        examples = [
            text_example(self.tokenizer, text, self.model.config.text_end)
            for text in self.corpus.held_out_texts
        ]
        length = max((len(e.tokens) for e in examples), default=0)
        nll, tokens = [], []
        for example in examples:
            batch = make_batch(
                pack([example], length), seq_len=length, batch_rows=1, capacity=length
            )
            total, weight = _text_loss(self.generator.model, params, batch)
            nll.append(float(total))
            tokens.append(int(weight))
            advance(1)
        return nll, tokens


@program()
def _text_loss(model: Decoder, params: trees.Tree, batch: Any) -> tuple[jax.Array, jax.Array]:
    return loss(model, params, batch)
