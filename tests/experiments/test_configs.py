"""The experiments' configurations: records of the release before still say the same, and a run is a
function call."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex

import pytest
from absl import flags

from experiments import build, compare
from experiments.configs.ablate_depth import AblateDepth
from experiments.configs.answer import Answer
from experiments.configs.build_dataset import BuildDataset
from experiments.configs.build_index import BuildIndex
from experiments.configs.compare import Compare
from experiments.configs.evolve import Evolve
from experiments.configs.finetune import Finetune
from experiments.configs.pack_rows import PackRows
from experiments.configs.plan_pod import PlanPod
from experiments.configs.sweep_lora import SweepLora
from kafjax.core.command_line import define, from_flags
from kafjax.core.config import changed, leaves
from kafjax.core.config_record import identity, read_record
from kafjax.core.errors import UserError
from kafjax.core.rundir import find_run

# config.json as the release before wrote it, word for word but for paths.
OLD_COMPARE = {
    **{
        "alpha": 32.0,
        "attributes": 4,
        "base": "float",
        "batch": 32,
        "batch_rows": 2,
        "checkpoint_every": 10,
        "chunk": None,
    },
    **{
        "corpus": "docs",
        "documents": 4,
        "dtype": "float32",
        "embedder": "bert",
        "engine": "exact",
        "epochs": 40,
    },
    **{
        "freeze_embedding": True,
        "held_out": 8,
        "hyde_tokens": 6,
        "k": 2,
        "latency_queries": 1,
        "lr_full": 0.003,
        "lr_lora": 0.01,
    },
    **{
        "max_new_tokens": 4,
        "model": "gemma",
        "questions_per_fact": 2,
        "rank": 4,
        "replay": 0.0,
        "retention": 32,
        "seed": 0,
    },
    **{
        "seq_len": 64,
        "subjects": 16,
        "targets": "(q|k|v|o|gate|up|down)_proj",
        "corpus_hash": "08b6ce6f68cd",
    },
}
OLD_FINETUNE = {
    **{
        "accumulate": 1,
        "alpha": 32.0,
        "alpha_pattern": ["mlp:5"],
        "attributes": 4,
        "base": "float",
        "batch_rows": 2,
        "chunk": None,
    },
    **{
        "clip_norm": 1.0,
        "corpus": "docs",
        "documents": 4,
        "dora": True,
        "dropout": 0.1,
        "dtype": "float32",
        "epochs": 3,
    },
    **{
        "freeze_embedding": True,
        "held_out": 8,
        "init": "default",
        "layers": ["0", "1"],
        "lora_plus": 2.0,
        "method": "lora",
    },
    **{
        "model": "gemma",
        "optimizer": "adamw",
        "param_dtype": "float32",
        "questions_per_fact": 2,
        "rank": 4,
    },
    **{
        "rank_pattern": ["q_proj:2", "mlp:3"],
        "replay": 0.0,
        "retention": 32,
        "rows": None,
        "rslora": True,
        "seed": 0,
    },
    **{
        "seq_len": 64,
        "steps": None,
        "subjects": 16,
        "targets": "(q|k|v|o|gate|up|down)_proj",
        "train_also": "final_norm",
    },
    **{"warmup": 0.05, "weight_decay": 0.0, "lr": 0.01, "corpus_hash": "08b6ce6f68cd"},
}
ALSO = {"corpus_hash": "08b6ce6f68cd"}


@pytest.mark.parametrize(
    ("experiment", "stored", "prefix", "another"),
    [
        (Compare, OLD_COMPARE, "default", {"lr_lora": 0.02}),
        (Finetune, OLD_FINETUNE, "finetune-lora", {"warmup": 0.1}),
    ],
)
def test_a_run_of_the_release_before_is_found_and_resumed(
    tmp_path, experiment, stored, prefix, another
):
    read = read_record(experiment, stored, "config.json", ignore=ALSO)
    config = changed(experiment(), **read)
    assert read.keys() == stored.keys() - ALSO.keys()
    for name in (f"{prefix}-0123456789ab", "mine"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(stored))
    assert find_run(tmp_path, "mine", config, prefix=prefix, also=ALSO).path == tmp_path / "mine"
    assert (
        find_run(tmp_path, None, config, prefix=prefix, also=ALSO).path
        == tmp_path / f"{prefix}-0123456789ab"
    )
    with pytest.raises(UserError, match=f"holds a run with {next(iter(another))}="):
        find_run(tmp_path, "mine", changed(config, **another), prefix=prefix, also=ALSO)


def test_a_record_may_hold_what_a_command_has_no_use_for_and_names_the_same_run(tmp_path):
    stored = {k: v for k, v in OLD_COMPARE.items() if k not in ("latency_queries", "lr")}
    with pytest.raises(UserError, match="'latency_queries' is no setting of this experiment"):
        read_record(Answer, OLD_COMPARE, "config.json", ignore=ALSO)
    config = changed(Answer(), **read_record(Answer, stored, "config.json", ignore=ALSO))
    assert config.settings.retrieval.k == 2 and config.settings.spec.rank == 16
    (tmp_path / "answer-0123456789ab").mkdir()
    (tmp_path / "answer-0123456789ab" / "config.json").write_text(json.dumps(stored))
    found = find_run(tmp_path, None, config, prefix="answer", also=ALSO)
    assert found.path == tmp_path / "answer-0123456789ab"


def test_what_says_where_and_how_fast_is_no_part_of_a_runs_identity():
    config = Finetune()
    assert identity(config) == identity(
        changed(config, mesh="fsdp:8", remat="full", num_processes=4, name="x", loss_chunk=64)
    )
    assert identity(config) != identity(changed(config, dora=True))


def test_comparing_reaches_every_setting_of_the_adapter_and_of_training():
    flags = {leaf.flag for leaf in leaves(Compare())}
    assert {
        "dora",
        "rslora",
        "init",
        "dropout",
        "layers",
        "rank_pattern",
        "train_also",
        "token_rows",
    } <= flags
    assert {
        "warmup",
        "weight_decay",
        "optimizer",
        "accumulate",
        "remat",
        "lora_plus",
        "steps",
    } <= flags


def test_an_experiment_is_a_function_and_refuses_before_it_writes(tmp_path):
    config = changed(Compare(), runs=str(tmp_path / "runs"), methods=("base", "rga"))
    with pytest.raises(UserError, match="unknown method 'rga'"):
        compare.run(config)
    with pytest.raises(UserError, match="--methods is empty"):
        compare.run(dataclasses.replace(config, methods=()))
    assert not (tmp_path / "runs").exists()


MAINS = (
    *(
        Compare,
        Answer,
        Finetune,
        SweepLora,
        AblateDepth,
        Evolve,
        PlanPod,
    ),
    *(BuildIndex, PackRows, BuildDataset),
)


@pytest.mark.parametrize("experiment", MAINS, ids=lambda experiment: experiment.__name__)
def test_every_flag_that_takes_a_number_refuses_what_is_none_and_what_cannot_be(experiment):
    numeric = [
        leaf for leaf in leaves(experiment()) if re.search(r"\b(int|float)\b", str(leaf.hint))
    ]
    assert numeric
    for leaf in numeric:
        wrong = ["nan", "inf", "-inf", "-1", "1e999", "9" * 5000]
        # an absurd rate is a number all the same
        wrong += ["9" * 40] if "float" not in str(leaf.hint) else []
        for text in wrong:
            values = flags.FlagValues()
            define(experiment, values)
            pattern = "q_proj:" if "Mapping" in str(leaf.hint) else ""
            try:
                values(["main", f"--{leaf.flag}={pattern}{text}"])
                pytest.fail(
                    f"--{leaf.flag}={text[:20]} gives {leaf.of(from_flags(experiment, values=values))}"
                )
            except (UserError, flags.Error) as error:
                told = str(error)
            assert leaf.flag in told or leaf.path[-1] in told, (leaf.flag, text[:20], told)


def test_the_next_command_carries_every_flag_that_the_other_experiment_knows():
    def parsed(command, kind):
        values = flags.FlagValues()
        define(kind, values)
        values(shlex.split(command)[2:])
        return from_flags(kind, values=values)

    given = changed(
        Compare(),
        corpus="my documents",
        runs="elsewhere",
        name="a",
        methods=("base", "rag"),
        seed=3,
        base="nf4",
        index="idx",
        k=4,
    )
    command = build.next_command("experiments.compare", Compare, given, k=2)
    assert parsed(command, Compare) == changed(given, k=2, name=None)
    tuned = changed(
        Finetune(),
        corpus="x",
        runs="elsewhere",
        rank=4,
        epochs=3,
        replay=0.5,
        chat="off",
        mesh="fsdp:2",
        lr=0.1,
    )
    command = build.next_command("experiments.compare", Compare, tuned, lr_lora=0.1)
    shared = {
        "corpus": "x",
        "runs": "elsewhere",
        "rank": 4,
        "epochs": 3,
        "replay": 0.5,
        "chat": "off",
        "mesh": "fsdp:2",
        "lr_lora": 0.1,
    }
    assert parsed(command, Compare) == changed(Compare(), **shared)
