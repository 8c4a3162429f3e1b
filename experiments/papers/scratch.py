"""Small models made for a paper: a random decoder with a tokenizer of its own, trained on texts that
no run asks about.

A rank can only be too small for what there is to learn where both are small. So papers about
capacity and about learning rates train models of some hundred thousand parameters, whose base is
made here once and lies in a folder like any other model.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from experiments import finetune
from experiments.configs.finetune import Finetune
from experiments.configs.paper import FULL, GPU, TINY
from kafjax import hub
from kafjax.core import trees
from kafjax.core.config import changed
from kafjax.core.progress import say
from kafjax.core.rundir import new_folder, write_jsonl
from kafjax.corpus.biographies import people
from kafjax.corpus.facts import fill, stream
from kafjax.corpus.people import ATTRIBUTES
from kafjax.models import Decoder, DecoderConfig

_SPECIAL = ("<pad>", "<eos>", "<bos>")


@dataclasses.dataclass(frozen=True)
class Shape:
    """Size of a scratch model: a decoder of Llama's form with heads of 32."""

    width: int = 64
    layers: int = 2
    vocabulary: int = 1024


SHAPES = {TINY: Shape(64, 2, 1024), GPU: Shape(256, 4, 4096), FULL: Shape(512, 8, 8192)}


def facts(n: int, seed: int, attribute: int = 0) -> list[dict[str, object]]:
    """Questions for one attribute of `n` invented people, each with its answer, as rows of
    questions.jsonl to train on."""
    asked = ATTRIBUTES[attribute]
    return [
        {
            "id": f"{person.id}/{asked.name}",
            "question": fill(asked.questions[0], person.name),
            "golden_answers": list(person.facts[asked.name]),
            "split": "train",
        }
        for person in people(n, attribute + 1, seed)
    ]


def shuffled(rows: Sequence[dict[str, object]], seed: int = 0) -> list[dict[str, object]]:
    """Deals the answers out anew: a sabotage that leaves nothing to be known from one training to
    the next."""
    answers = [row["golden_answers"] for row in rows]
    stream(seed, "shuffled").shuffle(answers)
    return [{**row, "golden_answers": answer} for row, answer in zip(rows, answers, strict=True)]


def write_facts(folder: Path, rows: Iterable[dict[str, object]]) -> Path:
    """Writes a corpus of training questions alone, once."""
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with new_folder(folder) as made:
            write_jsonl(made / "corpus.jsonl", [{"id": "none", "contents": "Nothing."}])
            write_jsonl(made / "questions.jsonl", rows)
    return folder


def base_beside(
    folder: Path, scale: str, rows: Iterable[dict[str, object]], n_others: int, others: Path
) -> Path:
    """Makes a base that was trained on `n_others` other people, whose corpus is `others`, and whose
    tokenizer has seen `rows`, too."""
    theirs = facts(n_others, seed=1)
    texts = (
        f"Question: {row['question']}\nAnswer: {row['golden_answers'][0]}\n"
        for row in [*theirs, *rows]
    )
    return base(folder, SHAPES[scale], write_facts(others, theirs), texts, epochs=20)


def base(folder: Path, shape: Shape, corpus: Path, texts: Iterable[str], epochs: int) -> Path:
    """Makes a base, once: random weights and a tokenizer of `texts`, trained in full on a corpus.

    Returns `folder`, which holds a model in Hugging Face's format.
    """
    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    say("scratch", f"making the base {folder.name} of width {shape.width}")
    with tempfile.TemporaryDirectory(prefix="kafjax-scratch-") as made:
        random = Path(made) / "random"
        hub.save(random, *_random(shape), tokenizer=_write(_tokenizer(texts, shape), Path(made)))
        config = changed(
            Finetune(),
            model=str(random),
            corpus=str(corpus),
            method="full",
            freeze_embedding=False,
            lr=2e-3,
            epochs=epochs,
            batch_rows=32,
            retention=0,
            held_out=0,
            runs=made,
            name="pretrained",
        )
        finetune.run(config)
        model, params = hub.load_decoder(str(random))
        trained = hub.load_trained(Path(made) / "pretrained", params)
        hub.save(folder, model, trained, tokenizer=random)
    return folder


def _random(shape: Shape) -> tuple[Decoder, trees.Tree]:
    heads = shape.width // 32
    model = Decoder(
        DecoderConfig.from_hf(
            {
                "model_type": "llama",
                "vocab_size": shape.vocabulary,
                "hidden_size": shape.width,
                "intermediate_size": 4 * shape.width,
                "num_hidden_layers": shape.layers,
                "num_attention_heads": heads,
                "num_key_value_heads": heads,
                "head_dim": 32,
                "max_position_embeddings": 512,
                "bos_token_id": _SPECIAL.index("<bos>"),
                "eos_token_id": _SPECIAL.index("<eos>"),
                "tie_word_embeddings": True,
            }
        )
    )
    rng = np.random.default_rng(0)

    def leaf(path: str, shape_: tuple[int, ...]) -> jax.Array:
        if path.endswith("scale"):
            return jnp.ones(shape_)
        fan_in = shape_[-1] if path.endswith("embedding") else shape_[-2]
        return jnp.asarray(rng.standard_normal(shape_, np.float32) * np.float32(fan_in**-0.5))

    return model, trees.map_with_path(
        lambda path, like: leaf(path, like.shape), model.abstract_params()
    )


def _tokenizer(texts: Iterable[str], shape: Shape) -> Tokenizer:
    """Trains a tokenizer of bytes on the texts. Every model of one set of texts has the same."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=shape.vocabulary,
        special_tokens=list(_SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", _SPECIAL.index("<bos>"))]
    )
    return tokenizer


def _write(tokenizer: Tokenizer, folder: Path) -> Path:
    folder.joinpath("tokenizer").mkdir()
    tokenizer.save(str(folder / "tokenizer" / "tokenizer.json"))
    return folder / "tokenizer"
