"""Recipes are programs outside the package: tests take them as modules."""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.fixture
def load_recipe(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Import `recipes/PATH` for one test."""

    def load(path: str) -> ModuleType:
        name = "recipe_" + path.removesuffix(".py").replace("/", "_")
        spec = importlib.util.spec_from_file_location(name, RECIPES / path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        # dataclasses, and processes that it starts, look their module up
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        return module

    return load
