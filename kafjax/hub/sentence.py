"""Files beside a sentence encoder's `config.json`: how token states become a vector, prompts, the
longest text.

    modules.json                        Transformer -> Pooling -> Dense, ... -> Normalize, each with a folder
    1_Pooling/config.json               which tokens: mean, cls, max, ... in the keys of today or of years ago
    2_Dense/{config.json, model.safetensors}
    sentence_bert_config.json           the longest text in tokens (else tokenizer_config.json); whether texts are lower-cased
    config_sentence_transformers.json   prompts before queries and documents; the similarity

A folder without `modules.json` is pooled by the mean, as sentence-transformers does. A setting that
is not computed here is refused by name, since ignoring it would change the vectors.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.numpy

from kafjax.core import trees
from kafjax.core.errors import UserError, nearest
from kafjax.core.rundir import read_json, read_object
from kafjax.models import EncoderConfig
from kafjax.models.config import DenseConfig
from kafjax.models.pooling import ACTIVATIONS, MODES

_OLD_MODES = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
"""Keys of one switch a mode, in the order in which their vectors are joined."""
_QUERY, _DOCUMENT = ("query",), ("document", "passage", "corpus")
"""Names that prompts have, the first one that is there."""


def read_sentence_config(folder: Path, config: EncoderConfig) -> EncoderConfig:
    """Completes an encoder's configuration from the files beside it.

    Raises:
      UserError: naming file and setting, for a module, mode, activation or similarity that is not
        computed here.
    """
    if (folder / "modules.json").exists():
        config = dataclasses.replace(config, **_modules(folder, config))
    beside = _object(folder / "sentence_bert_config.json")
    longest = beside.get("max_seq_length")
    if longest is None and isinstance(
        told := _object(folder / "tokenizer_config.json").get("model_max_length"), int
    ):
        longest = max(min(told, config.max_length), 3)  # 10^30 stands there for none
    if longest is not None and not (isinstance(longest, int) and 3 <= longest):
        raise UserError(
            f"{folder / 'sentence_bert_config.json'}: max_seq_length={longest!r} must be a whole number, 3 or more"
        )
    about = _object(folder / "config_sentence_transformers.json")
    prompts = about.get("prompts") or {}
    if not (
        isinstance(prompts, dict) and all(isinstance(text, str | None) for text in prompts.values())
    ):
        raise UserError(
            f"{folder / 'config_sentence_transformers.json'}: prompts must be texts by name"
        )
    default = prompts.get(about.get("default_prompt_name")) or ""
    similarity = about.get("similarity_fn_name") or "cosine"
    if similarity not in ("cosine", "dot") and not (similarity == "euclidean" and config.normalise):
        raise UserError(
            f"{folder / 'config_sentence_transformers.json'}: similarity_fn_name='{similarity}' is not computed; cosine and dot are"
        )
    found = dataclasses.replace(
        config,
        # the cosine does not change, and an index compares by products
        normalise=config.normalise or similarity == "cosine",
        longest=None if longest is None else min(longest, config.max_length),
        lower_case=bool(beside.get("do_lower_case", False)),
        query_prompt=_first(prompts, _QUERY, default),
        document_prompt=_first(prompts, _DOCUMENT, default),
    )
    if not found.pools_prompt and (found.query_prompt or found.document_prompt):
        raise UserError(
            f"{folder}: include_prompt=false leaves the prompt out of the pooling, which is not computed here"
        )
    return found


def read_scoring(
    folder: Path, settings: Mapping[str, Any], config: EncoderConfig
) -> tuple[EncoderConfig, str]:
    """Reads what makes a cross-encoder's score of its logit, and how long its pairs may be.

    Args:
      settings: config.json.

    Returns:
      The configuration with `longest`, and the name of an activation in `ACTIVATIONS`.

    Raises:
      UserError: the folder is no cross-encoder of one label, or has a setting that is not computed
        here.
    """
    made_as = settings.get("architectures")
    if made_as != ["BertForSequenceClassification"]:
        raise UserError(
            f"{folder} is no reranker: config.json says architectures={made_as!r}, BertForSequenceClassification is needed"
        )
    labels = settings.get("id2label", {"0": "", "1": ""})
    if not isinstance(labels, dict) or len(labels) != 1:
        raise UserError(
            f"{folder}: a reranker has one label, this classifier has {len(labels) if isinstance(labels, dict) else labels!r}"
        )
    beside = _object(folder / "config_sentence_transformers.json")
    if any((beside.get("prompts") or {}).values()):
        raise UserError(
            f"{folder / 'config_sentence_transformers.json'}: prompts of a cross-encoder are not computed here"
        )
    older = settings.get("sentence_transformers") or {}
    name = (
        beside.get("activation_fn")
        or older.get("activation_fn")
        or settings.get("sbert_ce_default_activation_function")
        or "sigmoid"
    )
    activation = str(name).rsplit(".", 1)[-1].lower()
    if activation not in ("identity", "sigmoid"):
        raise UserError(
            f"{folder}: activation_fn '{activation[:60]}' is not computed for a score; identity and sigmoid are"
        )
    about, tokenizer = (
        _object(folder / "sentence_bert_config.json"),
        _object(folder / "tokenizer_config.json"),
    )
    told = about.get("max_seq_length", tokenizer.get("model_max_length"))
    longest = (
        min(told, config.max_length) if isinstance(told, int) and told >= 5 else config.max_length
    )
    return dataclasses.replace(
        config, longest=longest, lower_case=bool(about.get("do_lower_case", False))
    ), activation


def read_dense(folder: Path, config: EncoderConfig) -> list[trees.Tree]:
    """Reads the weights of the dense layers: `{"kernel": [in, out], "bias": [out]}` each, float32.

    Raises:
      UserError: a file that is missing, damaged or of another shape.
    """
    layers = []
    for layer in config.dense:
        path = folder / layer.path / "model.safetensors"
        try:
            tensors = safetensors.numpy.load_file(path)
        except Exception as error:  # the library raises nothing narrower
            raise UserError(f"{path}: missing or damaged ({str(error)[:100]})") from error
        wanted = {
            "linear.weight": (layer.n_out, layer.n_in),
            **({"linear.bias": (layer.n_out,)} if layer.bias else {}),
        }
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        if shapes != wanted:
            raise UserError(f"{path}: holds {shapes}, its config.json says {wanted}")
        made = {"kernel": tensors["linear.weight"].T.astype("float32")}
        layers.append(
            made | ({"bias": tensors["linear.bias"].astype("float32")} if layer.bias else {})
        )
    return layers


def _modules(folder: Path, config: EncoderConfig) -> dict[str, Any]:
    listed = read_json(folder / "modules.json")
    if not (
        isinstance(listed, list)
        and listed
        and all(isinstance(m, dict) and isinstance(m.get("type"), str) for m in listed)
    ):
        raise UserError(f"{folder / 'modules.json'}: must be a list of modules with a type each")
    found: dict[str, Any] = {"pooling": None, "dense": (), "normalise": False}
    for i, module in enumerate(listed):
        kind, path = module["type"].rsplit(".", 1)[-1], str(module.get("path", ""))
        if ".." in Path(path).parts or Path(path).is_absolute():
            raise UserError(
                f"{folder / 'modules.json'}: path '{path[:60]}' leads out of the folder"
            )
        if kind == "Transformer" and i == 0:
            if path:
                raise UserError(
                    f"{folder / 'modules.json'}: the encoder lies in '{path}'; give that folder's files to the top one"
                )
        elif (
            kind == "Pooling"
            and found["pooling"] is None
            and not found["dense"]
            and not found["normalise"]
        ):
            found |= _pooling(folder / path / "config.json")
        elif kind == "Dense" and found["pooling"] is not None and not found["normalise"]:
            size = (
                found["dense"][-1].n_out
                if found["dense"]
                else config.hidden_size * len(found["pooling"])
            )
            found["dense"] = (*found["dense"], _dense(folder, path, size))
        elif kind == "Normalize" and found["pooling"] is not None:
            found["normalise"] = True
        else:
            raise UserError(
                f"{folder / 'modules.json'}: module {i}, {kind}, is not computed here, or not at this place"
            )
    if found["pooling"] is None:
        raise UserError(f"{folder / 'modules.json'}: there is no Pooling, so texts have no vector")
    return found


def _pooling(file: Path) -> dict[str, Any]:
    about = _object(file, needed=True)
    modes = about.get("pooling_mode")
    if modes is None:
        modes = [mode for key, mode in _OLD_MODES.items() if about.get(key)]
    modes = (modes,) if isinstance(modes, str) else tuple(modes) if isinstance(modes, list) else ()
    if not modes:
        raise UserError(f"{file}: no pooling mode is on")
    for mode in modes:
        if mode not in MODES:
            raise UserError(
                f"{file}: pooling mode '{str(mode)[:60]}' is not computed. {nearest(str(mode), MODES)}"
            )
    return {"pooling": modes, "pools_prompt": bool(about.get("include_prompt", True))}


def _dense(folder: Path, path: str, size: int) -> DenseConfig:
    file = folder / path / "config.json"
    about = _object(file, needed=True)
    activation = str(about.get("activation_function", "tanh")).rsplit(".", 1)[-1].lower()
    odd = {
        "use_residual": False,
        "module_input_name": "sentence_embedding",
        "module_output_name": "sentence_embedding",
    }
    for name, usual in odd.items():
        if about.get(name) not in (None, usual):
            raise UserError(f"{file}: {name}={about[name]!r} is not computed here")
    if activation not in ACTIVATIONS:
        raise UserError(
            f"{file}: activation_function '{activation[:60]}' is not computed. {nearest(activation, ACTIVATIONS)}"
        )
    n_in, n_out = about.get("in_features"), about.get("out_features")
    if n_in != size or not (isinstance(n_out, int) and 0 < n_out <= 2**20):
        raise UserError(
            f"{file}: in_features={n_in!r}, out_features={n_out!r}; {size} features come in"
        )
    return DenseConfig(path, n_in, n_out, bool(about.get("bias", True)), activation)


def _object(file: Path, needed: bool = False) -> Mapping[str, Any]:
    return read_object(file) if needed or file.exists() else {}


def _first(prompts: Mapping[str, str | None], names: tuple[str, ...], default: str) -> str:
    return next((prompts[name] or "" for name in names if name in prompts), default)
