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
    try:
        imported = importlib.import_module(module)
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in ("vllm", "lm_eval"):
            raise
        pytest.skip(f"needs {missing}, which has an environment of its own")
    result = doctest.testmod(imported, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.failed == 0
