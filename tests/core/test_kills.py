"""Writers are killed before each of their file operations: the old artifact or the new one is
whole, and a restart finishes."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from experiments.comparison import load_arm, save_arm
from kafjax import hub, lora
from kafjax.core.config import Config, option
from kafjax.core.records import Passage, Prediction
from kafjax.core.rundir import (
    Run,
    append_jsonl,
    new_folder,
    open_run,
    read_json,
    read_jsonl,
    write_atomic,
    write_json,
)
from kafjax.evaluation.cost import Cost
from kafjax.evaluation.results import Arm
from kafjax.models import Decoder, DecoderConfig
from kafjax.retrieval import ExactIndex, Store
from tests.kills import KILLED, in_child

# JAX warns of any fork; these children only write what was computed before.
pytestmark = pytest.mark.filterwarnings("ignore:os.fork:RuntimeWarning")

_SIZES = {
    "vocab_size": 32,
    "hidden_size": 8,
    "mlp_size": 12,
    "n_layers": 2,
    "n_heads": 2,
    "n_kv_heads": 1,
    "head_dim": 4,
}
MODEL = Decoder(DecoderConfig(**_SIZES, sliding=(False, False), window=4))
PARAMS = {"a": {"kernel": jnp.arange(12.0).reshape(3, 4)}, "b": {"kernel": jnp.ones((5, 2))}}
SPEC = lora.Spec(rank=2, alpha=4)


@dataclasses.dataclass(frozen=True)
class Numbered(Config):
    number: int = option(1, "A number.")


@dataclasses.dataclass(frozen=True)
class Artifact:
    """An artifact on disk: `write(folder, number)` writes number 1 or 2, `read(folder)` returns the
    number that is there, or None."""

    write: Callable[[Path, int], None]
    read: Callable[[Path], int | None]
    replaces: bool = True  # else a second one is refused, and only the first is killed


def append(folder: Path, number: int) -> None:
    done = (
        len(read_jsonl(folder / "log", skip_broken_tail=True)) if (folder / "log").exists() else 0
    )
    for i in range(done, 3 * number):
        append_jsonl(folder / "log", {"step": i})


def appended(folder: Path) -> int | None:
    rows = read_jsonl(folder / "log", skip_broken_tail=True) if (folder / "log").exists() else []
    assert [row["step"] for row in rows] == list(range(len(rows)))
    return max(len(rows) // 3, 1) if rows else None


def make_folder(folder: Path, number: int) -> None:
    if (folder / "made").exists():
        return
    with new_folder(folder / "made") as made:
        for name in ("x", "y"):
            write_json(made / name, number)


def make_store(number: int) -> Store:
    index = ExactIndex()
    index.build([f"{number}#{i}" for i in range(4)], np.eye(4))
    return Store(index, [Passage(f"{number}#{i}", "text") for i in range(4)])


def save_store(folder: Path, number: int) -> None:
    STORES[number].save(folder / "store")


def stored(folder: Path) -> int | None:
    if not any(folder.glob("*store*")):
        return None
    try:
        store = Store.load(folder / "store")
    except Exception:
        assert not (folder / "store").exists()
        return None
    assert [hits[0].passage.id for hits in store.search(np.eye(4), 1)] == list(store.index.ids)
    return int(store.index.ids[0][0])


def arm(number: int) -> Arm:
    prediction = Prediction("q", "base", "seen", "Where?", str(number), ("there",))
    return Arm(
        [prediction], Cost(train_tokens=number), [1.0], [2], environment={"git_sha": str(number)}
    )


def saved_arm(folder: Path) -> int | None:
    found = load_arm(Run(folder), "base")
    if found is None:
        return None
    assert (
        found.predictions[0].answer == found.environment["git_sha"] == str(found.cost.train_tokens)
    )
    return found.cost.train_tokens


def save_weights(folder: Path, number: int) -> None:
    """Saves as a full training does: the weights in shards, then the record that makes them
    whole."""
    if (folder / "learned.json").exists():
        return
    hub.save_trained(folder, PARAMS, shard_bytes=50)
    write_json(folder / "learned.json", number)


def trained(folder: Path) -> int | None:
    if not (folder / "learned.json").exists():
        return None
    found = hub.load_trained(folder, PARAMS)
    assert np.array_equal(found["a"]["kernel"], PARAMS["a"]["kernel"])
    return read_json(folder / "learned.json")


def save_model(folder: Path, number: int) -> None:
    if not (folder / "model").exists():
        hub.save(folder / "model", MODEL, PARAMS_OF_MODEL, shard_bytes=500)


def saved_model(folder: Path) -> int | None:
    if not (folder / "model").exists():
        return None
    tensors = [
        safetensors.numpy.load_file(file) for file in (folder / "model").glob("*.safetensors")
    ]
    assert len(tensors) > 2 and set(
        read_json(folder / "model" / "model.safetensors.index.json")["weight_map"]
    ) == set().union(*tensors)
    return 1


def save_peft(folder: Path, number: int) -> None:
    if not (folder / "peft").exists():
        hub.save_peft(folder / "peft", ADAPTERS, SPEC, MODEL, PARAMS_OF_MODEL)


def saved_peft(folder: Path) -> int | None:
    return (
        hub.load_peft(folder / "peft", MODEL, PARAMS_OF_MODEL)[1].rank - 1
        if (folder / "peft").exists()
        else None
    )


def opened(folder: Path) -> int | None:
    return (
        read_json(folder / "run" / "config.json")["number"]
        if (folder / "run" / "config.json").exists()
        else None
    )


PARAMS_OF_MODEL: Any = {}
STORES: dict[int, Store] = {}
ADAPTERS: Any = {}
ARTIFACTS = {
    "a file": Artifact(
        lambda folder, number: write_atomic(folder / "file", str(number)),
        lambda folder: int((folder / "file").read_text()) if (folder / "file").exists() else None,
    ),
    "a log": Artifact(append, appended),
    "a new folder": Artifact(
        make_folder,
        lambda f: read_json(f / "made" / "y") if (f / "made").exists() else None,
        replaces=False,
    ),
    "a store with its index": Artifact(save_store, stored),
    "an arm": Artifact(
        lambda folder, number: save_arm(Run(folder), "base", arm(number)), saved_arm, replaces=False
    ),
    "trained weights in shards": Artifact(save_weights, trained, replaces=False),
    "an adapter": Artifact(
        lambda folder, number: lora.save(
            folder / "adapter", ADAPTERS, dataclasses.replace(SPEC, alpha=number)
        ),
        lambda folder: (
            int(lora.load(folder / "adapter", PARAMS_OF_MODEL)[1].alpha)
            if (folder / "adapter").exists()
            else None
        ),
    ),
    "a model's folder": Artifact(save_model, saved_model, replaces=False),
    "a folder for PEFT": Artifact(save_peft, saved_peft, replaces=False),
    "a run": Artifact(
        lambda folder, number: open_run(folder, "run", Numbered(number), prefix="x").close(),
        opened,
        replaces=False,
    ),
}


@pytest.fixture(scope="module", autouse=True)
def weights():
    """Weights made before any fork: a child cannot compute, since it has none of JAX's threads."""
    STORES.update({number: make_store(number) for number in (1, 2)})
    PARAMS_OF_MODEL.update(jax.tree.map(np.asarray, MODEL.init(jax.random.key(0))))
    ADAPTERS.update(jax.tree.map(np.asarray, lora.init(SPEC, PARAMS_OF_MODEL, jax.random.key(0))))


@pytest.mark.parametrize("name", ARTIFACTS)
def test_a_kill_before_any_file_operation_leaves_the_old_or_the_new_and_a_restart_finishes(
    name, tmp_path, record_property
):
    artifact = ARTIFACTS[name]
    killed = 0
    for number in (1, 2) if artifact.replaces else (1,):
        n = 0
        while True:
            n += 1
            folder = tmp_path / f"{number}-{n}"
            folder.mkdir()
            if number == 2:
                artifact.write(folder, 1)
            code, _ = in_child(
                lambda folder=folder, number=number: artifact.write(folder, number), folder, n
            )
            assert code in (0, KILLED)
            before = artifact.read(folder)
            assert before == number if code == 0 else before in (number, 1 if number == 2 else None)
            artifact.write(folder, number)
            assert artifact.read(folder) == number
            assert not [
                path.name
                for path in folder.rglob("*")
                if re.search(r"\.lock$|\.previous$", path.name)
            ]
            if code == 0:
                break
            killed += 1
    assert killed >= 3
    record_property("kills", killed)
    print(f"{name}: {killed} kills")


def test_temporaries_of_killed_writers_are_cleared(tmp_path):
    for name, write in (("store", save_store), ("made", make_folder)):
        code, n = in_child(lambda write=write: write(tmp_path / "whole", 1), tmp_path)
        assert code == 0 and n > 5
        code, _ = in_child(lambda write=write: write(tmp_path, 1), tmp_path, n - 3)
        assert code == KILLED and list(tmp_path.glob(f".{name}.*.tmp"))
        write(tmp_path, 1)
        assert not list(tmp_path.glob(f".{name}.*"))
    code, n = in_child(lambda: write_atomic(tmp_path / "run" / "file", "x"), tmp_path, 4)
    assert code == KILLED and list((tmp_path / "run").glob(".file.*.tmp"))
    open_run(tmp_path, "run", Numbered(), prefix="x").close()
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) in (
        ["config.json"],
        ["config.json", "file"],
    )
