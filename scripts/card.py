"""The model card of an export: its sources, its training and the scores of its run. README.md, as
the Hugging Face hub shows it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.configs.compare import Compare
from experiments.configs.finetune import Finetune
from experiments.configs.sweep_lora import SweepLora
from kafjax import lora
from kafjax.core.command_line import command_of
from kafjax.core.records import Prediction
from kafjax.core.rundir import read_object
from kafjax.core.schema import read, read_rows
from kafjax.core.text import visible
from kafjax.evaluation.intervals import mean_score
from kafjax.evaluation.results import ordered
from kafjax.training.took import Took

_SHOWN = (
    "corpus",
    "lr",
    "lr_lora",
    "lr_full",
    "epochs",
    "steps",
    "batch_rows",
    "seq_len",
    "optimizer",
    "replay",
    "base",
    "dtype",
    "seed",
)
_READ = {
    "peft": "PeftModel.from_pretrained(base, FOLDER)",
    "transformers": "AutoModelForCausalLM.from_pretrained(FOLDER)",
}


def model_card(base: str, library: str, trained: Path | None, spec: lora.Spec | None) -> str:
    """Writes the card.

    Args:
      base: name of the base model.
      library: "peft" or "transformers", which loads the export.
      trained: the folder that a training left, of a run, a lane or a method; None for an adapter
        from elsewhere.
      spec: of the adapter; None for a model that was trained in full.
    """
    around = [] if trained is None else [trained, *trained.parents[:2]]
    run = next((folder for folder in around if (folder / "config.json").is_file()), None)
    stored = {} if run is None else read_object(run / "config.json")
    kind = (
        "all weights"
        if spec is None
        else "a LoRA adapter" + ("" if library == "peft" else ", merged into the weights")
    )
    settings = {key: stored[key] for key in _SHOWN if stored.get(key) not in (None, "", 0.0)}
    if spec is not None:
        settings |= {
            "rank": spec.rank,
            "alpha": spec.alpha,
            "targets": spec.targets,
            "variant": _variant(spec),
        }
    parts = [
        f"---\nbase_model: {json.dumps(base)}\nlibrary_name: {library}\ntags: [{'lora, ' if spec is not None else ''}kafjax]\n---",
        f"# {visible(base)}, fine-tuned\n\nTrained with kafjax: {kind}. Load it with `{_READ[library]}`.",
        _table(("setting", "value"), [(name, str(value)) for name, value in settings.items()]),
    ]
    if run is not None and trained is not None:
        if "chat_template" in stored:
            parts.append("Questions were trained and asked through the chat template of the base.")
        parts.append(_scores(run, trained))
        parts.append(f"Command:\n\n```\n{visible(_command(stored))}\n```")
    return "\n\n".join(filter(None, parts)) + "\n"


def _variant(spec: lora.Spec) -> str:
    on = [name for name in ("rslora", "dora") if getattr(spec, name)] + (
        [] if spec.init == lora.Spec().init else [spec.init]
    )
    return ", ".join(on) or "plain"


def _command(stored: Mapping[str, Any]) -> str:
    """The command of the run that left this record."""
    if "method" in stored:
        return command_of("experiments.finetune", Finetune, stored)
    if "ranks" in stored:
        return command_of("experiments.sweep_lora", SweepLora, stored)
    return command_of("experiments.compare", Compare, stored)


def _scores(run: Path, trained: Path) -> str:
    """Lists the measured scores: answers of a lane or a method, or the loss of a training. Empty if
    nothing was measured."""
    files = (trained / "predictions.jsonl", run / "arms" / trained.name / "predictions.jsonl")
    if file := next((file for file in files if file.is_file() and file.parent != run), None):
        predictions = read_rows(Prediction, file)
        rows = []
        for split in ordered(dict.fromkeys(p.split for p in predictions)):
            found = mean_score([p.correct for p in predictions if p.split == split])
            rows.append(
                (
                    split,
                    f"{100 * found.value:.1f} [{100 * found.low:.0f}, {100 * found.high:.0f}]",
                    str(found.n),
                )
            )
        return _table(("questions", "answered right, % (95% interval)", "number"), rows)
    if (run / "result.json").is_file() and (
        took := read(Took, run / "result.json")
    ).final_loss is not None:
        return f"Final loss: {took.final_loss:.3f} nats per token, after {took.steps} steps on {took.tokens:,} tokens."
    return ""


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(
        "| " + " | ".join(visible(cell).replace("|", "\\|") for cell in line) + " |"
        for line in lines
    )
