"""Runs a paper: its sweep, our table beside the paper's, a figure, and a verdict per claim."""

from __future__ import annotations

import textwrap
import time
from collections.abc import Sequence
from pathlib import Path

from experiments import build
from experiments.configs.paper import Paper
from experiments.papers.card import Card, Sabotage
from kafjax.core.errors import UserError, nearest
from kafjax.core.progress import LINE_SECONDS, waiting
from kafjax.core.rundir import environment, write_atomic, write_json
from kafjax.evaluation import arms, raw, table
from kafjax.evaluation.arms import Arm
from kafjax.evaluation.claims import SHOWN, Verdict, judge, verdict_table
from launch import sweep as launch_sweep
from launch.config import Launch
from launch.ledger import DONE, Ledger

RAW = "raw.jsonl.gz"
COLUMNS = 100


def main(card: Card) -> None:
    """Runs a card as a program."""
    build.start(Paper, lambda config: run(card, config))


def run(card: Card, config: Paper) -> list[Verdict] | None:
    """Runs what is missing of a paper and judges it. Returns None for a dry run.

    Raises:
      UserError: a sabotage that the card does not have, a raw file that cannot be read, or runs
        that failed.
    """
    broken = sabotage_of(card, config.sabotage)
    suffix = "" if config.sabotage is None else f"-{config.sabotage}"
    folder = Path(config.folder or f"papers/{card.name}-{config.scale}{suffix}")
    print(card.told(config.scale))
    started = time.monotonic()
    if config.raw is not None:
        found = raw.read(Path(config.raw))
    else:
        card.prepare(config.scale)
        sweep = card.sweep(config.scale)
        if broken is not None:
            print(f"Sabotage: {broken.what}.\n")
            sweep = broken.change(sweep)
        ledger = Ledger(folder, sweep.runs())
        ledger.check()
        if config.dry_run:
            print(launch_sweep.dry_run(ledger, Launch()))
            return None
        launch_sweep.race(ledger, Launch())
        found = card.read(ledger.run_folders)
    with waiting("papers", "computing intervals and tests", after=LINE_SECONDS):
        verdicts = judge(card.claims, found)
    out = Path(config.out or folder)
    write(card, config.scale, found, verdicts, out)
    if config.raw is None:
        raw.write(out / RAW, found)
        write_json(out / "took.json", took(ledger) | {"environment": environment()})
    print(f"Look at {out}/README.md and {out}/figure.png.")
    if broken is not None:
        check_turned(broken, verdicts)
        print("Every claim that the sabotage should turn has turned.")
    print(f"Judged in {time.monotonic() - started:.0f} s.")
    return verdicts


def sabotage_of(card: Card, name: str | None) -> Sabotage | None:
    """Finds a sabotage by its name. Raises `UserError` with the nearest one."""
    if name is not None and name not in card.sabotages:
        known = card.sabotages
        hint = nearest(name, known) if known else "This card has none."
        raise UserError(f"--sabotage: '{name[:60]}' is none of {card.name}. {hint}")
    return None if name is None else card.sabotages[name]


def check_turned(broken: Sabotage, verdicts: Sequence[Verdict]) -> None:
    """Raises `UserError` naming the claims that a sabotage leaves shown."""
    still = [v.claim.text for v in verdicts if v.claim.text in broken.turns and v.how == SHOWN]
    if still:
        raise UserError(f"though {broken.what}, still shown: {'; '.join(still)}")


def write(
    card: Card, scale: str, found: Sequence[Arm], verdicts: Sequence[Verdict], out: Path
) -> None:
    """Writes README.md (card, both tables, verdicts) and figure.png, and prints the tables."""
    tables = [arms.quality_table(found), card.published, verdict_table(verdicts)]
    text = table.render(tables, [])
    print(text)
    card.figure(found, out / "figure.png")
    command = f"python -m experiments.papers.{card.name} --scale={scale}"
    page = f"{card.told(scale)}\n{text}\n![figure](figure.png)\n\nCommand: `{command}`\n"
    write_atomic(out / "README.md", wrapped(page))


def wrapped(page: str) -> str:
    """Wraps the prose of a page, as those of docs/ are. Tables and headings stay."""
    parts = page.strip().split("\n\n")
    lines = [
        part
        if part.startswith(("|", "#"))
        else "\n".join(
            textwrap.fill(line, COLUMNS, subsequent_indent="  " * line.startswith("- "))
            for line in part.splitlines()
        )
        for part in (" ".join(p.split()) if not p.startswith(("|", "#", "-")) else p for p in parts)
    ]
    return "\n\n".join(lines) + "\n"


def took(ledger: Ledger) -> dict[str, object]:
    """Sums the seconds of the runs that ended well, and counts all attempts."""
    states = [ledger.state(run, Launch().retries) for run in ledger.runs]
    seconds = [
        attempt.outcome.seconds
        for state in states
        for attempt in state.attempts
        if attempt.outcome is not None and attempt.outcome.how == DONE
    ]
    return {
        "runs": len(states),
        "attempts": sum(len(state.attempts) for state in states),
        "seconds": sum(seconds),
    }
