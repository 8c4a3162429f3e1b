"""Whole commands that are killed before file operations drawn at random, again and again, and end
like one that was left alone.

`tests/core/test_kills.py` has every operation of every kind of file; here is that the commands put
them together in the right order.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from kafjax.core.rundir import read_json, read_jsonl
from kafjax.retrieval import Store
from tests.experiments.commands import Command, World
from tests.kills import KILLED

pytestmark = [pytest.mark.slow, pytest.mark.multiprocess]

TRAIN = ("--rank=4", "--batch_rows=2", "--seq_len=64", "--checkpoint_every=2")
ANSWER = ("--k=2", "--engine=exact", "--max_new_tokens=4", "--latency_queries=0")
GRID = ("--lrs=1e-2", "--seeds=0,1", "--lanes=1")
"""One lane at a time: bits are the same in the same company only."""
KILLS = 2
"""Kills of a command in a row, by a seeded generator; the start after them is left alone."""


def survives(
    command: Command, arguments: list[str], folder: Path, seed: int
) -> tuple[int, list[int]]:
    """Kills the command `KILLS` times, each time where the last left it, and lets it end. Returns
    the operations of a whole one, and those before which it was killed."""
    whole = command(*arguments, kill=(folder, 0))
    assert whole.code == 0, whole.err
    shutil.move(folder, folder.with_name("whole"))
    rng, killed = random.Random(seed), []
    for left in range(KILLS, 0, -1):
        # Early ones too: a start that has done all would show nothing of the order.
        n = rng.randint(1, max(1, whole.operations // left))
        outcome = command(*arguments, kill=(folder, n))
        assert outcome.code in (0, KILLED), outcome.err
        if outcome.code == 0:
            break
        killed.append(n)
    outcome = command(*arguments)
    assert outcome.code == 0, outcome.err
    assert killed and not [
        path for path in folder.rglob("*") if path.name.endswith((".tmp", ".lock", ".previous"))
    ]
    assert not list(folder.rglob("checkpoints"))
    return whole.operations, killed


def same_tensors(a: Path, b: Path) -> None:
    mine, alone = safetensors.numpy.load_file(a), safetensors.numpy.load_file(b)
    assert mine.keys() == alone.keys()
    for name, expected in alone.items():
        np.testing.assert_array_equal(mine[name], expected, err_msg=name)


def answers(folder: Path) -> list[tuple[str, str, str]]:
    return sorted(
        (row["method"], row["id"], row["answer"])
        for row in read_jsonl(folder / "predictions.jsonl")
    )


def check_losses(folder: Path, alone: Path, label: str) -> None:
    losses = {
        (row[label], row["step"], row["loss"]) for row in read_jsonl(folder / "metrics.jsonl")
    }
    assert losses == {
        (row[label], row["step"], row["loss"]) for row in read_jsonl(alone / "metrics.jsonl")
    }


def check_comparison(folder: Path, alone: Path) -> None:
    assert answers(folder) == answers(alone)
    check_losses(folder, alone, "method")
    for kind, file in (("lora", "adapter"), ("full", "weights")):
        same_tensors(
            *(where / "artifacts" / kind / f"{file}.safetensors" for where in (folder, alone))
        )
    mine, expected = (read_json(where / "results.json")["methods"] for where in (folder, alone))
    assert {name: method["quality"] for name, method in mine.items()} == {
        name: method["quality"] for name, method in expected.items()
    }
    assert all((folder / name).exists() for name in ("report.html", "table.md", "figures"))


def check_training(folder: Path, alone: Path) -> None:
    check_losses(folder, alone, "label")
    (file,) = alone.glob("*.safetensors")
    same_tensors(folder / file.name, file)
    assert (
        read_json(folder / "result.json")["final_loss"]
        == read_json(alone / "result.json")["final_loss"]
    )


def check_sweep(folder: Path, alone: Path) -> None:
    assert answers(folder) == answers(alone)
    for file in alone.glob("lanes/*/adapter.safetensors"):
        same_tensors(folder / file.relative_to(alone), file)


def check_index(folder: Path, alone: Path) -> None:
    assert len(Store.load(folder / "index")) == len(Store.load(alone / "index")) > 5


CASES: dict[str, tuple[str, tuple[str, ...], Callable[[Path, Path], None]]] = {
    "compare": (
        "compare",
        ("--methods=base,rag,lora,full", "--epochs=2", *TRAIN, *ANSWER, "--lr_lora=1e-2"),
        check_comparison,
    ),
    "finetune lora": ("finetune", ("--method=lora", "--epochs=2", *TRAIN), check_training),
    "finetune full": ("finetune", ("--method=full", "--epochs=2", *TRAIN), check_training),
    "sweep": (
        "sweep_lora",
        ("--ranks=2", *GRID, "--epochs=2", *TRAIN[1:], "--max_new_tokens=4"),
        check_sweep,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_command_killed_again_and_again_ends_like_one_left_alone(
    case, request, world: World, tmp_path, record_property
):
    name, own, check = CASES[case]
    flags = world.flags(runs=tmp_path, **({} if name == "compare" else {"embedder": None}))
    operations, killed = survives(
        request.getfixturevalue(name),
        [*flags, *own, "--name=run"],
        tmp_path / "run",
        seed=len(case),
    )
    record_property("kills", [operations, killed])
    print(f"{case}: {operations} file operations, killed before {killed}")
    check(tmp_path / "run", tmp_path / "whole")


@pytest.fixture(scope="module")
def adapter_run(finetune, world: World, tmp_path_factory) -> Path:
    """A finished run of LoRA, to be exported."""
    runs = tmp_path_factory.mktemp("runs")
    flags = [f"--model={world.gemma}", f"--corpus={world.corpus}", f"--runs={runs}", "--name=run"]
    trained = finetune(*flags, "--method=lora", "--epochs=1", *TRAIN)
    assert trained.code == 0, trained.err
    return runs / "run"


@pytest.mark.parametrize("name", ["export peft", "export merged", "pack_rows"])
def test_a_folder_that_is_made_once_is_absent_or_whole(
    name, request, world: World, tmp_path, record_property
):
    flags = [f"--model={world.gemma}", f"--corpus={world.corpus}"]
    if name == "pack_rows":
        pytest.importorskip("array_record", reason="array_record is not installed (extra [data])")
        flags += ["--seq_len=64"]
    else:
        flags = [
            f"--run={request.getfixturevalue('adapter_run')}",
            f"--format={name.split()[1]}",
        ]
    command, made = request.getfixturevalue(name.split()[0]), tmp_path / "out"
    whole = command(*flags, f"--out={tmp_path / 'whole' / 'made'}", kill=(tmp_path / "whole", 0))
    assert whole.code == 0 and whole.operations > 3, whole.err
    contents = {file.name: file.read_bytes() for file in (tmp_path / "whole" / "made").iterdir()}
    every = range(1, whole.operations + 1)
    # rows are killed nowhere else
    killed = list(every) if name == "pack_rows" else sorted(random.Random(0).sample(every, 4))
    record_property("kills", [whole.operations, killed])
    for n in killed:
        shutil.rmtree(made, ignore_errors=True)
        assert command(*flags, f"--out={made / 'made'}", kill=(made, n)).code == KILLED
        if not (made / "made").exists():
            assert command(*flags, f"--out={made / 'made'}").code == 0
        assert {file.name: file.read_bytes() for file in (made / "made").iterdir()} == contents
        assert [path.name for path in made.iterdir()] == ["made"]


def test_an_index_killed_again_and_again_is_whole(
    build_index, world: World, tmp_path, record_property
):
    arguments = [
        f"--corpus={world.corpus}",
        f"--embedder={world.bert}",
        "--engine=exact",
        f"--out={tmp_path / 'folder' / 'index'}",
    ]
    operations, killed = survives(build_index, arguments, tmp_path / "folder", seed=0)
    record_property("kills", [operations, killed])
    print(f"index: {operations} file operations, killed before {killed}")
    check_index(tmp_path / "folder", tmp_path / "whole")
