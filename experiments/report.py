"""Puts any runs into one table: mean, 95% interval and number of seeds of each arm, paired tests
against one, and response curves.

    python -m experiments.report --folder=sweeps/rank_rate_seed/runs                      every run of a sweep
    python -m experiments.report --folder=runs/a,runs/b --baseline=method=lora            tests of the others against an arm
    python -m experiments.report --folder=sweeps/variants_best_rate/runs --choose=lr_lora --baseline=method=lora
                                                     each variant at its best rate, chosen on development subjects, or on one half

An arm is what differs in nothing but the seed. Runs of compare, sweep_lora and finetune go
together; those of finetune have a loss only. Questions are clustered by subject and crossed with
seeds. Written to --out: report.html, in which every answer of every run can be looked up with its
prompt, table.md, arms.csv, tables.tex and figures.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from experiments import build
from experiments.build import CHAT_TEMPLATE, CORPUS_HASH
from experiments.comparison import load_arm
from experiments.configs.compare import Compare
from experiments.configs.finetune import Finetune
from experiments.configs.report import Report
from experiments.configs.sweep_lora import SweepLora
from experiments.sweep_lanes import TrainedLane
from kafjax.core.config import leaves
from kafjax.core.errors import UserError
from kafjax.core.paths import as_path, is_address
from kafjax.core.progress import LINE_SECONDS, say, waiting
from kafjax.core.records import Prediction
from kafjax.core.rundir import Run, read_object, write_atomic
from kafjax.core.schema import read, read_rows
from kafjax.evaluation import arms, table
from kafjax.evaluation.answers import Answered, answers_section
from kafjax.evaluation.arms import METHOD, SEED, Arm, Trial
from kafjax.evaluation.report import html_figures, html_table, write_page
from kafjax.evaluation.results import BASE, DEVELOPMENT, RETENTION, causes_of, forgotten
from kafjax.training.took import Took

MOST_ANSWERS = 20_000
"""Answers on the page: a browser holds as many with ease."""


def run(config: Report) -> list[Arm]:
    """Writes the report and prints its tables.

    Raises:
      UserError: a folder without runs, runs that cannot be told apart, an unknown baseline, or a
        disk that refuses.
    """
    if not config.folder and config.wandb_project is None:
        raise UserError("--folder is empty: give folders of runs, or folders that hold such")
    # which draws thousands of times for each interval
    with waiting("report", "computing intervals, tests and figures", after=LINE_SECONDS):
        return _report(config)


def _report(config: Report) -> list[Arm]:
    trials = [trial for folder in config.folder for trial in trials_under(as_path(folder))]
    if config.wandb_project is not None:
        trials += trials_of_wandb(config.wandb_project)
    found = arms.arms_of(trials)
    if config.choose:
        found = arms.chosen(found, config.choose, config.most_forgotten)
    tables = [arms.quality_table(found)]
    if config.baseline is not None:
        baseline = arms.named(found, config.baseline)
        for split in (split for split in arms.splits_of(found) if split != RETENTION):
            compared = arms.comparisons(found, baseline, split, config.margin)
            tables.append(arms.comparison_table(compared, baseline, split, config.margin))
    text = table.render(
        tables,
        _choice(config, found),
    )
    out = Path(config.out)
    figures = arms.draw(found, out / "figures")
    write_atomic(out / "table.md", text)
    write_atomic(out / "arms.csv", arms.to_csv(found))
    write_atomic(out / "tables.tex", "\n".join(map(table.to_latex, tables)))
    title = f"{len(found)} arms, {sum(len(arm.trials) for arm in found)} runs"
    write_page(
        out / "report.html",
        title,
        [f"<h1>{title}</h1>", *map(html_table, tables), html_figures(figures), _answers(found)],
    )
    print(text)
    print(f"Look at {out}/report.html; {out}/arms.csv has the numbers.")
    return found


def _answers(found: Sequence[Arm]) -> str:
    """Writes the section of all answers, or nothing where there are none, or too many for a
    page."""
    trials = [trial for arm in found for trial in arm.trials.values() if trial.predictions]
    if not trials:
        return ""
    if (n := sum(len(trial.predictions) for trial in trials)) > MOST_ANSWERS:
        say(
            "report",
            f"{n:,} answers are too many for a page of {MOST_ANSWERS:,}: give fewer runs to look them up",
        )
        return ""
    names = _names([trial.run for trial in trials])
    groups = [
        Answered(trial.predictions, trial.causes, name)
        for trial, name in zip(trials, names, strict=True)
    ]
    return answers_section(groups, {})


def _names(runs: Sequence[Path]) -> list[str]:
    """Names runs from the folder above all of them on; addresses in full."""
    if any(is_address(run) for run in runs):
        return [str(run) for run in runs]
    above = os.path.commonpath([run.absolute().parent for run in runs])
    return [os.path.relpath(run.absolute(), above) for run in runs]


def _choice(config: Report, found: Sequence[Arm]) -> list[str]:
    """Says what was chosen, by what."""
    if not config.choose:
        return []
    bound = (
        ""
        if config.most_forgotten is None
        else f", among those that forget at most {config.most_forgotten:g} nats a token of held-out prose"
    )
    what = " and ".join(config.choose)
    on = (
        "development subjects"
        if DEVELOPMENT in arms.splits_of(found)
        else "one half of the subjects"
    )
    return [f"For each arm the best {what} was chosen on {on}{bound}."]


def trials_under(folder: Path) -> list[Trial]:
    """Reads the runs in a folder, or in the folders that it holds. Runs that are not finished are
    told of and left out."""
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder")
    runs = (
        [folder]
        if (folder / "config.json").exists()
        else sorted(file.parent for file in folder.glob("*/config.json"))
    )
    if not runs:
        raise UserError(f"{folder} holds no run (config.json)")
    trials = []
    for path in runs:
        of_run = list(_trials(path))
        if not of_run:
            say("report", f"{path} is not finished, and left out")
        trials += of_run
    return trials


def trials_of_wandb(project: str) -> list[Trial]:
    """Reads the finished runs of a project of wandb, by its public interface.

    Raises:
      UserError: wandb is not installed, cannot be reached or refuses, or there is no finished run.
    """
    try:
        import wandb  # slow to import, and needed by few
    except ImportError as error:
        raise UserError("--wandb_project needs wandb; run: pip install wandb") from error
    try:
        runs = [
            (dict(run.config), dict(run.summary), run.name)
            for run in wandb.Api(timeout=10).runs(project)
        ]
    except Exception as error:  # of wandb, of requests, of its generated client
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"--wandb_project={project[:60]}: {reason}") from error
    trials = [
        trial
        for run in runs
        if (trial := trial_of_wandb(*run[:2], f"{project}/{run[2]}")) is not None
    ]
    if not trials:
        raise UserError(f"--wandb_project={project[:60]} has no finished run")
    return trials


def trial_of_wandb(config: dict[str, Any], summary: dict[str, Any], source: str) -> Trial | None:
    """Returns what the mirror of a training says; None if it is not finished."""
    record = _settings(config)
    seed, loss = record.pop(SEED, 0), summary.get("final_loss")
    if not isinstance(loss, int | float):
        say("report", f"{source} is not finished, and left out")
        return None
    return Trial(record, seed, (), float(loss), source, Path(source))


def _trials(path: Path) -> Iterator[Trial]:
    """Yields what a run's folder holds: lanes of a sweep, methods of a comparison, or one
    training."""
    record = _settings(read_object(path / "config.json"))
    seed = record.pop(SEED, 0)
    if (path / "lanes").is_dir():
        yield from _lanes(path, record)
    elif (path / "predictions.jsonl").exists():
        yield from _methods(path, record, seed)
    elif (path / "result.json").exists():
        yield Trial(record, seed, (), read(Took, path / "result.json").final_loss, str(path), path)


def _methods(path: Path, record: dict[str, Any], seed: int) -> Iterator[Trial]:
    by_method: dict[str, list[Prediction]] = {}
    for prediction in read_rows(Prediction, path / "predictions.jsonl"):
        by_method.setdefault(prediction.method, []).append(prediction)
    stored = {name: arm for name in by_method if (arm := load_arm(Run(path), name)) is not None}
    causes = causes_of(stored)
    base = stored.get(BASE)
    for method, predictions in by_method.items():
        # the splits are those of the run's table, the prompts lie with its arms
        arm = stored.get(method)
        prompts = {} if arm is None else {p.id: p.prompts for p in arm.predictions}
        asked = [dataclasses.replace(p, prompts=prompts.get(p.id, ())) for p in predictions]
        yield Trial(
            {METHOD: method, **record},
            seed,
            asked,
            None,
            f"{path} ({method})",
            path,
            causes.get(method, {}),
            None if arm is None or base is None or arm is base else forgotten(arm, base),
        )


def _lanes(path: Path, record: dict[str, Any]) -> Iterator[Trial]:
    for file in sorted(path.glob("lanes/*/trained.json")):
        trained, answers = read(TrainedLane, file), file.with_name("predictions.jsonl")
        if trained.ending == "diverged":
            say("report", f"{file.parent} diverged, and is left out")
            continue
        settings = {
            "rank": trained.rank,
            "alpha": trained.alpha,
            "targets": trained.targets,
            "lr": trained.learning_rate,
        }
        predictions = read_rows(Prediction, answers) if answers.exists() else []
        yield Trial(
            {**record, **settings},
            trained.seed,
            predictions,
            trained.final_loss,
            str(file.parent),
            file.parent,
        )


def _settings(record: dict[str, Any]) -> dict[str, Any]:
    """Returns what of a record can tell arms apart: not meshes, not which methods or lanes lie
    beside each other."""
    kinds = (Compare, Finetune, SweepLora)
    beside = {leaf.flag for kind in kinds for leaf in leaves(kind()) if not leaf.about.identity}
    return {
        name: value
        for name, value in record.items()
        if name not in {*beside, CORPUS_HASH, CHAT_TEMPLATE}
    }


def main() -> None:
    build.start(Report, run)


if __name__ == "__main__":
    main()
