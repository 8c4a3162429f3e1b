"""The report over folders of runs: what is an arm, its numbers, tests against one, choices on
held-out subjects, and files."""

from __future__ import annotations

import csv
import dataclasses
import html.parser
import json
import re
from pathlib import Path

import numpy as np
import pytest

from experiments import report
from experiments.comparison import save_arm
from experiments.configs.compare import Compare
from experiments.configs.finetune import Finetune
from experiments.configs.report import Report
from experiments.configs.sweep_lora import SweepLora
from kafjax.core.config import changed
from kafjax.core.config_record import record
from kafjax.core.errors import UserError
from kafjax.core.records import Prediction
from kafjax.core.rundir import Run, write_json, write_jsonl
from kafjax.core.schema import read_rows
from kafjax.evaluation import arms, clustered
from kafjax.evaluation.cost import Cost
from kafjax.evaluation.results import Arm

SUBJECTS = [f"person {i}" for i in range(60)]

TOOK = {
    "steps": 3,
    "tokens": 40,
    "seconds": 1.5,
    "compile_seconds": 1.0,
    "tokens_per_second": 26.7,
    "trainable_parameters": 9,
}
TOOK |= {"optimizer_bytes": 72, "flops_measured": 1e9, "peak_memory_bytes": 10**9}
"""The part of a training's record that every release wrote."""


def compared(
    runs: Path, name: str, quality: float, methods: tuple[str, ...] = ("lora",), **settings: object
) -> Path:
    """A run of experiments.compare as far as a report reads it. An answer follows from subject and
    quality, not from chance."""
    config = changed(Compare(), methods=methods, **settings)
    write_json(runs / name / "config.json", record(config))
    rows = []
    for method in methods:
        for i, subject in enumerate(SUBJECTS):
            for split, share in (("untrained", quality), ("retention", 1 - quality / 2)):
                asked = {
                    "question": f"Where is {subject}?",
                    "answer": "",
                    "answers": ("x",),
                    "subject": subject,
                }
                right = (i * 37 + config.settings.seed) % 60 < 60 * share
                rows.append(
                    Prediction(f"{split}{i}", method, split, **asked, correct=right).to_json()
                )
    write_jsonl(runs / name / "predictions.jsonl", rows)
    return runs / name


def fill(runs: Path) -> None:
    for rank, quality in ((1, 0.2), (4, 0.5), (16, 0.52)):
        for seed in range(3):
            compared(runs, f"r{rank}s{seed}", quality, rank=rank, seed=seed)


def write(tmp_path: Path, **settings: object) -> tuple[list, Path]:
    out = tmp_path / "out"
    return report.run(Report(folder=(str(tmp_path / "runs"),), out=str(out), **settings)), out


def test_arms_are_what_differs_beside_the_seed(tmp_path, capsys):
    fill(tmp_path / "runs")
    found, out = write(tmp_path, baseline="rank=1")
    assert [arm.name for arm in found] == ["rank=1", "rank=4", "rank=16"] and all(
        len(arm.trials) == 3 for arm in found
    )
    rows = list(csv.DictReader((out / "arms.csv").open()))
    one = next(row for row in rows if row["rank"] == "4" and row["measure"] == "untrained")
    expected = clustered.mean(found[1].cells("untrained"))
    np.testing.assert_allclose(
        [float(one[name]) for name in ("value", "low", "high")],
        [expected.value, expected.low, expected.high],
    )
    assert float(one["value"]) == 0.5 and one["seeds"] == "3" and one["n"] == "60"
    shown = capsys.readouterr().out
    line = next(line for line in shown.splitlines() if line.startswith("| rank=4 "))
    assert "+30.0 [" in line and "<0.001" in line and "better" in line


def test_files_hold_the_tables_and_figures(tmp_path):
    fill(tmp_path / "runs")
    _, out = write(tmp_path, baseline="rank=4")
    page = (out / "report.html").read_text()
    html.parser.HTMLParser().feed(page)
    assert page.count("<table>") == 2 and page.count("<img") == 2 and "http" not in page
    latex = (out / "tables.tex").read_text()
    assert latex.count(r"\begin{tabular}") == 2 and r"untrained \%" in latex and "{lrrrrr}" in latex
    assert not [line for line in latex.splitlines() if "&" in line and not line.endswith(r"\\")]
    assert {path.name for path in (out / "figures").iterdir()} == {"by_rank.png", "pareto.png"}


def test_choice_is_made_on_one_half_of_the_subjects_and_told_on_the_other(tmp_path):
    runs = tmp_path / "runs"
    for rate, quality in ((1e-4, 0.3), (1e-3, 0.7), (1e-2, 0.6)):
        for dora in (False, True):
            compared(runs, f"{rate}{dora}", quality, lr_lora=rate, dora=dora)
    found, _ = write(tmp_path, choose=("lr_lora",), baseline="dora=False")
    assert [arm.settings for arm in found] == [
        {"lr_lora": 1e-3, "dora": dora} for dora in (False, True)
    ]
    kept = {p.subject for arm in found for trial in arm.trials.values() for p in trial.predictions}
    assert 15 < len(kept) < 45
    every = arms.arms_of(report.trials_under(runs))
    other = {p.subject for arm in every for p in arms._half(arm, 0).trials[0].predictions}
    assert not kept & other and kept | other == set(SUBJECTS)


def test_choice_is_made_on_development_subjects_where_there_are_some():
    def arm(rate, development, untrained):
        answers = [
            Prediction(
                f"{split}{i}", "lora", split, "?", "", (), correct=i < n, subject=f"{split}{i}"
            )
            for split, n in (("development", development), ("untrained", untrained))
            for i in range(8)
        ]
        return arms.Trial({"lr": rate}, 0, answers, None, "", Path())

    trials = [arm(1e-4, 2, 8), arm(1e-3, 6, 1), arm(1e-2, 5, 7)]
    (best,) = arms.chosen(arms.arms_of(trials), ("lr",))
    assert best.settings == {"lr": 1e-3} and len(best.trials[0].predictions) == 16


def test_what_forgets_too_much_is_passed_over_in_the_choice(tmp_path):
    runs = tmp_path / "runs"
    measured = []
    for rate, quality, forgotten in ((1e-4, 0.3, 0.02), (1e-3, 0.5, 0.08), (1e-2, 0.9, 1.5)):
        compared(runs, f"{rate}", quality, lr_lora=rate, lr_full=rate / 10)
        (trial,) = report.trials_under(runs / f"{rate}")
        measured.append(dataclasses.replace(trial, forgotten=forgotten))
    found = arms.arms_of(measured)
    both = ("lr_lora", "lr_full")

    def rate(most_forgotten: float | None) -> float:
        (arm,) = arms.chosen(found, both, most_forgotten)
        return arm.settings["lr_lora"]

    assert rate(None) == 1e-2
    assert rate(0.1) == 1e-3
    assert rate(0.01) == 1e-4  # none forgets as little: the one that forgets least
    table = arms.quality_table(found)
    column = table.headers.index("prose, nats")
    assert [row[column] for row in table.rows] == ["0.02", "0.08", "1.50"]


def test_methods_of_a_comparison_are_arms(tmp_path, capsys):
    compared(tmp_path / "runs", "all", 0.5, methods=("base", "lora"))
    found, _ = write(tmp_path, baseline="method=base")
    assert [arm.name for arm in found] == ["method=base", "method=lora"]
    line = next(
        line for line in capsys.readouterr().out.splitlines() if line.startswith("| method=lora ")
    )
    assert "equal" in line and "+0.0" in line


def test_answers_of_every_run_can_be_looked_up_in_one_page(tmp_path):
    for rank in (1, 4):
        folder = compared(tmp_path / "runs", f"r{rank}", 0.5, methods=("base", "lora"), rank=rank)
        by_method: dict[str, list[Prediction]] = {}
        for p in read_rows(Prediction, folder / "predictions.jsonl"):
            asked = dataclasses.replace(p, prompts=(f"Asked of rank {rank}", p.question))
            by_method.setdefault(p.method, []).append(asked)
        for method, predictions in by_method.items():
            save_arm(Run(folder), method, Arm(predictions, Cost()))
    _, out = write(tmp_path)
    page = (out / "report.html").read_text()
    (stored,) = re.findall(r"id='answers'>(.*?)</script>", page, re.DOTALL)
    data = json.loads(stored)
    assert {(row["run"], row["method"]) for row in data["rows"]} == {
        (run, method) for run in ("r1", "r4") for method in ("base", "lora")
    }
    assert len(data["rows"]) == 2 * 2 * 2 * len(SUBJECTS)
    for row in data["rows"]:
        texts = ["\n".join(data["lines"][at] for at in text) for text in row["prompts"]]
        assert texts == [f"Asked of rank {row['run'][1:]}", row["question"]]
        assert row["cause"] in ("right", "wrong") or row["split"] != "retention"
    assert ">All answers</a>" in page


def test_too_many_answers_for_a_page_are_told(tmp_path, capsys, monkeypatch):
    fill(tmp_path / "runs")
    monkeypatch.setattr(report, "MOST_ANSWERS", 1079)
    _, out = write(tmp_path)
    assert "1,080 answers are too many for a page of 1,079" in capsys.readouterr().err
    assert "All answers" not in (out / "report.html").read_text()


def test_trainings_have_a_loss_and_students_interval(tmp_path, capsys):
    for seed, loss in enumerate((1.0, 2.0, 3.0)):
        folder = tmp_path / "runs" / f"s{seed}"
        write_json(
            folder / "config.json",
            record(changed(Finetune(), seed=seed, mesh=f"data:{seed + 1}")),
        )
        write_json(folder / "result.json", {**TOOK, "final_loss": loss})
    write_json(tmp_path / "runs" / "broken" / "config.json", record(changed(Finetune(), seed=9)))
    (arm,), out = write(tmp_path)
    assert sorted(arm.losses) == [1.0, 2.0, 3.0]
    row = next(csv.DictReader((out / "arms.csv").open()))
    # t of 2 degrees
    np.testing.assert_allclose(
        [float(row["value"]), float(row["high"]) - 2], [2.0, 4.302653 / np.sqrt(3)], rtol=1e-6
    )
    assert "broken is not finished" in capsys.readouterr().err


def test_mirror_of_a_training_is_the_same_trial(tmp_path):
    config = record(changed(Finetune(), seed=3, rank=4))
    took = {**TOOK, "final_loss": 1.5}
    write_json(tmp_path / "run" / "config.json", config)
    write_json(tmp_path / "run" / "result.json", took)
    (trial,) = report.trials_under(tmp_path / "run")
    mirrored = report.trial_of_wandb(json.loads(json.dumps(config)), took, trial.source)
    assert mirrored == trial
    assert report.trial_of_wandb(config, {"lora/step": 3}, "x") is None  # not finished


def test_lanes_of_a_sweep_are_trials(tmp_path):
    folder = tmp_path / "runs" / "sweep"
    write_json(folder / "config.json", record(SweepLora()))
    for rank in (4, 16):
        for seed in (0, 1):
            lane = folder / "lanes" / f"r{rank}s{seed}"
            settings = {
                "rank": rank,
                "alpha": 32.0,
                "learning_rate": 1e-3,
                "targets": "x",
                "seed": seed,
            }
            ending = "diverged" if (rank, seed) == (16, 1) else "finished"
            write_json(
                lane / "trained.json",
                {
                    **settings,
                    "ending": ending,
                    "final_loss": 1.0 + rank,
                    "steps": 3,
                    "tokens": 40,
                    "checks": [],
                },
            )
    found, _ = write(tmp_path)
    assert [(arm.name, sorted(arm.trials), arm.losses) for arm in found] == [
        ("rank=4", [0, 1], [5.0, 5.0]),
        ("rank=16", [0], [17.0]),
    ]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"folder": ()}, "--folder is empty"),
        ({"wandb_project": "somebody/ranks"}, "--wandb_project=somebody/ranks: "),
        ({"folder": ("nowhere",)}, "nowhere is no folder"),
        ({"baseline": "rank=5"}, "--baseline='rank=5' is no arm. Did you mean 'rank=4'?"),
        ({"choose": ("rnk",)}, "--choose: the runs do not vary 'rnk'. Did you mean 'rank'?"),
        (
            {"choose": ("rank",), "most_forgotten": 0.1},
            "these runs measured no forgetting of prose",
        ),
    ],
)
def test_bad_input_is_told_in_a_line_and_writes_nothing(tmp_path, monkeypatch, settings, message):
    fill(tmp_path / "runs")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # where nobody answers
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    with pytest.raises(UserError) as error:
        report.run(
            Report(
                **{"folder": (str(tmp_path / "runs"),), "out": str(tmp_path / "out"), **settings}
            )
        )
    assert message in str(error.value) and not (tmp_path / "out").exists()


def test_arms_stand_in_the_order_of_their_numbers_whatever_folders_are_called():
    def trial(method: str, rank: int | None, lr: float) -> arms.Trial:
        return arms.Trial({"method": method, "rank": rank, "lr": lr}, 0, (), 1.0, "", Path())

    trials = [trial("b", 16, 0.1), trial("b", 4, 0.1), trial("a", 4, 0.1), trial("a", None, 0.01)]
    found = [tuple(arm.settings.values()) for arm in arms.arms_of([*trials, trial("a", 4, 0.01)])]
    assert found == [
        ("a", 4, 0.01),
        ("b", 4, 0.1),
        ("a", 4, 0.1),
        ("b", 16, 0.1),
        ("a", None, 0.01),
    ]


def test_same_run_twice_is_refused(tmp_path):
    compared(tmp_path / "runs", "a", 0.5)
    compared(tmp_path / "runs", "b", 0.5)
    with pytest.raises(UserError, match=r"b .lora. and .*a .lora. have the same settings and seed"):
        write(tmp_path)
