"""Arms of many runs: what settings tell them apart, and tables of their quality over seeds and
subjects, with tests against one of them."""

from __future__ import annotations

import csv
import dataclasses
import io
import statistics
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

from kafjax.core.errors import UserError, nearest
from kafjax.core.records import Prediction
from kafjax.evaluation import clustered, table
from kafjax.evaluation.clustered import Cells, Difference
from kafjax.evaluation.figures import METHOD_STYLE, STYLE, new_figure, save_figure
from kafjax.evaluation.intervals import ALPHA, Interval
from kafjax.evaluation.results import DEVELOPMENT, RETENTION, headline, ordered

METHOD, SEED = "method", "seed"
_VERDICTS = {"greater": "better", "less": "worse", "equivalent": "equal", "undecided": "undecided"}
_MOST_LINES = 8  # of a figure


@dataclasses.dataclass(frozen=True)
class Trial:
    """One run of one method: `settings` by flag, without the seed. `source` is where it came from,
    for messages, `run` its folder, and `causes` why its answers are right or wrong, by the
    question's id. `forgotten` is the change of the cross entropy of held-out prose from the base
    model's, in nats a token, where both were measured. `numbers` are other measures by name, and
    `curve` is the training loss by step, where an experiment notes them."""

    settings: Mapping[str, Any]
    seed: int
    predictions: Sequence[Prediction]
    final_loss: float | None
    source: str
    run: Path
    causes: Mapping[str, str] = dataclasses.field(default_factory=dict)
    forgotten: float | None = None
    numbers: Mapping[str, float] = dataclasses.field(default_factory=dict)
    curve: Sequence[float] = ()


@dataclasses.dataclass(frozen=True)
class Arm:
    """Trials that differ in nothing but the seed, by seed. `settings` are those that tell arms
    apart."""

    settings: Mapping[str, Any]
    trials: Mapping[int, Trial]

    @property
    def name(self) -> str:
        return ",".join(f"{name}={shown(value)}" for name, value in self.settings.items()) or "all"

    @property
    def losses(self) -> list[float]:
        return [trial.final_loss for trial in self.trials.values() if trial.final_loss is not None]

    @property
    def forgotten(self) -> list[float]:
        return [trial.forgotten for trial in self.trials.values() if trial.forgotten is not None]

    def cells(self, split: str) -> Cells:
        """Scores on a split, of the seeds that answered it."""
        of_split = {
            seed: [p for p in trial.predictions if p.split == split]
            for seed, trial in self.trials.items()
        }
        return clustered.cells(
            {seed: predictions for seed, predictions in of_split.items() if predictions}
        )


def arms_of(trials: Sequence[Trial]) -> list[Arm]:
    """Groups trials by what differs between any of them, in the order of settings that are numbers:
    folders of a sweep are named by hashes.

    Raises:
      UserError: two trials have the same settings and seed (naming both), or there is none.
    """
    if not trials:
        raise UserError("there is no finished run to report")
    names = list(dict.fromkeys(name for trial in trials for name in trial.settings))
    varied = [
        name for name in names if len({repr(trial.settings.get(name)) for trial in trials}) > 1
    ]
    found: dict[str, Arm] = {}
    for trial in trials:
        settings = {name: trial.settings.get(name) for name in varied}
        arm = found.setdefault(repr(settings), Arm(settings, {}))
        if trial.seed in arm.trials:
            raise UserError(
                f"{trial.source} and {arm.trials[trial.seed].source} have the same settings and seed; leave one out"
            )
        found[repr(settings)] = Arm(settings, {**arm.trials, trial.seed: trial})
    return sorted(found.values(), key=_numbers)


def _numbers(arm: Arm) -> list[tuple[bool, float]]:
    """Returns what arms are ordered by. Those that differ in words alone keep their order."""
    are = [(value, isinstance(value, int | float)) for value in arm.settings.values()]
    return [(not number, value if number else 0.0) for value, number in are]


def splits_of(arms: Sequence[Arm]) -> list[str]:
    """Lists the splits that any arm answered, the headline first."""
    return ordered(
        dict.fromkeys(
            p.split for arm in arms for trial in arm.trials.values() for p in trial.predictions
        )
    )


def chosen(
    arms: Sequence[Arm], settings: Sequence[str], most_forgotten: float | None = None
) -> list[Arm]:
    """Chooses for each arm the best values of settings by the questions about development subjects.

    Where none were asked, one half of the subjects stands in, by the headline split, and the
    answers about the other half are kept. The halves follow from the subjects' names, so that every
    arm has the same ones. With `most_forgotten`, in nats a token, values that forget more on average
    are passed over; where all do, the one that forgets least is taken.

    Raises:
      UserError: no arm varies a setting, nothing was asked, or with `most_forgotten` no forgetting
        was measured.
    """
    known = sorted({name for arm in arms for name in arm.settings})
    for setting in settings:
        if setting not in known:
            raise UserError(
                f"--choose: the runs do not vary '{setting[:60]}'. {nearest(setting, known) if known else 'They vary nothing.'}"
            )
    apart = DEVELOPMENT in splits_of(arms)
    if (split := DEVELOPMENT if apart else headline(splits_of(arms))) is None:
        raise UserError(
            f"--choose={','.join(settings)}: nothing was asked in these runs, so there is nothing to choose by"
        )
    if most_forgotten is not None and not any(arm.forgotten for arm in arms):
        raise UserError(
            "--most_forgotten: these runs measured no forgetting of prose; it needs --methods with base, and --held_out"
        )
    rivals: dict[str, list[Arm]] = {}
    for arm in arms:
        others = {name: value for name, value in arm.settings.items() if name not in settings}
        rivals.setdefault(repr(others), []).append(arm)

    def score(arm: Arm) -> tuple[float, float]:
        asked = arm if apart else _half(arm, 0)
        right = clustered.mean_of(asked.cells(split)) or 0.0
        if most_forgotten is None or not arm.forgotten:
            return (0.0, right)
        return (-max(statistics.mean(arm.forgotten) - most_forgotten, 0.0), right)

    best = [max(group, key=score) for group in rivals.values()]
    return best if apart else [_half(arm, 1) for arm in best]


def _half(arm: Arm, half: int) -> Arm:
    def kept(trial: Trial) -> Trial:
        mine = [
            p for p in trial.predictions if zlib.crc32(clustered.subject_of(p).encode()) % 2 == half
        ]
        return dataclasses.replace(trial, predictions=mine)

    return dataclasses.replace(
        arm, trials={seed: kept(trial) for seed, trial in arm.trials.items()}
    )


def named(arms: Sequence[Arm], wanted: str) -> Arm:
    """Finds the arm of which all of `NAME=VALUE,NAME=VALUE` are true. Raises `UserError` if that is
    none or several."""
    found = [arm for arm in arms if set(wanted.split(",")) <= set(arm.name.split(","))]
    if len(found) != 1:
        names = [arm.name for arm in (found or arms)]
        what = f"is true of {len(found)} arms; name one of them" if found else "is no arm"
        raise UserError(
            f"--baseline='{wanted[:60]}' {what}. {nearest(wanted, names) if not found else 'They are: ' + '; '.join(names)}"
        )
    return found[0]


def quality_table(arms: Sequence[Arm], *, grouped: bool = True) -> table.Table:
    """A row an arm: settings, seeds, final loss, and each split's share of right answers with its
    interval."""
    names, splits = list(arms[0].settings), splits_of(arms)
    split = headline(splits)
    letters = _letters(arms, split) if grouped and split is not None else None
    measured = any(arm.forgotten for arm in arms)
    rows = []
    for index, arm in enumerate(arms):
        quality = (table.percent(clustered.mean(arm.cells(split)).to_json()) for split in splits)
        loss = table.ratio(clustered.t_interval(arm.losses).to_json())
        forgotten = table.ratio(clustered.t_interval(arm.forgotten).to_json())
        settings = [shown(arm.settings[name]) for name in names] or ["all"]
        rows.append(
            (
                *settings,
                str(len(arm.trials)),
                loss,
                *quality,
                *((forgotten,) if measured else ()),
                *((letters[index],) if letters else ()),
            )
        )
    headers = (
        *(names or ["arm"]),
        "seeds",
        "final loss",
        *(f"{one} %" for one in splits),
        *(("prose, nats",) if measured else ()),
        *((f"group on {split}",) if letters else ()),
    )
    notes = ["Loss: training loss, nats per token, mean over seeds [Student's 95% interval]."]
    if splits:
        notes.append(
            "Percent of questions answered right [95% interval: a bootstrap that draws seeds and subjects anew; with one seed it says "
            "nothing about other seeds, with two or three little]."
        )
    if measured:
        notes.append(
            "Prose: cross entropy of held-out texts less the base model's, nats a token, mean over seeds [Student's 95% interval]."
        )
    if letters:
        notes.append(
            f"Group: arms that share a letter cannot be separated on {split} (sign-flip tests of all pairs, Holm, p < {ALPHA})."
        )
    return table.Table("Arms", headers, tuple(rows), tuple(notes))


def _letters(arms: Sequence[Arm], split: str) -> list[str] | None:
    """Groups the arms; None for one arm, or arms that were not asked the same."""
    try:
        return clustered.groups([arm.cells(split) for arm in arms]) if len(arms) > 1 else None
    except ValueError:
        return None


def comparisons(
    arms: Sequence[Arm], baseline: Arm, split: str, margin: float
) -> list[tuple[Arm, Difference]]:
    """Tests every other arm against one. Raises `UserError` for arms that were not asked the same
    questions under a shared seed."""
    others = [arm for arm in arms if arm is not baseline]
    try:
        found = clustered.compare(
            [(arm.cells(split), baseline.cells(split)) for arm in others], margin=margin
        )
    except ValueError as error:
        raise UserError(f"--baseline={baseline.name}: {error} (on {split})") from error
    return list(zip(others, found, strict=True))


def comparison_table(
    compared: Sequence[tuple[Arm, Difference]], baseline: Arm, split: str, margin: float
) -> table.Table:
    """A row an arm: its difference from the baseline with interval, p-values, verdict, and what
    could have been found."""
    points = f"{100 * margin:g} points"
    rows = tuple(
        (
            arm.name,
            table.percent(one.difference.to_json(), signed=True),
            _p(one.p_value),
            _p(one.p_holm),
            _VERDICTS[one.verdict],
            table.NONE if one.smallest is None else f"{100 * one.smallest:.1f}",
        )
        for arm, one in compared
    )
    notes = (
        f"Difference: points [95% interval over seeds and subjects]. p: sign-flip test over subjects, seeds as they are; Holm: corrected "
        f"for {len(rows)} comparisons. Equal: the 90% interval lies within {points} (two one-sided tests). Undecided is neither.",
        "Could find: the smallest true difference that a study of this size shows with a power of 80%, in points.",
    )
    headers = ("arm", "difference", "p", "p Holm", "verdict", "could find")
    return table.Table(f"Against {baseline.name} on {split}", headers, rows, notes)


def to_csv(arms: Sequence[Arm]) -> str:
    """Writes a row an arm and measure: settings, measure, value, low, high, n, seeds. Numbers are
    not rounded."""
    names = list(arms[0].settings)
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*names, "measure", "value", "low", "high", "n", "seeds"])
    for arm in arms:
        measures: dict[str, Interval] = (
            {"final_loss": clustered.t_interval(arm.losses)} if arm.losses else {}
        )
        measures |= {"forgotten": clustered.t_interval(arm.forgotten)} if arm.forgotten else {}
        measures |= {split: clustered.mean(arm.cells(split)) for split in splits_of([arm])}
        for measure, found in measures.items():
            numbers = (found.value, found.low, found.high, found.n, len(arm.trials))
            writer.writerow([*(arm.settings[name] for name in names), measure, *numbers])
    return out.getvalue()


def draw(arms: Sequence[Arm], folder: Path) -> dict[str, Path]:
    """Draws a response curve for each setting with two or more numbers, and learning against
    forgetting. Returns paths by caption."""
    split = headline(splits_of(arms))
    what = f"correct on {split}" if split else "final loss, nats per token"
    drawn = {}
    for setting in arms[0].settings:
        values = [arm.settings[setting] for arm in arms]
        if (
            all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
            and len(set(values)) > 1
        ):
            drawn[f"{what} by {setting}"] = _curve(
                arms, setting, split, what, folder / f"by_{setting}.png"
            )
    if split and RETENTION in splits_of(arms):
        drawn["Learning and forgetting"] = _pareto(arms, split, folder / "pareto.png")
    return drawn


def _curve(arms: Sequence[Arm], setting: str, split: str | None, what: str, path: Path) -> Path:
    # place, value, and how far its interval reaches down and up
    lines: dict[str, list[tuple[float, float, float, float]]] = {}
    for arm in arms:
        found = clustered.mean(arm.cells(split)) if split else clustered.t_interval(arm.losses)
        others = ",".join(
            f"{name}={shown(value)}" for name, value in arm.settings.items() if name != setting
        )
        if (value := found.value) is not None:
            low, high = (
                value if found.low is None else found.low,
                value if found.high is None else found.high,
            )
            lines.setdefault(others, []).append(
                (arm.settings[setting], value, max(value - low, 0), max(high - value, 0))
            )
    with matplotlib.rc_context(STYLE):
        figure = new_figure(6.0, 4.0)
        axes = figure.subplots()
        for (name, points), (colour, marker) in zip(
            list(lines.items())[:_MOST_LINES], METHOD_STYLE.values(), strict=False
        ):
            x, y, below, above = map(list, zip(*sorted(points), strict=True))
            axes.errorbar(
                x,
                y,
                yerr=[below, above],
                color=colour,
                marker=marker,
                markersize=5,
                elinewidth=1,
                label=name or what,
            )
        ticks = sorted({arm.settings[setting] for arm in arms})
        if min(ticks) > 0:
            axes.set_xscale("log")
        axes.set_xticks(ticks, [shown(tick) for tick in ticks])
        axes.minorticks_off()
        axes.set_xlabel(setting)
        axes.set_ylabel(what)
        if len(lines) > 1:
            left_out = (
                f" ({len(lines) - _MOST_LINES} more are not drawn)"
                if len(lines) > _MOST_LINES
                else ""
            )
            axes.legend(fontsize=7, title=f"of {len(lines)}{left_out}" if left_out else None)
        return save_figure(figure, path)


def _pareto(arms: Sequence[Arm], split: str, path: Path) -> Path:
    """Draws what each arm learned against what it kept; arms that no other beats in both are
    named."""
    found = [
        (clustered.mean_of(arm.cells(split)), clustered.mean_of(arm.cells(RETENTION)), arm.name)
        for arm in arms
    ]
    points = [(x, y, name) for x, y, name in found if x is not None and y is not None]
    front = [
        p
        for p in points
        if not any(q[0] >= p[0] and q[1] >= p[1] and q[:2] != p[:2] for q in points)
    ]
    with matplotlib.rc_context(STYLE):
        figure = new_figure(6.0, 4.0)
        axes = figure.subplots()
        axes.scatter([x for x, _, _ in points], [y for _, y, _ in points], color="0.6", s=16)
        axes.scatter(
            [x for x, _, _ in front],
            [y for _, y, _ in front],
            color=next(iter(METHOD_STYLE.values()))[0],
            s=24,
        )
        for x, y, name in front[:_MOST_LINES]:
            axes.annotate(name, (x, y), fontsize=7, xytext=(3, 3), textcoords="offset points")
        axes.set_xlabel(f"learned: correct on {split}")
        axes.set_ylabel(f"kept: correct on {RETENTION}")
        return save_figure(figure, path)


def shown(value: Any) -> str:
    """Writes a setting's value in a cell."""
    if isinstance(value, list | tuple):
        return "+".join(map(shown, value))
    return table.NONE if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _p(value: float) -> str:
    return "<0.001" if value < 0.001 else f"{value:.3f}"
