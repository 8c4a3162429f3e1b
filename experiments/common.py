"""Flags that the experiments share, and what is built from them."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags
from jax.sharding import Mesh

from kafjax import hub
from kafjax.core import trees
from kafjax.core.progress import Progress, say, waiting
from kafjax.core.records import Corpus
from kafjax.core.rundir import Run, config_hash
from kafjax.corpus import NAMES as GENERATED
from kafjax.corpus import load as load_corpus
from kafjax.hub import cache_dir
from kafjax.lora import Spec
from kafjax.methods import Lab, Settings, train_config
from kafjax.models import Decoder
from kafjax.ops.quantized import FORMATS, quantize_params
from kafjax.parallel import make_mesh, shard, shardings
from kafjax.training import TrainConfig
from kafjax.training.demand import auto_mesh

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
_DEFAULTS = Settings()

REMAT_HELP = (
    "What of each layer is kept for the backward pass: none is computed again, all but products with kernels "
    "(dots), or all (full: least memory, about a third more work; offload: its inputs go to the host's memory, on a TPU or GPU)."
)


def define_model_flags() -> None:
    flags.DEFINE_string("model", "gemma3-270m", "Language model: gemma3-270m, or a folder of one of the families in docs/models.md.")
    flags.DEFINE_string("embedder", "minilm", "Embedding model: minilm, or a folder of a BERT model.")
    flags.DEFINE_enum("dtype", "float32", list(DTYPES), "Type of activations. bfloat16 is faster on TPUs, GPUs and CPUs with AMX.")
    flags.DEFINE_integer("seed", 0, "Seed of the generated corpus, data order, adapter start and sampling.", lower_bound=0)
    define_base_flag()


def define_base_flag() -> None:
    flags.DEFINE_enum(
        "base",
        "float",
        ["float", *FORMATS],
        "How kernels of the base are stored: as --dtype says, or as integers beside which an adapter trains (docs/quantized.md): int8, "
        "a quarter of float32, or nf4, a seventh. Embeddings stay floats.",
    )


def define_corpus_flags() -> None:
    flags.DEFINE_string(
        "corpus",
        "biographies",
        "biographies (invented people), factbook (CIA), a folder with your documents and questions.jsonl, or a TFDS dataset (tfds:squad).",
    )
    flags.DEFINE_integer("subjects", 16, "People or countries of a generated corpus; half of them have training questions.", lower_bound=2)
    flags.DEFINE_integer("attributes", 4, "Facts per person or country of a generated corpus.", lower_bound=1)
    flags.DEFINE_integer("documents", 4, "Documents per person or country, each stating every fact in other words.", lower_bound=1)
    flags.DEFINE_integer("questions_per_fact", 2, "Wordings of the training question of each fact.", lower_bound=1)
    flags.DEFINE_integer("retention", 32, "Capitals asked to measure forgetting; as many others are there for replay.", lower_bound=0)
    flags.DEFINE_integer("held_out", 8, "Pieces of ordinary prose whose perplexity is measured.", lower_bound=0)
    flags.DEFINE_string(
        "chunk",
        None,
        "Retrieval unit: sentence, document, or a number of words (default: sentence; in a folder short documents stay whole, "
        "longer ones are cut into some 64 words).",
    )


def define_settings_flags() -> None:
    """A flag for each field of `methods.Settings` but the seed and what follows from the corpus."""
    d = _DEFAULTS
    flags.DEFINE_integer("epochs", d.epochs, "Training: passes over the corpus.", lower_bound=1)
    flags.DEFINE_float("lr_full", d.lr_full, "Training: peak learning rate of full fine-tuning.", lower_bound=0)
    flags.DEFINE_float("lr_lora", d.lr_lora, "Training: peak learning rate of LoRA (about ten times that of full).", lower_bound=0)
    flags.DEFINE_integer("rank", d.rank, "LoRA: rank of the adapter.")
    flags.DEFINE_float("alpha", d.alpha, "LoRA: alpha; the update is scaled by alpha / rank.")
    flags.DEFINE_string("targets", d.targets, "LoRA: regular expression found in the paths of the kernels to adapt.")
    flags.DEFINE_boolean("freeze_embedding", d.freeze_embedding, "Full fine-tuning: leave the embedding (and an untied head) as it is.")
    flags.DEFINE_integer("batch_rows", d.batch_rows, "Training: rows of packed tokens per step.", lower_bound=1)
    flags.DEFINE_integer("seq_len", d.seq_len, "Training: tokens per row.", lower_bound=2)
    flags.DEFINE_float("replay", d.replay, "Training: share of examples about other matters mixed in, 0 to 1. It softens forgetting.")
    flags.DEFINE_integer("checkpoint_every", d.checkpoint_every, "Training: steps between checkpoints; 0 for none.", lower_bound=0)
    flags.DEFINE_integer("k", d.k, "Retrieval: passages put in the prompt.")
    flags.DEFINE_string("engine", d.engine, "Retrieval: index engine: auto (ScaNN where it is installed), scann, exact.")
    flags.DEFINE_integer("max_new_tokens", d.max_new_tokens, "Generation: longest answer in tokens.")
    flags.DEFINE_integer("hyde_tokens", d.hyde_tokens, "HyDE: longest made-up passage in tokens.")
    flags.DEFINE_integer("batch", d.batch, "Generation: questions answered at a time.")


def settings_from_flags() -> Settings:
    values = flags.FLAGS.flag_values_dict()
    names = {field.name for field in dataclasses.fields(Settings)} - {"document_parts"}
    return Settings(**{name: values[name] for name in names}, document_parts=document_parts())


def document_parts() -> int:
    """A generated corpus says everything `documents` times over: each epoch reads one telling of it."""
    return flags.FLAGS.documents if flags.FLAGS.corpus in GENERATED else 1


def define_mesh_flag() -> None:
    flags.DEFINE_string("mesh", "auto", "Devices by axis, such as data:2,fsdp:2,tensor:2. auto: chosen by formula, with the reason.")


def mesh_from_flags(model: Decoder, config: TrainConfig, spec: Spec | None = None, *, label: str) -> Mesh:
    """That of --mesh for a training. Raises `UserError` for one that these devices do not make up."""
    if flags.FLAGS.mesh != "auto":
        return make_mesh(flags.FLAGS.mesh)
    mesh, reason = auto_mesh(model, config, spec)
    say(label, f"mesh {reason}")
    return mesh


def corpus_from_flags() -> Corpus:
    values = flags.FLAGS
    return load_corpus(
        values.corpus,
        n_subjects=values.subjects,
        n_attributes=values.attributes,
        n_documents=values.documents,
        questions_per_fact=values.questions_per_fact,
        seed=values.seed,
        chunk=values.chunk,
        n_retention=values.retention,
        n_held_out=values.held_out,
    )


@contextlib.contextmanager
def compiling() -> Iterator[list[float]]:
    """Yields a list that takes the seconds of every program that XLA compiles (or finds in its cache) within the block."""
    seconds: list[float] = []

    def on_event(event: str, duration: float, **_: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            seconds.append(duration)

    jax.monitoring.register_event_duration_secs_listener(on_event)
    try:
        yield seconds
    finally:
        jax.monitoring.unregister_event_duration_listener(on_event)


def use_compilation_cache() -> None:
    """Compiled programs are kept beside the converted weights, so that the second run starts at once.

    The small ones, too: loading writes each shape of a parameter by a program of a tenth of a second.
    """
    jax.config.update("jax_compilation_cache_dir", str(cache_dir() / "xla"))
    least = "jax_persistent_cache_min_compile_time_secs"
    jax.config.update(least, min(getattr(jax.config, least), 0.05))


def describe_decoder() -> Decoder:
    """--model in --dtype, without its weights. Raises `UserError` for a model that writes no text."""
    values = flags.FLAGS
    with waiting("model", f"reading what {values.model} is"):  # the first time it is unpacked
        return hub.describe_decoder(values.model, dtype=DTYPES[values.dtype])


def load_weights(abstract: trees.Tree) -> trees.Tree:
    """Those of --model in the dtypes and places of `abstract`, kernels as --base says. Each device reads its own part of them."""
    values = flags.FLAGS
    use_compilation_cache()
    with waiting("model", f"loading {values.model}"):
        if values.base == "float":
            return hub.load_params(values.model, abstract)
        whole = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32, sharding=x.sharding), abstract)
        return quantize_params(hub.load_params(values.model, whole), values.base)


def open_lab(run: Run, corpus: Corpus, settings: Settings) -> Lab:
    """Loads the language model and lays everything out for the methods."""
    model = describe_decoder()
    mesh = mesh_from_flags(model, train_config(settings, settings.lr_full), label="model")
    params = model.abstract_params()
    return Lab(
        model=model,
        params=load_weights(shard(params, shardings(model.axes(), params, mesh))),
        mesh=mesh,
        tokenizer=hub.tokenizer(flags.FLAGS.model),
        corpus=corpus,
        settings=settings,
        folder=run.file("artifacts"),
        log=run.log,
        progress=lambda label, total: Progress(label, total, unit="passage"),
        embedder_name=flags.FLAGS.embedder,
    )


def config_from_flags(*also: str) -> dict[str, Any]:
    """The values of the flags defined here, and of those named in `also`: what a run's identity is made of."""
    shared = [flag.name for flag in flags.FLAGS.flags_by_module_dict()[__name__] if flag.name != "mesh"]  # says where, not what
    return {name: flags.FLAGS[name].value for name in sorted({*shared, *also})}


def corpus_identity(corpus: Corpus) -> dict[str, str]:
    """What the flags do not say of a run's identity: the contents of a folder, which may change under its name."""
    return {} if flags.FLAGS.corpus in GENERATED else {"corpus_hash": config_hash(dataclasses.asdict(corpus))}


def apply_profile(profile: Mapping[str, Any]) -> None:
    """Sets flags that were not given on the command line."""
    for name, value in profile.items():
        if not flags.FLAGS[name].present:
            flags.FLAGS[name].value = value
