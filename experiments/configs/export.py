"""The configuration of `scripts/export.py`."""

from __future__ import annotations

import dataclasses

from kafjax.core.config import Config, option


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
