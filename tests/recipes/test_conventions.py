"""What a recipe looks like, and that every primitive has one that uses it."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from pathlib import Path

import pytest

import moe_ext.nn
import moe_ext.nn.transforms
from moe_ext import recipes

FOLDER = Path(recipes.__file__).parent
FILES = sorted(path for path in FOLDER.glob("*.py") if path.name != "__init__.py")
# Results and the parts of other primitives' signatures: nobody makes them by hand.
RESULTS = {"GateMaps", "LayerStatistics", "MoEOutput", "MultiGatePlan", "NoisyRouting", "Routing"}
# Bases, and the pieces that a primitive which is used is made of.
PARTS = {"Router", "SharedExpert", "expert_rows", "multi_gate_combine", "multi_gate_plan"}


def names_used(path: Path) -> set[str]:
    """Names that a file imports from moe_ext.nn, and attributes that it takes of modules so imported."""
    tree = ast.parse(path.read_text())
    imported = {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("moe_ext.nn")
        for alias in node.names
    }
    return imported | {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}


@pytest.mark.parametrize("module", [moe_ext.nn, moe_ext.nn.transforms], ids=lambda module: module.__name__)
def test_every_primitive_is_used_by_a_recipe(module):
    used = set().union(*map(names_used, FILES))
    unused = set(module.__all__) - used - RESULTS - PARTS
    assert not unused, f"{module.__name__}: no recipe uses {sorted(unused)}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_recipe_is_short_cites_and_is_tested(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 100, f"{path.name}: a recipe is short"
    docstring = ast.get_docstring(ast.parse(text)) or ""
    assert re.search(r"arXiv\s+\d{4}\.\d{4,5}|\b(19|20)\d\d\b", docstring), f"{path.name}: cites no paper"
    assert (Path(__file__).parent / f"test_{path.stem}.py").exists()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_recipe_is_exported(path):
    module = importlib.import_module(f"moe_ext.recipes.{path.stem}")
    made = {
        name
        for name, value in vars(module).items()
        if inspect.getmodule(value) is module
        and not name.startswith("_")
        and (inspect.isclass(value) or inspect.isfunction(value))
    }
    assert made & set(recipes.__all__), f"{path.name}: exports none of {sorted(made)}"


def test_exports_are_there():
    assert all(getattr(recipes, name).__doc__ for name in recipes.__all__)
