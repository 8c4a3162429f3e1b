"""Gemma 3 out of a GGUF file: tensors dequantised to float32, shapes, and the tokenizer rebuilt
from its pieces."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from kafjax.core.errors import UserError
from kafjax.models.config import DecoderConfig

_CONTROL, _USER_DEFINED = 3, 4  # gguf's token types


class _Reader(gguf.GGUFReader):
    """Reads the mapped file through a plain array: a million slices of `np.memmap` take twice as
    long."""

    @property
    def data(self) -> np.ndarray:
        return self._data

    @data.setter
    def data(self, mapped: np.memmap) -> None:
        self._data = mapped.view(np.ndarray)


def open_gguf(path: Path) -> gguf.GGUFReader:
    """Raises `UserError` if the file is no GGUF file or is cut short."""
    try:
        return _Reader(str(path))
    except (ValueError, IndexError, OSError) as error:
        raise UserError(f"{path.name}: damaged or truncated GGUF file ({error})") from error


def read_config(reader: gguf.GGUFReader) -> DecoderConfig:
    """Raises `UserError` if the file holds another architecture than gemma3."""

    def value(key: str) -> Any:
        if key not in reader.fields:
            raise UserError(f"GGUF file has no '{key}'")
        return reader.fields[key].contents()

    if value("general.architecture") != "gemma3":
        raise UserError(
            f"GGUF file of architecture '{value('general.architecture')}': only gemma3 is read"
        )
    n_layers, head_dim = value("gemma3.block_count"), value("gemma3.attention.key_length")
    return DecoderConfig(
        vocab_size=int(next(t.shape[1] for t in reader.tensors if t.name == "token_embd.weight")),
        hidden_size=value("gemma3.embedding_length"),
        mlp_size=value("gemma3.feed_forward_length"),
        n_layers=n_layers,
        n_heads=value("gemma3.attention.head_count"),
        n_kv_heads=value("gemma3.attention.head_count_kv"),
        head_dim=head_dim,
        # not in the file; fixed for the family
        sliding=tuple((i + 1) % 6 != 0 for i in range(n_layers)),
        window=value("gemma3.attention.sliding_window"),
        rope_theta=float(value("gemma3.rope.freq_base")),
        attention_scale=float(head_dim) ** -0.5,
        norm_eps=1e-6,  # the file has it in float32
        max_length=value("gemma3.context_length"),
        bos_id=value("tokenizer.ggml.bos_token_id"),
        eos_id=value("tokenizer.ggml.eos_token_id"),
    )


def read_tensors(reader: gguf.GGUFReader) -> Iterator[tuple[str, Any]]:
    """Yields `(name, float32 array)` one at a time."""
    for tensor in reader.tensors:
        shape = tuple(int(n) for n in reversed(tensor.shape))  # GGUF counts the fastest axis first
        yield tensor.name, gguf.dequantize(tensor.data, tensor.tensor_type).reshape(shape)


def read_tokenizer(reader: gguf.GGUFReader) -> Tokenizer:
    """The SentencePiece BPE of the file as a `tokenizers.Tokenizer` that puts BOS in front.

    The file has pieces and scores but no merges. A pair may merge whenever its joined text is a
    piece, the best score first; so the merges are all ways to cut each piece in two pieces, ordered
    by the score of the whole.
    """
    pieces = _strings(reader, "tokenizer.ggml.tokens")
    scores = _numbers(reader, "tokenizer.ggml.scores")
    types = _numbers(reader, "tokenizer.ggml.token_type")
    vocab = {piece: i for i, piece in enumerate(pieces)}
    merges = []
    for i in np.argsort(-scores, kind="stable"):
        if types[i] in (_CONTROL, _USER_DEFINED):
            continue
        piece = pieces[i]
        cuts = [
            (piece[:at], piece[at:])
            for at in range(1, len(piece))
            if piece[:at] in vocab and piece[at:] in vocab
        ]
        merges += sorted(cuts, key=lambda cut: (vocab[cut[0]], vocab[cut[1]]))
    tokenizer = Tokenizer(
        models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    added = [(p, t) for p, t in zip(pieces, types, strict=True) if t in (_CONTROL, _USER_DEFINED)]
    tokenizer.add_special_tokens(
        [AddedToken(p, normalized=False, special=True) for p, t in added if t == _CONTROL]
    )
    # "▁▁" is two spaces, too
    tokenizer.add_tokens([AddedToken(p, normalized=True) for p, t in added if t == _USER_DEFINED])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", vocab["<bos>"])]
    )
    return tokenizer


def _strings(reader: gguf.GGUFReader, key: str) -> list[str]:
    field = reader.fields[key]
    return [field.parts[i].tobytes().decode("utf-8") for i in field.data]


def _numbers(reader: gguf.GGUFReader, key: str) -> np.ndarray:
    field = reader.fields[key]
    return np.array([field.parts[i][0] for i in field.data])
