"""The examples in docstrings run, and every function that a package exports has one."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil

import pytest

import kafjax.hub
import kafjax.lora
import kafjax.retrieval

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


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0


@pytest.mark.parametrize("exported", EXPORTED)
def test_what_is_exported_has_an_example(exported):
    """A function that needs the weights of a model has it in the docstring of its module, where it
    is not run."""
    module = inspect.getmodule(exported)
    assert ">>>" in (exported.__doc__ or "") or f"{exported.__name__}(" in (module.__doc__ or "")
