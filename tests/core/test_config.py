"""One tree of dataclasses is flags, record and identity: each way there and back loses nothing, and
bad values are named."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Mapping

import hypothesis
import hypothesis.strategies as st
import pytest
from absl import flags

from kafjax.core.command_line import command_of, define, from_flags
from kafjax.core.config import Config, changed, leaves, nested, option
from kafjax.core.config_record import config_hash, identity, read_record, record
from kafjax.core.errors import UserError


@dataclasses.dataclass(frozen=True)
class Train(Config):
    epochs: int = option(8, "Passes.", least=1, most=1000)
    warmup_fraction: float = option(0.05, "Share of the steps.", flag="warmup", least=0, below=1)
    steps: int | None = option(None, "Steps.", least=1)
    optimizer: str = option("adamw", "Which.", choices=("adamw", "muon"), aliases={"adam": "adamw"})
    layers: tuple[int, ...] | None = option(None, "Layers.", least=0)
    ranks: Mapping[str, int] = option({}, "REGEX:RANK.", least=1)
    inner: int = option(3, "No flag of the experiment.")


@dataclasses.dataclass(frozen=True)
class Experiment(Config):
    train: Train = nested(Train(epochs=4), without=("inner",))
    methods: tuple[str, ...] = option(("base", "rag"), "Methods.")
    targets: tuple[str, ...] = option(("a,b",), "Patterns.", repeat=True)
    dora: bool = option(False, "A switch.", added=True)
    mesh: str = option("auto", "Devices.", identity=False)
    name: str | None = option(None, "Folder.", record=False)


def parsed(*arguments: str, base: Mapping | None = None) -> Experiment:
    values = flags.FlagValues()
    define(Experiment, values)
    values(["program", *arguments])
    return from_flags(Experiment, base, values)


CONFIGS = st.builds(
    lambda **given: changed(Experiment(), **given),
    epochs=st.integers(1, 1000),
    warmup=st.floats(0, 0.99),
    steps=st.none() | st.integers(1, 10**9),
    optimizer=st.sampled_from(["adamw", "muon"]),
    layers=st.none() | st.lists(st.integers(0, 99), min_size=1).map(tuple),
    ranks=st.dictionaries(
        st.text("a:.*|$ ", min_size=1).filter(str.strip), st.integers(1, 99), max_size=3
    ),
    methods=st.lists(st.text("abc+", min_size=1), min_size=1).map(tuple),
    targets=st.lists(st.text("a,b(|) ", min_size=1), min_size=1).map(tuple),
    dora=st.booleans(),
    mesh=st.text("abc:,2", min_size=1),
)


@hypothesis.given(CONFIGS)
def test_a_record_gives_the_same_configuration_back(config):
    stored = json.loads(json.dumps(record(config)))
    assert changed(Experiment(), **read_record(Experiment, stored, "config.json")) == config


@hypothesis.given(CONFIGS)
def test_a_command_line_gives_the_same_configuration_back(config):
    values = {leaf.flag: leaf.of(config) for leaf in leaves(Experiment())}
    command = command_of("experiments.x", Experiment, values)
    assert parsed(*shlex.split(command)[3:]) == config


def test_defaults_stand_once_and_an_experiment_may_be_of_another_size():
    assert parsed() == Experiment() and parsed().train.epochs == 4 and Train().epochs == 8
    assert (
        command_of("experiments.x", Experiment, record(Experiment())) == "python -m experiments.x"
    )
    assert "inner" not in record(Experiment())


def test_a_flag_wins_over_the_record_it_is_given_beside():
    base = {"epochs": 7, "methods": ("full",)}
    assert (parsed("--epochs=9", base=base).train.epochs, parsed(base=base).train.epochs) == (9, 7)
    assert parsed("--methods=lora", base=base).methods == ("lora",)


def test_the_identity_is_what_is_learned_and_not_where():
    assert identity(Experiment()) == identity(parsed("--mesh=fsdp:8", "--name=mine"))
    assert identity(Experiment()) != identity(parsed("--epochs=5"))
    assert "dora" not in identity(Experiment())  # added later: old runs keep their identity
    assert identity(parsed("--dora"))["dora"] is True
    assert (
        config_hash({"a": 1, "b": 2})
        == config_hash({"b": 2, "a": 1})
        != config_hash({"a": 1, "b": 3})
    )


def test_a_record_without_a_field_that_was_added_has_the_identity_it_had():
    old = {key: value for key, value in record(Experiment()).items() if key not in ("dora", "mesh")}
    assert identity(
        changed(Experiment(), **read_record(Experiment, old, "config.json"))
    ) == identity(Experiment())


@pytest.mark.parametrize(
    ("argument", "told"),
    [
        ("--epochs=0", "epochs=0: must be 1 or more"),
        ("--epochs=1001", "epochs=1001: must be 1000 or less"),
        ("--warmup=nan", r"warmup_fraction=nan \(--warmup\): must be a finite number"),
        ("--warmup=inf", r"warmup_fraction=inf \(--warmup\): must be a finite number"),
        ("--warmup=1", r"warmup_fraction=1.0 \(--warmup\): must be below 1"),
        ("--warmup=-1", r"warmup_fraction=-1.0 \(--warmup\): must be 0 or more"),
        ("--optimizer=adamv", r"unknown optimizer 'adamv'\. Did you mean 'adamw'\?"),
        ("--layers=0,x", "--layers: 'x' is no number; write numbers, such as 0,1,2"),
        ("--layers=-1", "layers=-1: must be 0 or more"),
        ("--ranks=q_proj", "--ranks: 'q_proj' is no number; write REGEX:NUMBER"),
        ("--ranks=q_proj:0", "ranks=0: must be 1 or more"),
    ],
)
def test_a_bad_value_is_named(argument, told):
    with pytest.raises(UserError, match=told):
        parsed(argument)


@pytest.mark.parametrize(
    ("stored", "told"),
    [
        ({"epochs": "8"}, "config.json: epochs='8' is not a whole number"),
        ({"epochs": True}, "config.json: epochs='True' is not a whole number"),
        ({"epochs": 8.5}, "config.json: epochs='8.5' is not a whole number"),
        ({"methods": "lora"}, "config.json: methods='lora' is not a list of text"),
        ({"methods": [1]}, "is not a list of text"),
        ({"ranks": {"a": "b"}}, "is not a mapping to whole number"),
        ({"epochs": None}, "is not a whole number"),
        (
            {"epoch": 8},
            "config.json: 'epoch' is no setting of this experiment. Did you mean 'epochs'?",
        ),
    ],
)
def test_a_record_of_another_type_or_key_is_named(stored, told):
    with pytest.raises(UserError, match=told):
        read_record(Experiment, stored, "config.json")


def test_values_of_another_spelling_are_read():
    assert parsed("--optimizer=adam") == Experiment()
    assert read_record(
        Experiment, {"optimizer": "adam", "layers": ["0", "3"], "ranks": ["q:8"]}, "x"
    ) == {
        "optimizer": "adamw",
        "layers": (0, 3),
        "ranks": {"q": 8},
    }
    assert parsed("--layers=0, 3").train.layers == (0, 3)


def test_two_fields_of_one_flag_are_a_mistake_of_the_experiment():
    @dataclasses.dataclass(frozen=True)
    class Twice(Config):
        train: Train = nested(Train())
        epochs: int = option(1, "Again.")

    with pytest.raises(TypeError, match="more than one field is the flag epochs"):
        leaves(Twice())
    with pytest.raises(
        UserError, match=r"'epoch' is no setting of Experiment\. Did you mean 'epochs'\?"
    ):
        changed(Experiment(), epoch=3)
