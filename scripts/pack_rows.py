"""Packs a corpus into rows of tokens on disk, for `finetune --rows=FOLDER`: what does not fit into memory as tokens.

    python scripts/pack_rows.py --corpus=tfds:biographies --model=gemma3-270m --seq_len=1024 --out=rows

Documents are read in the order of the corpus, then the training questions; some thousands at a time are packed, the longest first.
Training reads the rows in an order drawn anew each epoch.
Needs: pip install 'kafjax[data]'
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from pathlib import Path

from absl import flags

from experiments import common
from kafjax import hub
from kafjax.core.errors import UserError, run_main
from kafjax.core.progress import Progress
from kafjax.methods.examples import stream_examples
from kafjax.training import Example
from kafjax.training.packed import longest_first, write_rows

common.define_corpus_flags()
flags.adopt_module_key_flags(common)
flags.DEFINE_string("model", "gemma3-270m", "Language model whose tokenizer is used: gemma3-270m, or a folder.")
flags.DEFINE_integer("seq_len", 128, "Tokens per row; longer texts are cut into pieces.", lower_bound=2)
flags.DEFINE_integer("seed", 0, "Seed of a generated corpus.", lower_bound=0)
flags.DEFINE_string("out", None, "Folder to make.")


def main(_: list[str]) -> None:
    values = flags.FLAGS
    if not values.out:
        raise UserError("say where to: --out=FOLDER")
    tokenizer, model = hub.tokenizer(values.model), hub.describe_decoder(values.model)
    corpus = common.corpus_from_flags()
    with Progress("packing", len(corpus.documents) + len(corpus.training_questions), unit="text") as bar:

        def examples() -> Iterator[Example]:
            for example in stream_examples(corpus, tokenizer, model.config.eos_id):
                bar.advance(1)
                yield example

        about = {"corpus": corpus.name, "tokenizer": zlib.crc32(tokenizer.to_str().encode())}
        found = write_rows(Path(values.out), longest_first(examples()), values.seq_len, about)
    print(f"{values.out}: {found['rows']} rows of {found['seq_len']} tokens, {100 * found['padding']:.2f}% of them padding")


if __name__ == "__main__":
    run_main(main)
