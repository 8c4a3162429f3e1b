"""The merged lock means, on each interpreter, what that interpreter resolved; and it covers all
that setup.py asks for."""

from __future__ import annotations

import email
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from scripts import lock

VERSIONS = st.sampled_from(["1.0", "1.1", "2.0.1"])
PINS = st.fixed_dictionaries(
    {python: st.dictionaries(st.sampled_from("abcd"), VERSIONS) for python in lock.PYTHONS}
)


def pinned(lines: list[str], python: str) -> dict[str, set[str]]:
    """Versions that constraint lines pin on that Python: `{name: versions}`."""
    found: dict[str, set[str]] = {}
    for line in lines:
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate({"python_version": python}):
            found.setdefault(requirement.name, set()).add(
                str(requirement.specifier).removeprefix("==")
            )
    return found


@given(PINS)
def test_merged_pins_read_back_on_each_python(pins):
    lines = lock.merge(pins)
    for python, own in pins.items():
        seen = pinned(lines, python)
        assert {name: seen[name] for name in own} == {
            name: {version} for name, version in own.items()
        }
        assert all(len(versions) == 1 for versions in seen.values())


@pytest.fixture(scope="module")
def requirements(tmp_path_factory) -> list[Requirement]:
    """Requirements of setup.py with all extras, as setuptools writes them into the package's
    metadata."""
    folder = tmp_path_factory.mktemp("egg")
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(folder)]
    subprocess.run(command, cwd=lock.ROOT, check=True, capture_output=True, timeout=60)
    (metadata,) = folder.glob("*/PKG-INFO")
    return [
        Requirement(line)
        for line in email.message_from_string(metadata.read_text()).get_all("Requires-Dist")
    ]


@pytest.mark.parametrize("python", lock.PYTHONS)
def test_each_requirement_has_one_pin_that_satisfies_it(requirements, python):
    seen = pinned(_lines(lock.CONSTRAINTS), python)
    for requirement in requirements:
        versions = seen.get(canonicalize_name(requirement.name), set())
        assert len(versions) == 1, (
            f"{requirement} has the pins {sorted(versions)} on Python {python}: run make lock"
        )
        assert requirement.specifier.contains(next(iter(versions))), (
            f"{requirement} excludes its pin {versions}: run make lock"
        )


def test_pins_name_plain_releases():
    """A path, an address or a local build (`+cpu`) exists on one machine only."""
    for line in _lines(lock.CONSTRAINTS):
        requirement = Requirement(line)
        (pin,) = requirement.specifier
        assert requirement.url is None and pin.operator == "==" and "+" not in pin.version, line


def _lines(path: Path) -> list[str]:
    return [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
