"""The report of a study from folders of finished steps: seeds of what trains, one answer of what
does not, and the contrasts that were fixed."""

from __future__ import annotations

import pytest

from experiments import study
from experiments.comparison import save_arm
from experiments.configs.study import Study
from experiments.study_report import arms_of, contrast_table
from kafjax.core.config import changed
from kafjax.core.records import Prediction
from kafjax.core.rundir import Run, write_json
from kafjax.evaluation.cost import Cost
from kafjax.evaluation.results import Arm

TRAINED = Cost(train_tokens=1000, trainable_parameters=10)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    root = tmp_path_factory.mktemp("study")

    def step(name, **made):
        write_json(root / name / "results.json", {"methods": dict.fromkeys(made), "pending": []})
        for method, (right, cost) in made.items():
            answers = [
                Prediction(
                    f"q{i}",
                    method,
                    "untrained",
                    f"Where was {i} born?",
                    "Bergen",
                    ("Bergen",),
                    correct=i < right,
                    subject=f"s{i // 4}",
                )
                for i in range(40)
            ]
            save_arm(Run(root / name), method, Arm(answers, cost, [1.0], [1]))
        return root / name

    folders = {
        "best-seed0": step("best-seed0", base=(0, Cost()), rag=(38, Cost()), lora=(10, TRAINED)),
        "best-seed1": step("best-seed1", lora=(14, TRAINED)),
        "mild-seed0": step("mild-seed0", lora=(4, TRAINED)),
    }
    return arms_of(folders, 2)


def test_what_trains_nothing_stands_for_every_seed_and_choices_are_rows(found):
    by_name = {arm.settings["arm"]: arm for arm in found}
    assert list(by_name) == ["base", "rag", "lora", "lora, mild"]
    assert {name: sorted(arm.trials) for name, arm in by_name.items()} == {
        "base": [0, 1],
        "rag": [0, 1],
        "lora": [0, 1],
        "lora, mild": [0],
    }
    table = contrast_table(found, "untrained")
    assert [row[0] for row in table.rows] == [
        "lora - rag",
        "rag - base",
        "lora - base",
    ]
    verdicts = {row[0]: row[4] for row in table.rows}
    assert verdicts["lora - rag"] == "worse" and "3 contrasts" in table.notes[0]


def test_trials_ask_about_development_subjects_alone_and_results_never_do():
    config = changed(Study(), seeds=2)
    steps = list(study._planned(config))
    tuned = [step for step in steps if step.name.startswith("tune-")]
    assert {name: sum(s.methods == (name,) for s in tuned) for name in ("lora", "full", "rag")} == (
        dict.fromkeys(("lora", "full", "rag"), config.trials)
    )
    assert all(step.values["ask"] == ("development",) for step in tuned)
    final = [step for step in steps if step.name.startswith(("best-", "mild-"))]
    assert len(final) == 4 and all("development" not in step.values["ask"] for step in final)
