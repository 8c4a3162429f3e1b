"""Metadata of an installation: the version, and the mark that the package is typed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import kafjax

ROOT = Path(__file__).parent.parent


def test_importing_the_package_gives_its_packages_and_nothing_else_at_once():
    code = (
        "import sys, kafjax\n"
        "assert 'jax' not in sys.modules\n"
        "assert kafjax.hub.load and 'hub' in dir(kafjax) and not hasattr(kafjax, 'hubs')"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_the_built_package_is_typed_and_of_the_version_that_it_says(tmp_path):
    build = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    assert (tmp_path / "kafjax" / "py.typed").is_file()
    version = subprocess.run(
        [sys.executable, "setup.py", "--version"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    assert version.split()[-1] == kafjax.__version__
