"""Writes constraints.txt: one version of every package we may install, for each Python we support.

    python scripts/lock.py              # keeps the pins there are, adds what is missing, drops what is not needed any more
    python scripts/lock.py --upgrade    # takes the newest releases that setup.py allows

Needs python3.11, python3.12 and python3.13 on PATH. Each resolves the project with all its extras
in a fresh virtual environment; nothing is installed, and of a wheel only the metadata is read where
the index serves byte ranges (the CUDA libraries behind torch are gigabytes). Versions are those for
Linux on x86-64.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CONSTRAINTS = ROOT / "constraints.txt"
PYTHONS = ("3.11", "3.12", "3.13")
EXTRAS = (
    "bench",
    "chat",
    "data",
    "demo",
    "dev",
    "documents",
    "gcs",
    "launch",
    "retrieval",
    "s3",
    "test",
    "tpu",
)
UNLOCKED = ("cuda",)  # gigabytes of libraries, which jax pins itself
# Held here, because a newer torch means another CUDA stack: raise it on purpose.
HELD = ("torch==2.13.0",)
HEADER = """\
# Written by scripts/lock.py (`make lock`): every package that kafjax and its extras may install, for Python 3.11 to 3.13.
# A constraint installs nothing by itself: it only fixes the version of what is asked for.
"""

Pins = Mapping[str, str]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--upgrade", action="store_true", help="ignore the pins there are")
    keep = (
        CONSTRAINTS.read_text() if CONSTRAINTS.exists() and not parser.parse_args().upgrade else ""
    )
    interpreters = {version: find_python(version) for version in PYTHONS}
    pins = {}
    for version, python in interpreters.items():
        print(f"resolving for Python {version} ...", flush=True)
        pins[version] = resolve(python, keep)
    CONSTRAINTS.write_text(HEADER + "".join(f"{line}\n" for line in merge(pins)))
    print(
        f"wrote {CONSTRAINTS.name}: {', '.join(f'{len(p)} packages for {v}' for v, p in pins.items())}"
    )


def find_python(version: str) -> str:
    python = shutil.which(f"python{version}")
    if python is None or subprocess.run([python, "-c", ""], capture_output=True).returncode:
        sys.exit(
            f"error: python{version} is not on PATH or does not run; the lock needs {', '.join(PYTHONS)}"
        )
    return python


def resolve(python: str, keep: str) -> dict[str, str]:
    """Returns `{normalised name: version}` of everything that pip would install for all extras."""
    with tempfile.TemporaryDirectory() as folder:
        room = Path(folder)
        held = {pin.partition("==")[0] for pin in HELD}
        kept = [line for line in keep.splitlines() if line.partition("==")[0] not in held]
        (room / "keep.txt").write_text("\n".join([*kept, *HELD]) + "\n")
        # a copy, since reading a project's metadata writes into its folder
        project = room / "project"
        (project / "kafjax").mkdir(parents=True)
        for name in ("setup.py", "pyproject.toml", "LICENSE", "kafjax/__init__.py"):
            shutil.copy(ROOT / name, project / name)
        venv_python = room / "venv" / "bin" / "python"
        run(python, "-m", "venv", str(room / "venv"))
        run(
            str(venv_python),
            "-m",
            "pip",
            "install",
            "--quiet",
            "--upgrade",
            "pip",
            "--constraint",
            str(room / "keep.txt"),
        )
        run(
            *(
                str(venv_python),
                "-m",
                "pip",
                "install",
                "--quiet",
                "--dry-run",
                "--ignore-installed",
            ),
            *(
                "--use-feature=fast-deps",
                "--report",
                str(room / "report.json"),
                "--constraint",
                str(room / "keep.txt"),
            ),
            *("pip", "setuptools", f"{project}[{','.join(EXTRAS)}]"),
        )
        found = [
            item["metadata"] for item in json.loads((room / "report.json").read_text())["install"]
        ]
    pins = {normalise(item["name"]): item["version"].split("+")[0] for item in found}
    declared = next(item.get("provides_extra", []) for item in found if item["name"] == "kafjax")
    if sorted(declared) != sorted([*EXTRAS, *UNLOCKED]):
        sys.exit(
            f"error: setup.py has the extras {sorted(declared)}, scripts/lock.py locks {sorted(EXTRAS)}"
        )
    del pins["kafjax"]
    return pins


def run(*command: str) -> None:
    if subprocess.run(command).returncode:
        sys.exit(f"error: failed: {' '.join(command)}")


def normalise(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def merge(pins: Mapping[str, Pins]) -> list[str]:
    """`{python: {name: version}}` -> constraint lines, with a marker only where the interpreters
    differ.

    A package that only some interpreters need is pinned without a marker: where nobody asks for it,
    the pin does nothing.
    """
    lines = []
    for name in sorted({name for found in pins.values() for name in found}):
        pythons: dict[str, list[str]] = {}
        for python in PYTHONS:
            if name in pins[python]:
                pythons.setdefault(pins[python][name], []).append(python)
        if len(pythons) == 1:
            lines.append(f"{name}=={next(iter(pythons))}")
        else:
            lines += [f"{name}=={version} ; {marker(where)}" for version, where in pythons.items()]
    return lines


def marker(where: list[str]) -> str:
    """An environment marker that holds for `where`: some, not all, of `PYTHONS`, in their order."""
    if where == list(PYTHONS[: len(where)]):
        return f'python_version < "{PYTHONS[len(where)]}"'
    if where == list(PYTHONS[-len(where) :]):
        return f'python_version >= "{where[0]}"'
    return " or ".join(f'python_version == "{python}"' for python in where)


if __name__ == "__main__":
    main()
