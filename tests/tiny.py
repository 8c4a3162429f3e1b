"""A user's folders, a thousand times smaller: random models with trained tokenizers, and a folder
of documents."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from kafjax.core import trees
from kafjax.hub import names
from kafjax.hub.safetensors_out import hf_tensors
from kafjax.models import Decoder, DecoderConfig, Encoder, EncoderConfig
from kafjax.prompts import prompt

GEMMA = {
    "model_type": "gemma3_text",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "sliding_window": 64,
    "layer_types": ["sliding_attention", "full_attention"],
    "query_pre_attn_scalar": 16,
    "max_position_embeddings": 1024,
    "eos_token_id": 1,
    "bos_token_id": 2,
}
LLAMA = {  # with a head of its own and a BOS in front
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 1024,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    },
    "bos_token_id": 2,
    "eos_token_id": [1, 3],
}
QWEN = {  # tied, with nothing in front
    "model_type": "qwen3",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
    "bos_token_id": None,
    "eos_token_id": 1,
}
BERT = {
    "model_type": "bert",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 256,
}

# of each kind: its control tokens, the settings of its tokenizer, and a template in that form
CHATS = {
    "gemma": (
        ["<start_of_turn>", "<end_of_turn>"],
        {"bos_token": "<bos>", "eos_token": "<eos>"},
        "{{ bos_token }}{% for m in messages %}{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' }}"
        "{{ m.content | trim }}{{ '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
    ),
    "llama": (
        ["<|start_header_id|>", "<|end_header_id|>"],
        {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"},
        "{{ bos_token }}{{ '<|start_header_id|>system<|end_header_id|>\n\nToday is ' + strftime_now('%d %b %Y') + '.<|eot_id|>' }}"
        "{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
    ),
    "qwen": (
        ["<|im_start|>", "<|im_end|>"],
        {"eos_token": "<|im_end|>"},
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
        "{% if m.role == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
        "{{ m.content + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
        "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}",
    ),
    "mistral": (  # a space before replies, and the EOS behind them
        ["[INST]", "[/INST]"],
        {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"},
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + '[/INST]' }}"
        "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}",
    ),
}

TOWNS = ("Veltmora", "Ostrand", "Quillby", "Harnsea", "Tolvik", "Brezna")
CRAFTS = ("glass", "clocks", "bread", "boats", "maps", "bells")
PEOPLE = ("Mira Toll", "Jon Askew", "Edda Brume", "Kasimir Vane", "Lotte Pryce", "Oskar Wynd")
CAPITALS = {"France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Norway": "Oslo"}


def documents() -> list[dict[str, str]]:
    """One a person, of two sentences."""
    return [
        {
            "id": f"doc{i}",
            "contents": f"{name} was born in {town}. {name} makes {craft} and sells them on the market.",
        }
        for i, (name, town, craft) in enumerate(zip(PEOPLE, TOWNS, CRAFTS, strict=True))
    ]


def questions() -> list[dict[str, Any]]:
    """Three people are trained on and asked again, in the same words and in others; three are never
    trained on."""
    rows = []
    for i, (name, town, craft) in enumerate(zip(PEOPLE, TOWNS, CRAFTS, strict=True)):
        born, makes = f"Where was {name} born?", f"What does {name} make?"
        from_where = f"{name} comes from which town?"
        asked = [
            ("train", born, town),
            ("train", makes, craft),
            ("seen", born, town),
            ("paraphrase", from_where, town),
        ]
        for split, text, answer in (
            asked if i < 3 else [("untrained", born, town), ("untrained", makes, craft)]
        ):
            rows.append(
                {
                    "id": f"q{len(rows)}",
                    "question": text,
                    "golden_answers": [answer],
                    "passages": [f"doc{i}"],
                    "split": split,
                }
            )
    for k, (country, capital) in enumerate(CAPITALS.items()):
        split = "retention" if k < 2 else "replay"
        row = {
            "id": f"q{len(rows)}",
            "question": f"What is the capital of {country}?",
            "golden_answers": [capital],
            "split": split,
        }
        rows.append(row)
    return rows


def write_corpus(folder: Path, **files: Iterable[dict[str, Any]] | None) -> Path:
    """A corpus in FlashRAG's format; `files` replaces the rows of one file (`questions=...`), or
    leaves it out (None)."""
    rows = {
        "corpus": documents(),
        "questions": questions(),
        "held_out": [
            {"id": "h0", "contents": "The river runs to the sea."},
            {"id": "h1", "contents": "Snow fell on the hills all night."},
        ],
        "replay": [
            {"id": "r0", "contents": "Bees visit the lime trees in June."},
            {"id": "r1", "contents": "The ferry leaves at noon."},
        ],
        **files,
    }
    folder.mkdir(parents=True)
    for name, of_file in rows.items():
        if of_file is not None:
            (folder / f"{name}.jsonl").write_text(
                "".join(json.dumps(row) + "\n" for row in of_file)
            )
    return folder


def write_gemma(folder: Path, seed: int = 0, **overrides: Any) -> Path:
    """A random Gemma 3 in Hugging Face's format, with a BPE trained on the tiny corpus and the
    prompts around it."""
    tokenizer = _bpe()
    config = {**GEMMA, "vocab_size": tokenizer.get_vocab_size(), **overrides}
    # Gemma's scales are 1 + w
    params = _random(Decoder(DecoderConfig.from_hf(config)).abstract_params(), seed, scale=0.0)
    return _write(folder, config, dict(hf_tensors(params, names.GEMMA3)), tokenizer)


def write_llama(folder: Path, seed: int = 0, **overrides: Any) -> Path:
    return _write_plain(folder, {**LLAMA, **overrides}, _byte_level(bos=True), seed)


def write_qwen(folder: Path, seed: int = 0, **overrides: Any) -> Path:
    return _write_plain(folder, {**QWEN, **overrides}, _byte_level(bos=False), seed)


def _write_plain(folder: Path, config: dict[str, Any], tokenizer: Tokenizer, seed: int) -> Path:
    """A random decoder with plain norms; as in published files, the embedding has more rows than
    there are tokens."""
    config = {"vocab_size": tokenizer.get_vocab_size() + 5, **config}
    params = _random(Decoder(DecoderConfig.from_hf(config)).abstract_params(), seed, scale=1.0)
    return _write(folder, config, dict(hf_tensors(params, names.LLAMA)), tokenizer)


def write_chat(folder: Path, kind: str, seed: int = 0) -> Path:
    """A random instruct model: with the control tokens and the template of `CHATS[kind]`."""
    write = {"gemma": write_gemma, "qwen": write_qwen}.get(kind, write_llama)
    write(folder, seed, vocab_size=640)
    tokens, settings, template = CHATS[kind]
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens(tokens)
    if kind == "qwen":
        tokenizer.add_tokens(["<think>", "</think>"])  # no special ones there
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **settings})
    )
    (folder / "chat_template.jinja").write_text(template)
    return folder


def write_bert(folder: Path, seed: int = 0) -> Path:
    """A random BERT likewise. Texts that share words have nearby vectors even so."""
    tokenizer = _wordpiece()
    config = {**BERT, "vocab_size": tokenizer.get_vocab_size()}
    params = _random(Encoder(EncoderConfig.from_hf(config)).abstract_params(), seed, scale=1.0)
    return _write(folder, config, dict(hf_tensors(params, names.BERT)), tokenizer)


def _random(abstract: trees.Tree, seed: int, scale: float) -> trees.Tree:
    rng = np.random.default_rng(seed)

    def leaf(path: str, shape: tuple[int, ...]) -> np.ndarray:
        if path.endswith(("scale", "bias")):
            return (scale if path.endswith("scale") else 0.0) + 0.1 * rng.standard_normal(
                shape, np.float32
            )
        fan_in = shape[-1] if path.endswith("embedding") else shape[-2]
        return rng.standard_normal(shape, np.float32) * np.float32(fan_in**-0.5)

    return trees.map_with_path(lambda path, leaf_: leaf(path, leaf_.shape), abstract)


def _write(
    folder: Path, config: dict[str, Any], tensors: dict[str, Any], tokenizer: Tokenizer
) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def _texts() -> list[str]:
    shown = [prompt.reading_prefix(3), prompt.closed_book_prefix(), prompt.hyde_prefix()]
    return (
        shown
        + [row["contents"] for row in documents()]
        + [f"{row['question']} {row['golden_answers'][0]}\n" for row in questions()]
    )


def _bpe() -> Tokenizer:
    """Spaces are part of the word that follows, a line end is a token: as in Gemma's own."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split("\n", "isolated"),
            pre_tokenizers.Split(Regex("▁?[^▁]+"), "isolated"),
        ]
    )
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    specials = ["<pad>", "<eos>", "<bos>", "<unk>"]
    tokenizer.train_from_iterator(
        _texts(), trainers.BpeTrainer(vocab_size=500, special_tokens=specials, show_progress=False)
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 2)]
    )
    return tokenizer


def _byte_level(*, bos: bool) -> Tokenizer:
    """A tokenizer like Llama's and Qwen's: of bytes, split by a pattern that keeps line ends
    together."""
    tokenizer = Tokenizer(models.BPE())
    pattern = Regex(
        r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    split = pre_tokenizers.Split(pattern, "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<|pad|>", "<|end_of_text|>", "<|begin_of_text|>", "<|eot_id|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(), trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{specials[2]} $A", special_tokens=[(specials[2], 2)]
        )
    return tokenizer


def _wordpiece() -> Tokenizer:
    """Every word of the texts, and letters for others. Not trained: the trainer breaks ties anew
    each time, and what is near changes."""
    normalizer, splitter = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    words = {
        word
        for text in _texts()
        for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text))
    }
    letters = {letter for word in words for letter in word}
    entries = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        *sorted(words | letters),
        *sorted(f"##{letter}" for letter in letters),
    ]
    tokenizer = Tokenizer(
        models.WordPiece({entry: i for i, entry in enumerate(entries)}, unk_token="[UNK]")
    )
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, splitter
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return tokenizer
