"""Opens what a configuration names: the corpus, the model, its weights on a mesh, the lab of the
methods. And starts a main."""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from absl import flags
from jax.sharding import Mesh
from tokenizers import Tokenizer

from experiments.configs.shared import FLOAT, OFF, ON, ModelConfig
from kafjax import hub
from kafjax.core import paths, trees
from kafjax.core.command_line import command_of, define, from_flags
from kafjax.core.config import Config, changed, leaves
from kafjax.core.config_record import config_hash, read_record
from kafjax.core.errors import UserError, run_main
from kafjax.core.help import asked_for, help_text
from kafjax.core.progress import Progress, say, waiting
from kafjax.core.records import Corpus, Question
from kafjax.core.rundir import Run, read_object
from kafjax.corpus import CorpusConfig
from kafjax.generation.config import GenerationConfig, limit_for
from kafjax.hub import cache_dir
from kafjax.hub.chat import ChatTemplate
from kafjax.hub.text import check_ids, content, prompt_ids
from kafjax.lora import Spec
from kafjax.methods import Lab, Settings
from kafjax.methods.examples import check_texts
from kafjax.models import Decoder
from kafjax.ops import quantized
from kafjax.ops.attention import NAMES, kernel_for
from kafjax.parallel import make_mesh, shard, shardings
from kafjax.prompts import shots
from kafjax.prompts.dialogue import Dialogue
from kafjax.prompts.prompt import Plain
from kafjax.training import TrainConfig
from kafjax.training.demand import auto_mesh
from kafjax.training.task import place_frozen

C = TypeVar("C", bound=Config)
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
CORPUS_HASH, CHAT_TEMPLATE = "corpus_hash", "chat_template"
"""Keys of config.json beside the settings: what a folder of documents holds, and the fingerprint of
the template that is asked through."""


def start(
    experiment: type[C], run: Callable[[C], Any], base: Callable[[], Mapping[str, Any]] = dict
) -> None:
    """Runs an experiment as a program: its flags, then `run(config)`, then the exit code.

    Args:
      base: called once flags are parsed; values by flag that stand where no flag was given.
    """

    def main(_: list[str]) -> None:
        values = dict(base())
        if flags.FLAGS.config is not None:
            values |= read_config(experiment, paths.as_path(flags.FLAGS.config))
        run(from_flags(experiment, values))

    if asked_for(sys.argv[1:]):
        print(f"{sys.modules['__main__'].__doc__}\n{help_text(experiment)}", end="")
        return
    define(experiment)
    pin_precision()
    run_main(main)


def read_config(experiment: type[Config], file: Path) -> dict[str, Any]:
    """Reads the settings by flag of a run's config.json. Raises `UserError` for one of another
    experiment."""
    return read_record(experiment, read_object(file), file, ignore={CORPUS_HASH, CHAT_TEMPLATE})


def next_command(module: str, experiment: type[Config], config: Config, **changes: Any) -> str:
    """Writes the command line of an experiment with every setting of `config` that it knows, but
    for a name, which would be taken.

    Args:
      changes: values by flag that differ from those of `config`; None leaves one at its default.
    """
    known = {leaf.flag for leaf in leaves(experiment())}
    values = {leaf.flag: leaf.of(config) for leaf in leaves(config) if leaf.flag in known}
    return command_of(module, experiment, {**values, "name": None, **changes})


def pin_precision() -> None:
    """Has products of float32 arrays computed in float32.

    TPUs would round the operands to bfloat16, and GPUs to 19 bits (TF32), unless asked not to.
    Products of bfloat16 arrays stay as they are.
    """
    jax.config.update("jax_default_matmul_precision", "highest")


def corpus_identity(config: CorpusConfig, corpus: Corpus) -> dict[str, str]:
    """Returns the part of a run's identity that the settings do not say: the contents of a corpus
    that is not generated.

    The place that a text was read from is left out, and so is how it was cut: passages show that.
    """
    if config.is_generated:
        return {}
    contents = dataclasses.asdict(corpus)
    if not contents["supervised_questions"]:
        del contents["supervised_questions"]  # older releases had no such field
    for text in (*contents["documents"], *contents["passages"]):
        for name in ("source", "cuts", "format"):
            text.pop(name, None)
    return {CORPUS_HASH: config_hash(contents)}


def with_limit(config: C, corpus: Corpus, tokenizer: Tokenizer, *, label: str) -> C:
    """Returns a configuration that says how long replies may be: as the corpus's answers need,
    unless `--max_new_tokens` is given."""
    generation: GenerationConfig = getattr(config, "settings", config).generation
    if generation.max_new_tokens is not None:
        return config
    answers = {
        answer for question in (*corpus.questions, *corpus.retention) for answer in question.answers
    }
    lengths = [len(content(tokenizer, answer)) for answer in answers]
    limit = limit_for(lengths)
    if lengths:
        say(
            label,
            f"accepted answers have up to {max(lengths)} tokens: replies may have {limit} (--max_new_tokens)",
        )
    return changed(config, max_new_tokens=limit)


def open_template(model: str, chat: str) -> ChatTemplate | None:
    """Opens the chat template that `--chat` asks for. Raises `UserError` for `on` and a folder
    without one."""
    if chat == OFF:
        return None
    # long the first time, when it is unpacked; nothing afterwards
    with waiting("model", f"reading what {model} is", after=1.0):
        template = hub.chat_template(model)
    if template is None and chat == ON:
        raise UserError(
            f"--chat=on: {model} has no chat template (chat_template.jinja, or in tokenizer_config.json); leave --chat out"
        )
    return template


def chat_identity(template: ChatTemplate | None) -> dict[str, str]:
    """Returns the part of a run's identity that says how its model is asked; nothing for plain
    text."""
    return {} if template is None else {CHAT_TEMPLATE: template.fingerprint}


def asked_through(
    template: ChatTemplate | None, model: Decoder, tokenizer: Tokenizer
) -> tuple[Decoder, Plain | Dialogue]:
    """Returns the model, which ends its replies with its turn, and how it is asked.

    Raises:
      UserError: a token of the template is none of the model's.
    """
    if template is None:
        return model, Plain()
    end = tokenizer.token_to_id(template.end)
    if end is None:
        raise UserError(
            f"the chat template ends a reply with '{template.end}', which tokenizer.json does not have; ask with --chat=off"
        )
    check_ids(
        [end, *prompt_ids(tokenizer, template.asked(["?"]))],
        model.config.vocab_size,
        "the chat template",
    )
    return dataclasses.replace(model, config=model.config.ending_with(end)), Dialogue(template)


def suited(prompts: Plain | Dialogue, questions: Iterable[Question]) -> Plain | Dialogue:
    """Returns prompts whose worked examples hold no answer to any of the questions."""
    return dataclasses.replace(prompts, shots=shots.choose(questions))


def asked_of(corpus: Corpus) -> Iterator[Question]:
    """Yields all questions that a corpus asks or trains on."""
    return itertools.chain(
        corpus.questions,
        corpus.training_questions,
        corpus.retention,
        corpus.replay_questions,
        corpus.supervised_questions,
    )


def open_mesh(
    mesh: str, model: Decoder, train: TrainConfig, spec: Spec | None = None, *, label: str
) -> Mesh:
    """Makes the mesh of a training. Raises `UserError` for one that these devices do not make
    up."""
    if mesh != "auto":
        return make_mesh(mesh)
    chosen, reason = auto_mesh(model, train, spec)
    say(label, f"mesh {reason}")
    return chosen


def use_compilation_cache() -> None:
    """Keeps compiled programs beside the converted weights, so that the second run starts at once.

    The small ones, too: loading writes each shape of a parameter by a program of a tenth of a
    second. A folder that the user gave JAX (JAX_COMPILATION_CACHE_DIR) is kept.
    """
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(cache_dir() / "xla"))
    least = "jax_persistent_cache_min_compile_time_secs"
    jax.config.update(least, min(getattr(jax.config, least), 0.05))


def describe_decoder(config: ModelConfig, *, in_lanes: bool = False) -> Decoder:
    """Opens the model without its weights; `in_lanes` where it trains as lanes, whose attention is
    always XLA's. Raises `UserError` for a model that writes no text."""
    with waiting("model", f"reading what {config.model} is", after=1.0):
        model = hub.describe_decoder(config.model, dtype=DTYPES[config.dtype])
    kernel = NAMES[kernel_for(config.attention, jax.default_backend())]
    of_lanes = f", of lanes in training by {NAMES['xla']}" if in_lanes else ""
    say("model", f"attention among new tokens by {kernel}{of_lanes}")
    return dataclasses.replace(model, attention=config.attention)


def abstract_params(config: ModelConfig, model: Decoder) -> trees.Tree:
    """Shapes and dtypes of the model's parameters in float32, kernels as `config.base` says."""
    params = model.abstract_params()
    return params if config.base == FLOAT else quantized.abstract(params, config.base)


def load_weights(config: ModelConfig, abstract: trees.Tree) -> trees.Tree:
    """Loads the weights in the dtypes and places of `abstract`. Each device reads its own part."""
    use_compilation_cache()
    with waiting("model", f"loading {config.model}"):
        return hub.load_params(config.model, abstract)


def open_lab(
    config: ModelConfig,
    settings: Settings,
    mesh: str,
    run: Run,
    corpus: Corpus,
    template: ChatTemplate | None,
    *,
    trains: bool,
    index: str | None = None,
    log: Callable[..., None] | None = None,
) -> Lab:
    """Loads the language model and lays everything out for the methods.

    Args:
      trains: whether weights are trained, so that they are kept in float32. Else they lie as they
        are computed with: in --dtype.
      index: folder of an index that is there, searched instead of one of the run's own.
      log: takes the rows of metrics.jsonl (default: the run's own).
    """
    given = None if index is None else paths.as_path(index)
    if given is not None and not given.is_dir():
        raise UserError(
            f"--index={index} is no folder; make one with experiments.build_index --corpus=DIR --out={index}"
        )
    tokenizer = hub.tokenizer(config.model)
    model, prompts = asked_through(template, describe_decoder(config), tokenizer)
    _ = model.config.text_end  # refused before weights are loaded: every method ends its replies
    placed = open_mesh(mesh, model, settings.train, label="model")
    params: Any = abstract_params(config, model)
    with waiting("model", "checking the corpus against its vocabulary", after=5.0):
        check_texts(corpus, tokenizer, model.config.vocab_size)
    abstract = (
        shard(params, shardings(model.axes(), params, placed))
        if trains
        else place_frozen(model, params, placed)
    )
    return Lab(
        model=model,
        params=load_weights(config, abstract),
        mesh=placed,
        tokenizer=tokenizer,
        corpus=corpus,
        settings=settings,
        folder=run.file("artifacts"),
        log=log or run.log,
        progress=lambda label, total: Progress(label, total, unit="passage"),
        prompts=suited(prompts, asked_of(corpus)),
        index=given,
    )
