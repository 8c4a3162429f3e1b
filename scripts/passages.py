"""Lists the passages of a corpus: their ids, their place in a file, their words and how they begin.

    python scripts/passages.py --corpus=DIR                      what a question's "passages" may name, and what the index will hold
    python scripts/passages.py --corpus=DIR --chunk=sentence     cut otherwise
    python scripts/passages.py --corpus=DIR --json               whole texts, with file, headings, bytes and lines, a JSON object a line

No questions are needed, no model is loaded.
"""

from __future__ import annotations

import dataclasses
import json

from experiments import build
from experiments.configs.passages import ListPassages
from kafjax.core.text import shortened, visible
from kafjax.core.words import words
from kafjax.corpus import open_corpus


def run(config: ListPassages) -> None:
    """Prints the passages. Raises `UserError` as `corpus.load` does."""
    corpus = open_corpus(config.corpus, config.seed, needs_questions=False)
    counts = [len(words(passage.text)) for passage in corpus.passages]
    for passage, n_words in zip(corpus.passages, counts, strict=True):
        if config.json:
            print(json.dumps({**dataclasses.asdict(passage), "words": n_words}))
            continue
        source = "-" if passage.source is None else str(passage.source)
        text = shortened(" ".join(passage.text.split()), 80, str)
        print(
            "\t".join(
                visible(" ".join(cell.split())) for cell in (passage.id, source, str(n_words), text)
            )
        )
    if not config.json:
        print(
            f"{len(corpus.documents)} documents, {len(corpus.passages)} passages of {min(counts)} to {max(counts)} words"
        )


def main() -> None:
    build.start(ListPassages, run)


if __name__ == "__main__":
    main()
