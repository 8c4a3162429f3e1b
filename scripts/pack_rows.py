"""Packs a corpus into rows of tokens on disk, for `finetune --rows=FOLDER`: what does not fit into
memory as tokens.

    python scripts/pack_rows.py --corpus=tfds:biographies --model=gemma3-270m --seq_len=1024 --out=rows

Documents are read in the order of the corpus, then the training questions; some thousands at a time
are packed, the longest first. A directory's documents are read one at a time and tokenized on all
cores, so a corpus need not fit into memory. Training reads the rows in an order drawn anew each
epoch. The folder also keeps the questions that are only asked, so training needs nothing else.
Needs: pip install 'kafjax[data]'
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from experiments import build
from experiments.configs.finetune import Finetune
from experiments.configs.pack_rows import PackRows
from kafjax import hub
from kafjax.core.config import leaves
from kafjax.core.errors import UserError
from kafjax.core.progress import Progress
from kafjax.corpus import stream_corpus
from kafjax.methods.examples import stream_examples
from kafjax.training import Example
from kafjax.training.packed import longest_first, tokenizer_checksum, write_rows


def run(config: PackRows) -> None:
    """Writes the folder. Raises `UserError` where there is nothing to pack, or it cannot be
    written."""
    if not config.out:
        raise UserError("say where to: --out=FOLDER")
    template, tokenizer = (
        build.open_template(config.model, config.chat),
        hub.tokenizer(config.model),
    )
    model, prompts = build.asked_through(template, hub.describe_decoder(config.model), tokenizer)
    corpus = stream_corpus(config.corpus, config.seed)
    n_texts = (
        None if corpus.n_documents is None else corpus.n_documents + len(corpus.training_questions)
    )
    with Progress("packing", n_texts, unit="text") as bar:

        def examples() -> Iterator[Example]:
            for example in stream_examples(
                corpus, tokenizer, model.config.vocab_size, model.config.text_end, prompts
            ):
                bar.advance(1)
                yield example

        source = {
            "corpus": corpus.name,
            "tokenizer": tokenizer_checksum(tokenizer),
            "questions": corpus.questions,
        }
        source |= build.chat_identity(template)
        about = write_rows(Path(config.out), longest_first(examples()), config.seq_len, **source)
    told = (
        f"{about.rows} rows of {about.seq_len} tokens, {100 * about.padding:.2f}% of them padding"
    )
    print(f"{config.out}: {told}; {len(corpus.questions)} questions to ask afterwards")
    packed = {"rows": config.out, "seq_len": about.seq_len}
    packed |= {leaf.flag: None for leaf in leaves(config.corpus)}  # rows stand for their corpus
    print(f"Next: {build.next_command('experiments.finetune', Finetune, config, **packed)}")


def main() -> None:
    build.start(PackRows, run)


if __name__ == "__main__":
    main()
