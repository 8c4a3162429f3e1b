"""The parts that configurations of several experiments share: the model, the run's folder, its
processes, and flags that are declared once."""

from __future__ import annotations

import dataclasses

from kafjax.core.config import Config, option
from kafjax.ops.attention import ATTENTION
from kafjax.ops.quantized import FORMATS
from kafjax.parallel.distributed import TIMEOUT_SECONDS

FLOAT = "float"
AUTO, ON, OFF = "auto", "on", "off"
MESH = "Devices by axis, such as data:2,fsdp:2,tensor:2. auto: chosen by formula, with the reason."


def budget_flag() -> str | None:
    """Declares `--budget`. It is no part of a record: the passes that it picks are."""
    return option(
        None,
        "Time that training may take, such as 90s, 20m or 1.5h: passes are picked that fit (of a generated corpus subjects, too). "
        "The forecast is rough.",
        record=False,
    )


def index_flag(help: str) -> str | None:
    """Declares `--index`, whose use differs between experiments, which `help` explains."""
    return option(None, help, path=True, bucket=True, added=True)


def chat_flag() -> str:
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
    chat: str = chat_flag()


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
