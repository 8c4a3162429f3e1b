"""Plans by formula, and what is refused. What the TPU's compiler says is in test_pods.py."""

from __future__ import annotations

import json

import pytest

from tests.experiments.commands import refused


def last_line(outcome) -> str:
    assert outcome.code == 0, outcome.err
    return outcome.out.rstrip().splitlines()[-1]


@pytest.mark.parametrize("method", ["full", "lora", "lanes", "rag"])
def test_a_plan_ends_with_its_verdict(plan_pod, tmp_path, method):
    file = tmp_path / "plan.json"
    outcome = plan_pod(
        f"--method={method}",
        "--topology=v5p-32",
        "--batch=32",
        "--lanes=4",
        "--formula",
        f"--json={file}",
    )
    assert last_line(outcome).startswith("fits by formula: ")
    assert "judged by formula alone" in outcome.out and "roofline" in outcome.out
    programs = json.loads(file.read_text())["programs"]
    assert [program["fits"] for program in programs] == [True] * (2 if method == "rag" else 1)
    assert all(
        0 < program["mfu"] <= 1 and program["model_flops"] <= program["flops"]
        for program in programs
    )


@pytest.mark.parametrize("method", ["full", "lora", "lanes", "rag"])
def test_layers_of_several_shapes_are_planned(plan_pod, method):
    """Smaller key heads than any tensor axis that the rest would allow, and most parameters in an
    embedding."""
    outcome = plan_pod(
        "--model=gemma4-e4b",
        f"--method={method}",
        "--topology=v5p-32",
        "--batch=32",
        "--lanes=4",
        "--formula",
    )
    assert last_line(outcome).startswith("fits by formula: ")


def test_a_search_of_21_million_vectors_needs_a_gigabyte_a_device(plan_pod, tmp_path):
    command = ("--method=search", "--topology=v5e-16", "--batch=64", "--formula")
    file = tmp_path / "plan.json"
    outcome = plan_pod(*command, f"--json={file}")
    assert last_line(outcome).startswith("fits by formula: 1.04 of 17.2 GB a device")
    assert "21000000 vectors of 768 numbers in int8 need 1.0 GB a device on 16" in outcome.out
    found = json.loads(file.read_text())
    assert found["fits"] and found["bound"] == "memory"
    # all vectors are read once, at 819 GB/s
    assert found["batch_seconds"] == pytest.approx(found["bytes"] / 819e9, rel=0.01)


def test_a_search_that_does_not_fit_is_told_with_what_would(plan_pod):
    command = ("--method=search", "--topology=v5e-4", "--vectors=50000000", "--formula")
    line = last_line(plan_pod(*command, "--stored=float32"))
    assert line.startswith("does not fit by formula: ") and line.endswith("--stored=int8")
    assert last_line(plan_pod(*command, "--stored=int8")).startswith("fits by formula: ")
    assert "larger --topology" in last_line(plan_pod(*command, "--vectors=500000000"))


def test_gpus_of_another_machine_are_planned_by_formula_which_is_said(plan_pod):
    outcome = plan_pod("--model=llama3.1-70b", "--topology=h100-64", "--batch=64", "--search")
    assert last_line(outcome).startswith("fits by formula: ")
    assert "  1. " in outcome.out and "best first of" in outcome.out


def test_what_does_not_fit_is_told_with_what_would(plan_pod):
    command = (
        "--topology=v5e-16",
        "--mesh=fsdp:16",
        "--batch=64",
        "--seq_len=2048",
        "--remat=none",
        "--formula",
    )
    line = last_line(plan_pod(*command))
    assert line.startswith("does not fit by formula: ")
    remedies = [remedy.partition(" (")[0] for remedy in line.partition("would: ")[2].split("), ")]
    assert any("--remat=full" in remedy for remedy in remedies)
    for remedy in remedies:
        assert last_line(plan_pod(*command, *remedy.split())).startswith("fits by formula: ")
    assert last_line(plan_pod(*command, "--model=llama3.1-405b")).endswith(
        "a smaller --batch, or a larger --topology"
    )


def test_a_folder_with_a_configuration_will_do(plan_pod, world):
    outcome = plan_pod(f"--model={world.gemma}", "--topology=a100-1", "--batch=1", "--seq_len=64")
    assert last_line(outcome).startswith("fits by formula: ")
    assert "one device" in outcome.out


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--topology=v5e-17"], "Did you mean 'v5e-16'?"),
        (["--topology=v5p-32", "--model=llama3-8b"], "Did you mean 'llama3.1-8b'?"),
        (["--topology=v5p-32", "--method=lorra"], "Did you mean 'lora'?"),
        (["--topology=v5p-32", "--mesh=fsdpp:16"], "Did you mean 'fsdp'?"),
        (
            ["--topology=v5p-32", "--mesh=fsdp:32"],
            "is 32 devices, there are 16: choose sizes among its divisors 1, 2, 4, 8, 16",
        ),
        (
            ["--topology=v5p-32", "--mesh=tensor:16"],
            "mesh axis tensor:16 does not divide n_kv_heads=8",
        ),
        (["--topology=v5p-32", "--mesh=data:16", "--batch=8"], "use a multiple of 16"),
        (
            ["--topology=v5p-32", "--mesh=lane:16", "--method=lanes", "--lanes=4"],
            "lane:16 does not divide lanes=4",
        ),
        (["--topology=v5p-32", "--search", "--mesh=fsdp:16"], "leave --mesh out"),
        ([], "topology"),
    ],
)
def test_bad_input_gets_a_line_with_the_nearest(plan_pod, arguments, told):
    assert told in refused(plan_pod(*arguments, "--formula"))


def test_without_the_compiler_the_command_that_installs_it_is_told(plan_pod):
    line = refused(plan_pod("--topology=v5e-16", hidden=("libtpu",)))
    assert "pip install 'kafjax[tpu]'" in line and "--formula" in line
