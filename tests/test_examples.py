"""The examples in docstrings run, and every function that a package exports has one."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil
import re
from pathlib import Path
from typing import Any

import pytest

import kafjax.hub
import kafjax.lora
import kafjax.retrieval
from tests import tiny

ROOT = Path(__file__).parent.parent
PACKAGES = (kafjax.hub, kafjax.lora, kafjax.retrieval)
MODULES = [
    module.name
    for package in PACKAGES
    for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}.")
]
EXPORTED = [
    pytest.param(value, id=f"{package.__name__}.{name}")
    for package in PACKAGES
    for name in package.__all__
    if inspect.isroutine(value := getattr(package, name))
    or inspect.isclass(value)
    or inspect.ismodule(value)
]


def test_the_readme_runs(tmp_path, capsys):
    """Its example with small random models in place of the published ones."""
    tiny.write_gemma(tmp_path / "gemma")
    tiny.write_bert(tmp_path / "bert")
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (example,) = [block for block in blocks if "hub.load" in block]
    for name, folder in (("gemma3-270m", "gemma"), ("minilm", "bert")):
        example = example.replace(f'"{name}"', repr(str(tmp_path / folder)))
    shown: dict[str, Any] = {}
    exec(example, shown)
    assert shown["logits"].shape[:2] == shown["tokens"].shape
    assert shown["hit"].passage in shown["passages"]
    assert capsys.readouterr().out == f"{shown['reply'].text}\n"


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0


@pytest.mark.parametrize("exported", EXPORTED)
def test_what_is_exported_has_an_example(exported):
    """A function that needs the weights of a model has it in the docstring of its module, where it
    is not run."""
    module = inspect.getmodule(exported)
    assert ">>>" in (exported.__doc__ or "") or f"{exported.__name__}(" in (module.__doc__ or "")
