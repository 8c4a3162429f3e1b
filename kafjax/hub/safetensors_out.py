"""Writing of a Hugging Face folder, under the names and in the layout of the family: the inverse of
`load`.

model, params = hub.load("gemma3-270m")
hub.save("tuned", model, params, tokenizer=hub.tokenizer("gemma3-270m"))
model, params = hub.load("tuned")            # and AutoModelForCausalLM.from_pretrained("tuned") in transformers
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors.numpy
from tokenizers import Tokenizer

from kafjax.core import trees
from kafjax.core.errors import UserError
from kafjax.core.rundir import new_folder, write_json
from kafjax.hub.auto_tokenizer import VOCABULARIES
from kafjax.hub.names import TABLES, Piece, Table
from kafjax.models import Decoder, Encoder
from kafjax.ops.quantized import refuse_quantized

SHARD_BYTES = 5_000_000_000
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
TOKENIZER_FILES += (*VOCABULARIES, "merges.txt", "chat_template.json", "generation_config.json")
"""Files of a Hugging Face folder that say how text becomes tokens and a reply ends; most folders
have some of them."""


def save(
    folder: Path | str,
    model: Decoder | Encoder,
    params: trees.Tree,
    *,
    tokenizer: Tokenizer | Path | str | None = None,
    shard_bytes: int = SHARD_BYTES,
    card: str = "",
) -> None:
    """Writes a folder that `load` and transformers read: `config.json`, weights in their dtypes,
    `tokenizer.json`.

    The folder is made beside its place and renamed when it is whole, so a kill leaves none that
    looks finished. The host holds one shard at a time.

    Args:
      folder: must not exist, or be empty.
      params: those of `model`, without adapters (`lora.merge` them first).
      tokenizer: written beside the weights. If it is a folder, its files are copied unchanged, the
        chat template included. None writes no tokenizer.
      shard_bytes: weights above this are cut into several files with an index.
      card: text of README.md, the model card; none is written if empty.

    Raises:
      UserError: the folder is taken or cannot be written, parameters that are not the model's or
        are quantised, a configuration of no family, a folder without a tokenizer.
    """
    refuse_quantized(params, "a folder of weights")
    with new_folder(Path(folder)) as made:
        config = _config(model, params)
        write_tensors(
            made, hf_tensors(params, TABLES[config["model_type"]]), shard_bytes=shard_bytes
        )
        if tokenizer is not None:
            _write_tokenizer(made, tokenizer, config)
        if card:
            (made / "README.md").write_text(card, encoding="utf-8")
        write_json(made / "config.json", config)


def hf_tensors(params: trees.Tree, table: Table) -> Iterator[tuple[str, np.ndarray]]:
    """Yields `(name, contiguous array in the parameter's dtype)` one at a time, by the table of the
    family."""
    flat = trees.flatten(params)
    for name, pieces in table.pieces(params).items():
        parts = [_part(piece, flat[piece.entry.path]) for piece in pieces]
        yield name, np.ascontiguousarray(parts[0] if len(parts) == 1 else np.concatenate(parts))


def _part(piece: Piece, leaf: jax.Array) -> np.ndarray:
    value = np.asarray(leaf[piece.index] if piece.index else leaf)
    value = value - np.float32(piece.entry.offset) if piece.entry.offset else value
    return value.T if piece.entry.transpose else value


def _config(model: Decoder | Encoder, params: trees.Tree) -> dict[str, Any]:
    expected = {path: leaf.shape for path, leaf in trees.flatten(model.abstract_params()).items()}
    given = trees.flatten(params)
    for path in [*expected, *given]:
        if path not in given or path not in expected:
            raise UserError(
                f"parameter '{path}' is {'missing' if path not in given else 'no part of the model'}: it cannot be saved"
            )
        if (shape := getattr(given[path], "shape", None)) != expected[path]:
            what = (
                "carries an adapter; merge it first"
                if shape is None
                else f"has shape {list(shape)}, not {list(expected[path])}"
            )
            raise UserError(f"parameter '{path}' {what}")
    dtype = max((leaf for leaf in given.values()), key=lambda leaf: leaf.size).dtype
    return {**model.config.to_hf(), "dtype": str(dtype), "torch_dtype": str(dtype)}


def write_tensors(
    folder: Path,
    tensors: Iterable[tuple[str, np.ndarray]],
    *,
    stem: str = "model",
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes `{stem}.safetensors`, or above `shard_bytes` several files and
    `{stem}.safetensors.index.json`, which comes last."""
    shards: list[dict[str, int]] = []  # of each file, bytes by tensor
    waiting: dict[str, np.ndarray] = {}

    def flush() -> None:
        path = folder / f".{stem}-{len(shards):05d}.tmp"
        safetensors.numpy.save_file(waiting, path, metadata={"format": "pt"})
        with open(path, "rb") as file:
            os.fsync(file.fileno())
        shards.append({name: array.nbytes for name, array in waiting.items()})
        waiting.clear()

    for name, array in tensors:
        if waiting and sum(a.nbytes for a in waiting.values()) + array.nbytes > shard_bytes:
            flush()
        waiting[name] = array
    flush()
    n = len(shards)
    files = (
        [f"{stem}.safetensors"]
        if n == 1
        else [f"{stem}-{i + 1:05d}-of-{n:05d}.safetensors" for i in range(n)]
    )
    for i, file in enumerate(files):
        (folder / f".{stem}-{i:05d}.tmp").replace(folder / file)
    if n > 1:
        weight_map = {
            name: file for file, shard in zip(files, shards, strict=True) for name in shard
        }
        total = sum(sum(shard.values()) for shard in shards)
        write_json(
            folder / f"{stem}.safetensors.index.json",
            {"metadata": {"total_size": total}, "weight_map": weight_map},
        )


def _write_tokenizer(
    folder: Path, tokenizer: Tokenizer | Path | str, config: dict[str, Any]
) -> None:
    if not isinstance(tokenizer, Tokenizer):
        if not any(
            (Path(tokenizer) / name).is_file() for name in ("tokenizer.json", *VOCABULARIES)
        ):
            raise UserError(f"{tokenizer}: no tokenizer.json in it")
        for file in (Path(tokenizer) / name for name in TOKENIZER_FILES):
            if file.is_file():
                shutil.copyfile(file, folder / file.name)
        return
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    given = {name: config.get(f"{name}_id") for name in ("bos_token", "eos_token")}
    # of several ends the first
    tokens = {name: ids[0] if isinstance(ids, list) else ids for name, ids in given.items()}
    special = {
        name: tokenizer.id_to_token(i)
        for name, i in tokens.items()
        if i is not None and tokenizer.id_to_token(i) is not None
    }
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **special}, indent=2) + "\n"
    )
