"""Model cards: a run's settings, scores and command, as the Hugging Face hub reads them."""

from __future__ import annotations

import huggingface_hub
import pytest

from experiments.configs.compare import Compare
from experiments.configs.finetune import Finetune
from experiments.configs.sweep_lora import SweepLora
from kafjax import lora
from kafjax.core.config import changed
from kafjax.core.config_record import record
from kafjax.core.records import Prediction
from kafjax.core.rundir import write_json, write_jsonl
from kafjax.evaluation.score import score
from scripts.card import model_card


def answered(split, n_right, n):
    fields = {
        "method": "lora",
        "split": split,
        "question": "?",
        "answers": ("x",),
        "gold_passages": (),
    }
    return [
        score(Prediction(id=f"{split}{i}", answer="x" if i < n_right else "y", **fields)).to_json()
        for i in range(n)
    ]


@pytest.mark.parametrize(
    ("experiment", "folder", "scores", "main"),
    [
        (
            changed(Compare(), lr_lora=0.02, name="x"),
            "artifacts/lora",
            "arms/lora",
            "python -m experiments.compare --lr_lora=0.02",
        ),
        (
            changed(SweepLora(), ranks=(2, 4)),
            "lanes/r2",
            "lanes/r2",
            "python -m experiments.sweep_lora --ranks=2,4",
        ),
    ],
    ids=["comparison", "sweep"],
)
def test_scores_are_those_of_the_method_or_lane(tmp_path, experiment, folder, scores, main):
    write_json(tmp_path / "config.json", record(experiment))
    (tmp_path / folder).mkdir(parents=True)
    (tmp_path / scores).mkdir(parents=True, exist_ok=True)
    write_jsonl(
        tmp_path / scores / "predictions.jsonl",
        answered("seen", 3, 4) + answered("untrained", 0, 2),
    )
    card = huggingface_hub.ModelCard(
        model_card("org/base", "peft", tmp_path / folder, lora.Spec(rank=2, dora=True))
    )
    assert card.data.base_model == "org/base" and card.data.tags == ["lora", "kafjax"]
    assert (
        "| untrained | 0.0 [0, 66] | 2 |" in card.text
        and "| seen | 75.0 [30, 95] | 4 |" in card.text
    )
    assert "| rank | 2 |" in card.text and "| variant | dora |" in card.text and main in card.text


# What every release noted of a training.
NUMBERS = ("seconds", "compile_seconds", "tokens_per_second", "trainable_parameters")
NUMBERS += ("optimizer_bytes", "flops_measured", "peak_memory_bytes")


def test_a_training_alone_has_its_loss(tmp_path):
    write_json(tmp_path / "config.json", {**record(Finetune()), "chat_template": "0123"})
    write_json(
        tmp_path / "result.json",
        {**dict.fromkeys(NUMBERS, 1), "final_loss": 0.5, "steps": 7, "tokens": 1234},
    )
    text = model_card("base", "transformers", tmp_path, None)
    assert "Final loss: 0.500 nats per token, after 7 steps on 1,234 tokens." in text
    assert "all weights" in text and "chat template" in text


def test_what_comes_from_elsewhere_has_no_run(tmp_path):
    text = model_card("base: x\n- y", "peft", None, lora.Spec())
    assert (
        "Command" not in text and huggingface_hub.ModelCard(text).data.base_model == "base: x\n- y"
    )
