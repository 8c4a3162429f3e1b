"""The workshop that all methods of a comparison share: one base model, one generator, one index, one folder for what is learned."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from tokenizers import Tokenizer

from kafjax import hub
from kafjax.core import trees
from kafjax.core.errors import UserError
from kafjax.core.lock import hold
from kafjax.core.progress import Advance, unshown
from kafjax.core.records import Corpus
from kafjax.core.rundir import write_json
from kafjax.core.schema import Amount, Count, read
from kafjax.evaluation.cost import DecoderShape, encoder_flops
from kafjax.generation import Generator
from kafjax.methods.settings import Settings
from kafjax.models import Decoder, Encoder
from kafjax.prompts import prompt
from kafjax.prompts.prompt import Prompts
from kafjax.retrieval.embed import Embedder
from kafjax.retrieval.kinds import HYBRID, LEXICAL, build_store, check_kind, open_retriever
from kafjax.retrieval.rerank import CrossScorer, open_scorer
from kafjax.retrieval.retriever import Retriever
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
    """The state that methods learn and answer with. Only the cached properties change: they are made on first use.

    Attributes:
      mesh: on which `params` lie, and on which methods train and answer.
      folder: keeps trained weights, adapters and the index, for a run that is resumed.
      log: takes rows for `metrics.jsonl`.
      progress: `progress(label, total)` gives a context manager with `advance(n)`, a progress bar.
      prompts: how the model is asked, in training and in answering: as plain text, or as turns of a chat.
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
        model, params = hub.load(self.embedder_name)
        if not isinstance(model, Encoder):
            raise UserError(f"'{self.embedder_name}' is no encoder; --embedder needs one (minilm, or a folder of a BERT model)")
        return Embedder(model, params, hub.tokenizer(self.embedder_name))

    @functools.cached_property
    def store(self) -> Store:
        """The index over the corpus's passages, built once or loaded from the folder."""
        path = self.folder / "index"
        if not (path / "built.json").exists():
            with hold(path):
                if not (path / "built.json").exists():
                    return self._build_store(path)
        return Store.load(path / "store", None if self.settings.retrieval.retriever == LEXICAL else self.embedder.fingerprint)

    def _build_store(self, path: Path) -> Store:
        passages, config = self.corpus.passages, self.settings.retrieval
        began = time.perf_counter()
        with PeakMemory() as peak, self.progress("indexing passages", len(passages)) as bar:
            store = build_store(passages, config.retriever, config.engine, lambda: self.embedder, bar.advance)
        seconds = time.perf_counter() - began
        store.save(path / "store")
        write_json(  # last: an index with this file is whole
            path / "built.json",
            {
                "seconds": seconds,
                "engine": config.retriever if store.index is None else store.index.engine,
                "flops": 0.0 if store.index is None else self._embedding_flops(),
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
        return open_retriever(self.store, config.retriever, lambda: self.embedder, self.scorer, config.candidates)

    def check_retriever(self) -> None:
        """Raises `UserError` for models that cannot find or rerank passages here, before anything is built."""
        check_kind(self.settings.retrieval.retriever)
        if self.settings.retrieval.retriever != LEXICAL:
            _ = self.embedder
        _ = self.scorer

    @property
    def retriever_note(self) -> str:
        """A name of the retriever, in words."""
        config, dense = self.settings.retrieval, f"{self.embedder_name} + {self.index_record.engine}"
        found = {LEXICAL: "BM25", HYBRID: f"{dense} and BM25, ranks fused"}.get(config.retriever, dense)
        return found if config.reranker is None else f"{found}, the best of {config.candidates} by {config.reranker}"

    @property
    def index_record(self) -> IndexRecord:
        """Reads the cost of building the index. Raises `UserError` for a damaged record."""
        path = self.folder / "index" / "built.json"
        return read(IndexRecord, path, fix=f"delete {path.parent} to build it again")

    def _embedding_flops(self) -> float:
        model, params = hub.load(self.embedder_name)
        kernels = {path: leaf for path, leaf in trees.flatten(params).items() if path.endswith("kernel")}
        lengths = [min(n, self.embedder.max_length) for n in self.embedder.lengths([p.text for p in self.corpus.passages])]
        config = model.config
        return sum(encoder_flops(trees.count(trees.unflatten(kernels)), config.n_layers, config.hidden_size, n, n) for n in lengths)

    @functools.cached_property
    def shape(self) -> DecoderShape:
        """Sizes of the decoder that the cost formulas need."""
        return decoder_shape(self.model)

    def held_out_nll(self, params: trees.Tree, advance: Advance = unshown) -> tuple[list[float], list[int]]:
        """Computes the summed negative log-likelihood (nats) and the number of predicted tokens of each held-out text."""
        examples = [text_example(self.tokenizer, text, self.model.config.text_end) for text in self.corpus.held_out_texts]
        length = max((len(e.tokens) for e in examples), default=0)
        nll, tokens = [], []
        for example in examples:
            batch = make_batch(pack([example], length), seq_len=length, batch_rows=1, capacity=length)
            total, weight = _text_loss(self.generator.model, params, batch)
            nll.append(float(total))
            tokens.append(int(weight))
            advance(1)
        return nll, tokens


@functools.partial(jax.jit, static_argnames="model")
def _text_loss(model: Decoder, params: trees.Tree, batch: Any) -> tuple[jax.Array, jax.Array]:
    return loss(model, params, batch)
