"""The configuration of `experiments.plan_pod`."""

from __future__ import annotations

import dataclasses

from kafjax.core.config import Config, option
from kafjax.models import REMAT
from kafjax.training.optimizers import OPTIMIZERS


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
