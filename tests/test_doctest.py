"""Every example in a public docstring runs."""

import doctest
import importlib
import pkgutil

import pytest

import topmass

MODULES = [
    module.name
    for module in pkgutil.walk_packages(topmass.__path__, "topmass.")
    if not any(part.startswith("_") for part in module.name.split("."))
]


@pytest.mark.parametrize("module", MODULES)
def test_examples(module: str) -> None:
    result = doctest.testmod(importlib.import_module(module), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.failed == 0
