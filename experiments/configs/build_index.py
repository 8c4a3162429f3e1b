"""The configuration of `experiments.build_index`."""

from __future__ import annotations

import dataclasses

from kafjax.core.config import Config, nested, option
from kafjax.corpus import CorpusConfig
from kafjax.retrieval.config import RetrievalConfig


@dataclasses.dataclass(frozen=True)
class BuildIndex(Config):
    """An index of passages, made, changed or asked. Without a corpus, one that is there is changed
    or asked."""

    corpus: CorpusConfig = nested(CorpusConfig(corpus="", held_out=0), without=("held_out",))
    seed: int = option(0, "Seed of the generated corpus.", least=0, most=2**31 - 1)
    out: str | None = option(None, "Folder of the index.", record=False, path=True, bucket=True)
    retrieval: RetrievalConfig = nested(RetrievalConfig())
    append: str | None = option(
        None, "File of documents to add, in the format of corpus.jsonl.", record=False, path=True
    )
    delete: tuple[str, ...] = option((), "Ids of documents or passages to remove.", record=False)
    query: str | None = option(None, "Text to search for.", record=False)
