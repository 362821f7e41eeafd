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


def names_in(node: ast.AST) -> set[str]:
    """Names and attributes that are read, and names that are imported."""
    names = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
    names |= {n.attr for n in ast.walk(node) if isinstance(n, ast.Attribute)}
    return names | {a.name for n in ast.walk(node) if isinstance(n, ast.ImportFrom) for a in n.names}


def parts_of() -> dict[str, set[str]]:
    """What each class and function of moe_ext.nn is made of."""
    found: dict[str, set[str]] = {}
    for path in Path(moe_ext.nn.__file__).parent.glob("*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
                found[node.name] = names_in(node)
    return found


@pytest.mark.parametrize("module", [moe_ext.nn, moe_ext.nn.transforms], ids=lambda module: module.__name__)
def test_every_primitive_is_used_by_a_recipe(module):
    """By a recipe itself, or by a primitive that a recipe uses."""
    parts = parts_of()
    used = set().union(*(names_in(ast.parse(path.read_text())) for path in FILES)) & set(parts)
    while more := set().union(*(parts[name] for name in used)) & set(parts) - used:
        used |= more
    unused = set(module.__all__) - used
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
