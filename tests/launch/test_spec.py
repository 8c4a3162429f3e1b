"""Specs: the combinators, what a run's identity is, YAML, and one line for what is wrong."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from experiments.configs.compare import Compare
from experiments.configs.finetune import Finetune
from kafjax.core.config import changed
from kafjax.core.errors import UserError
from launch import sweeps
from launch.load import from_yaml, open_spec
from launch.spec import Sweep, chain, identity_of, logspace, product, zip_
from tests.launch.toy import Toy

TOY = "tests.launch.toy"


def test_product_varies_the_last_axis_fastest():
    points = product(rank=[1, 4], seed=range(2))
    assert list(points) == [
        {"rank": 1, "seed": 0},
        {"rank": 1, "seed": 1},
        {"rank": 4, "seed": 0},
        {"rank": 4, "seed": 1},
    ]


def test_grids_combine_zip_and_chain():
    tied = zip_(rank=[1, 4], alpha=[2, 8])
    assert list(product(tied, seed=[7])) == [
        {"rank": 1, "alpha": 2, "seed": 7},
        {"rank": 4, "alpha": 8, "seed": 7},
    ]
    assert list(chain(tied, product(lr=[1e-3])))[2] == {"lr": 1e-3}
    assert list(tied.override(alpha=1)) == [{"rank": 1, "alpha": 1}, {"rank": 4, "alpha": 1}]


def test_where_keeps_what_is_liked_and_sample_always_draws_the_same():
    points = product(rank=[1, 4, 16], seed=range(10))
    assert {point["rank"] for point in points.where(lambda point: point["rank"] < 16)} == {1, 4}
    drawn = points.sample(5, seed=3)
    assert list(drawn) == list(points.sample(5, seed=3)) != list(points.sample(5, seed=4))
    assert len({tuple(point.items()) for point in drawn}) == 5 and all(
        point in points for point in drawn
    )


def test_logspace_holds_its_ends_and_numbers_that_command_lines_can_say():
    assert logspace(-4, -2, 5) == (1e-4, 0.000316228, 1e-3, 0.00316228, 1e-2)
    np.testing.assert_allclose(logspace(-3, 1, 7), np.logspace(-3, 1, 7), rtol=1e-5)


def test_identity_is_free_of_mesh_and_folder_and_knows_everything_else():
    def same(a: Finetune, b: Finetune) -> bool:
        return identity_of("experiments.finetune", a) == identity_of("experiments.finetune", b)

    one = Finetune()
    assert same(
        one,
        changed(
            one,
            mesh="fsdp:8",
            runs="/elsewhere",
            name="x",
            attention="cudnn",
            checkpoint_every=5,
            wandb="online",
        ),
    )
    assert same(one, changed(one, lr=1e-3))  # what LoRA's rate is by default
    assert (
        not same(one, changed(one, lr=1e-4))
        and not same(one, changed(one, seed=1))
        and not same(one, changed(one, rank=4))
    )
    assert identity_of("experiments.finetune", one) != identity_of("experiments.other", one)


def test_numbers_of_any_kind_are_one_run():
    runs = Sweep(
        Finetune(),
        chain(product(alpha=[32]), product(alpha=[32.0]), product(alpha=[np.float32(32)])),
    ).runs()
    assert len(runs) == 1 and runs[0].record["alpha"] == 32.0


def test_runs_hold_the_whole_configuration_and_flags_that_no_record_holds():
    (run,) = Sweep(changed(Finetune(), wandb="offline", steps=7), product(rank=[2])).runs()
    assert (
        run.record["steps"] == 7
        and run.record["rank"] == 2
        and run.arguments == ("--wandb=offline",)
    )
    assert run.module == "experiments.finetune" and "runs" not in run.record


def test_profile_stands_for_its_values():
    (run,) = Sweep(Compare(), product(profile=["smoke"])).runs()
    (other,) = Sweep(Compare(), product(profile=["smoke"], subjects=[9])).runs()
    assert (
        run.record["subjects"] == 4 and other.record["subjects"] == 9 and run.record["epochs"] == 5
    )


@pytest.mark.parametrize(
    "name",
    [path.stem for path in Path(sweeps.__file__).parent.glob("*.py") if path.stem != "__init__"],
)
def test_shipped_sweeps_are_what_they_say(name):
    runs = open_spec(name).runs()
    assert len(runs) == len({run.id for run in runs}) >= 15
    assert open_spec(name, ("seq_len=32",)).runs()[0].record["seq_len"] == 32


def test_settings_are_read_as_flags():
    record = (
        open_spec("finetune_rates", ("steps=5", "rank_pattern=q_proj:8", "dora=true"))
        .runs()[0]
        .record
    )
    assert (
        record["steps"] == 5 and record["rank_pattern"] == {"q_proj": 8} and record["dora"] is True
    )


YAML = b"""
experiment: finetune
base: {steps: 20, warmup: 0}
runs:
  product: {rank: [1, 4], lr: {logspace: [-4, -2, 3]}, seed: {range: 2}}
  override: {alpha: 8}
"""


def test_yaml_says_the_same_as_python():
    python = Sweep(
        changed(Finetune(), steps=20, warmup=0.0),
        product(rank=[1, 4], lr=logspace(-4, -2, 3), seed=range(2)).override(alpha=8),
    )
    assert from_yaml(YAML, "x.yaml").runs() == python.runs()


def test_yaml_knows_exponents_and_nests():
    text = b"experiment: finetune\nruns: {product: [{zip: {rank: [1, 2], lr: [1e-3, 2.5e-4]}}, {chain: [{product: {seed: [3]}}]}]}"
    assert [run.settings for run in from_yaml(text, "x").runs()] == [
        {"rank": 1, "lr": 1e-3, "seed": 3},
        {"rank": 2, "lr": 2.5e-4, "seed": 3},
    ]


def test_python_file_defines_its_sweep(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from experiments.configs.finetune import Finetune\nfrom launch.spec import *\nsweep = Sweep(Finetune(), product(rank=[3]))\n"
    )
    assert open_spec(str(file)).runs()[0].record["rank"] == 3


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: Sweep(Finetune(), product(rnak=[1])).runs(),
            "'rnak' is no setting of this experiment. Did you mean 'rank'?",
        ),
        (lambda: Sweep(Finetune(), product(rank=[0])).runs(), "rank=0"),
        (
            lambda: Sweep(Finetune(), product(rank=["four"])).runs(),
            "rank='four' is not a whole number",
        ),
        (lambda: Sweep(Finetune(), product(lr=[float("nan")])).runs(), "must be a finite number"),
        (lambda: product(), "no axis"),
        (lambda: product(rank=[]), "rank is empty"),
        (lambda: product(rank=4), "an axis is a list, such as rank=[4]"),
        (lambda: product(product(rank=[1]), rank=[2]), "'rank' stands in two of its axes"),
        (lambda: product(a=range(10**6)), "a sweep may have 100,000"),
        (lambda: zip_(rank=[1, 2], alpha=[1]), "rank has 2, alpha has 1"),
        (lambda: product(rank=[1]).sample(2), "2 of 1 points"),
        (lambda: logspace(-4, -2, 1), "at least two values"),
        (
            lambda: Sweep(Finetune(), product(rank=[1]).where(lambda _: False)).runs(),
            "every point was filtered out",
        ),
        (
            lambda: Sweep(Finetune(), product(name=["x"])).runs(),
            "'name' is set by the sweep's folder",
        ),
        (lambda: Sweep(Finetune(), product(rank=[1])).override(rank=2), "'rank' is swept over"),
        (
            lambda: Sweep(Compare(), product(methods=[("lora",), ("full",)])).runs(),
            "runs that differ only in methods are one run",
        ),
        (lambda: open_spec("rank_rate_sed"), "Did you mean 'rank_rate_seed'?"),
        (lambda: open_spec("finetune_rates", ("stepz=1",)), "Did you mean 'steps'?"),
        (lambda: open_spec("finetune_rates", ("steps",)), "write NAME=VALUE"),
        (lambda: open_spec("finetune_rates", ("steps=many",)), "steps"),
        (lambda: open_spec("nowhere.py"), "cannot read nowhere.py"),
        (
            lambda: from_yaml(b"experiment: finetun\nruns: {product: {rank: [1]}}", "x.yaml"),
            "Did you mean 'finetune'?",
        ),
        (
            lambda: from_yaml(b"experiment: pack_rows\nruns: {product: {seed: [1]}}", "x.yaml"),
            "is no experiment that can be swept",
        ),
        (
            lambda: from_yaml(b"experiment: finetune\nrun: {}", "x.yaml"),
            "x.yaml: unknown key 'run' in the file. Did you mean 'runs'?",
        ),
        (lambda: from_yaml(b"experiment: finetune", "x.yaml"), "'runs' is missing"),
        (lambda: from_yaml(b"experiment: [\n", "x.yaml"), "not valid YAML"),
        (
            lambda: from_yaml(b"!!python/object/apply:os.system ['true']", "x.yaml"),
            "not valid YAML",
        ),
        (
            lambda: from_yaml(
                b"experiment: finetune\nruns: {product: {rank: {logspace: [1]}}}", "x"
            ),
            "logspace: [START, STOP, N]",
        ),
        (
            lambda: from_yaml(
                b"experiment: finetune\nruns: {product: {seed: {range: [0, 9, 0]}}}", "x"
            ),
            "step 0",
        ),
    ],
)
def test_bad_specs_are_told_in_a_line(make, message):
    with pytest.raises(UserError) as error:
        make()
    assert message in str(error.value)


def test_text_of_a_setting_is_data():
    (run,) = Sweep(Toy(), product(text=["; rm -rf x"]), TOY).runs()
    assert run.record["text"] == "; rm -rf x"
