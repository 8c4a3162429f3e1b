"""--help: every flag once, under what it is about, with its default."""

from __future__ import annotations

import re

import pytest

from experiments.configs.answer import Answer
from experiments.configs.build_index import BuildIndex
from experiments.configs.compare import Compare
from experiments.configs.finetune import Finetune
from experiments.configs.report import Report
from experiments.configs.sweep_lora import SweepLora
from kafjax.core.config import leaves, unused
from kafjax.core.help import WIDTH, help_text

TRAINING = {"epochs", "rank", "lr_lora", "replay", "batch_rows", "batch", "held_out", "retention"}
KINDS = (
    Compare,
    Answer,
    Finetune,
    SweepLora,
    BuildIndex,
    Report,
)


@pytest.mark.parametrize("kind", KINDS)
def test_every_flag_stands_there_once(kind):
    named = re.findall(r"^  --(?:\[no\])?(\w+)$", help_text(kind), re.MULTILINE)
    assert sorted(named) == sorted([*(leaf.flag for leaf in leaves(kind())), "config"])
    assert max(map(len, help_text(kind).splitlines())) <= WIDTH


def test_asking_lists_no_flag_of_training_or_of_batches():
    named = set(re.findall(r"^  --(?:\[no\])?(\w+)$", help_text(Answer), re.MULTILINE))
    assert not named & TRAINING and {"k", "seed", "max_new_tokens"} <= named
    assert {*TRAINING, "alpha", "warmup"} <= unused(Answer()) and "seed" in named


def test_flags_stand_under_what_they_are_about():
    sections = dict(
        part.split(":\n", 1) for part in help_text(Compare).split("\n\n") if ":\n" in part
    )
    under = {
        flag: heading
        for heading, text in sections.items()
        for flag in re.findall(r"^  --(?:\[no\])?(\w+)$", text, re.MULTILINE)
    }
    assert next(iter(sections)).startswith("All ways to add knowledge") and under[
        "methods"
    ] == next(iter(sections))
    groups = [
        ("model", "dtype"),
        ("corpus", "subjects"),
        ("epochs", "seq_len"),
        ("rank", "alpha"),
        ("embedder", "k"),
        ("runs", "name"),
    ]
    assert all(under[a] == under[b] for a, b in groups)
    assert len({under[a] for a, _ in groups}) == len(groups)
    assert (
        "Default: 16." in sections[under["rank"]] and "Default: off." in sections[under["rslora"]]
    )
