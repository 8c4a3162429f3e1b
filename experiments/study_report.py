"""The report of a study: one table of all arms over their seeds, the contrasts that were fixed
beforehand, response curves, and the raw results."""

from __future__ import annotations

import dataclasses
import gzip
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

from experiments.comparison import load_arm
from experiments.configs.study import Study
from kafjax.core.records import Prediction
from kafjax.core.rundir import Run, read_object, write_atomic, write_json
from kafjax.evaluation import arms, clustered, table, tuning
from kafjax.evaluation.arms import Trial
from kafjax.evaluation.figures import METHOD_STYLE, STYLE, new_figure, save_figure
from kafjax.evaluation.results import ASIDE, BASE, contrasts, forgotten
from kafjax.evaluation.tuning import Tried

VERDICTS = {"greater": "better", "less": "worse", "equivalent": "equal", "undecided": "not shown"}


def write(
    config: Study,
    chosen: Mapping[str, Mapping[str, tuning.Values]],
    tried: Mapping[str, Sequence[Tried]],
    folders: Mapping[str, Path],
) -> None:
    """Writes the folder `config.out`.

    Args:
      chosen: settings by choice (`best`, `mild`) and arm.
      tried: the trials of each arm.
      folders: those of the final steps, by names such as `best-seed0`.
    """
    found = arms_of(folders, config.seeds)
    out = Path(config.out)
    tables = [arms.quality_table(found, grouped=False)]
    splits = [split for split in arms.splits_of(found) if split not in ASIDE]
    tables += [contrast_table(found, split) for split in splits]
    notes = [_told(name, trials, chosen) for name, trials in tried.items()]
    text = table.render(tables, notes)
    write_atomic(out / "table.md", text)
    write_json(
        out / "chosen.json",
        {
            "chosen": {choice: dict(values) for choice, values in chosen.items()},
            "tried": {n: [dataclasses.asdict(t) for t in trials] for n, trials in tried.items()},
        },
    )
    _draw({n: trials for n, trials in tried.items() if n in chosen["mild"]}, out / "rates.png")
    _write_raw(Path(config.compare.run.runs), out)
    print(text)
    print(f"Look at {out}; costs and break-even of the best settings: {folders['best-seed0']}.")


def arms_of(folders: Mapping[str, Path], n_seeds: int) -> list[arms.Arm]:
    """Reads the arms of the final steps. One that trains nothing says the same for every seed: it
    was asked once, and stands in for all."""
    found: dict[tuple[str, str], dict[int, Trial]] = {}
    first = Run(folders["best-seed0"])
    base = load_arm(first, BASE)
    for step, folder in folders.items():
        choice, _, number = step.partition("-seed")
        for name in sorted(path.name for path in (folder / "arms").iterdir()):
            arm = load_arm(Run(folder), name)
            if arm is None or base is None:
                continue
            trained = arm.cost.train_tokens > 0
            lost = forgotten(arm, base) if trained else None
            trial = Trial({}, int(number), arm.predictions, None, step, folder, {}, lost)
            seeds = [int(number)] if trained else range(n_seeds)
            for seed in seeds:
                of_seed = dataclasses.replace(trial, seed=seed)
                found.setdefault((name, choice), {})[seed] = of_seed
    order = list(read_object(folders["best-seed0"] / "results.json")["methods"])
    keys = sorted(found, key=lambda key: (order.index(key[0]), key[1]))
    return [
        arms.Arm({"arm": name if choice == "best" else f"{name}, {choice}"}, found[name, choice])
        for name, choice in keys
    ]


def contrast_table(found: Sequence[arms.Arm], split: str) -> table.Table:
    """Tabulates each arm against rag and against base on a split. Holm's correction is over all of
    them: the family was fixed before the first run. Arms that have one seed where others have
    several are described, not tested."""
    n_seeds = max(len(arm.trials) for arm in found)
    tested = [arm for arm in found if len(arm.trials) == n_seeds]
    by_name = {str(arm.settings["arm"]): arm.cells(split) for arm in tested}
    by_name = {name: cells for name, cells in by_name.items() if cells.n_questions}
    pairs = contrasts(list(by_name))
    compared = clustered.compare([(by_name[a], by_name[b]) for a, b in pairs])
    rows = tuple(
        (
            f"{a} - {b}",
            table.percent(one.difference.to_json(), signed=True),
            f"{one.p_value:.3f}",
            f"{one.p_holm:.3f}",
            VERDICTS[one.verdict],
            table.NONE if one.smallest is None else f"{100 * one.smallest:.0f}",
        )
        for (a, b), one in zip(pairs, compared, strict=True)
    )
    notes = (
        "Difference: points [95% interval over seeds and subjects]. p: sign flips of whole subjects; Holm: over the "
        f"{len(pairs)} contrasts of this table. Equal: within 5 points by two one-sided tests. Could find: the smallest true "
        "difference that so many subjects show with a power of 80%, one contrast alone.",
    )
    headers = ("contrast", "difference", "p", "p Holm", "verdict", "could find")
    return table.Table(f"Contrasts on {split}", headers, rows, notes)


def _told(
    name: str, trials: Sequence[Tried], chosen: Mapping[str, Mapping[str, tuning.Values]]
) -> str:
    """Says what was tried for an arm and chosen, and whether the best rate lies at an edge."""

    def shown(values: tuning.Values) -> str:
        return " ".join(f"{flag}={arms.shown(value)}" for flag, value in values.items())

    tried = "; ".join(
        f"{shown(t.values)}: {100 * t.right:.0f}%"
        + ("" if t.forgotten is None else f", {t.forgotten:+.2f} nats")
        for t in trials
    )
    told = f"{name}: best {shown(chosen['best'][name])}"
    if name in chosen["mild"]:
        told += f", mild {shown(chosen['mild'][name])}"
        (flag,) = chosen["best"][name]
        if tuning.at_edge(flag, trials, tuning.best(trials)):
            told += " (the best rate lies at an edge of those tried)"
    return f"{told}. Tried on development subjects: {tried}."


def _draw(tried: Mapping[str, Sequence[Tried]], path: Path) -> None:
    """Draws right answers about development subjects, and what is forgotten, over the rate."""
    with matplotlib.rc_context(STYLE):
        figure = new_figure(7.0, 3.2)
        learned, lost = figure.subplots(1, 2)
        for (name, trials), (colour, marker) in zip(
            tried.items(), METHOD_STYLE.values(), strict=False
        ):
            ((flag,), *_) = [tuple(trial.values) for trial in trials]
            trials = sorted(trials, key=lambda trial: trial.values[flag])
            rates = [trial.values[flag] for trial in trials]
            style: dict[str, Any] = {"color": colour, "marker": marker, "label": name}
            learned.plot(rates, [100 * trial.right for trial in trials], **style)
            lost.plot(rates, [trial.forgotten or 0.0 for trial in trials], **style)
        for axes, what in (
            (learned, "right on development, %"),
            (lost, "prose forgotten, nats a token"),
        ):
            axes.set_xscale("log")
            axes.set_xlabel("learning rate")
            axes.set_ylabel(what)
        learned.set_ylim(0, 100)
        learned.legend(fontsize=8)
        save_figure(figure, path)


def _write_raw(runs: Path, out: Path) -> None:
    """Copies the configuration and results of every step, and writes all answers into one file."""
    rows: list[bytes] = []
    for folder in sorted(path.parent for path in runs.glob("*/results.json")):
        for file in ("config.json", "results.json"):
            write_json(out / "steps" / folder.name / file, read_object(folder / file))
        for name in sorted(path.name for path in (folder / "arms").iterdir()):
            arm = load_arm(Run(folder), name)
            rows += [_row(folder.name, p) for p in (arm.predictions if arm else ())]
    write_atomic(out / "answers.jsonl.gz", gzip.compress(b"".join(rows), mtime=0))


def _row(step: str, p: Prediction) -> bytes:
    kept = {
        "step": step,
        "method": p.method,
        "split": p.split,
        "id": p.id,
        "subject": p.subject,
        "answer": p.answer,
        "answers": p.answers,
        "passages": p.passages,
        "correct": p.correct,
        "score": p.score,
    }
    return json.dumps(kept, ensure_ascii=False).encode() + b"\n"
