"""The table of published systems: every file that it names exists, every recipe is in it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LINES = (ROOT / "docs/systems.md").read_text().splitlines()
COLUMNS = ["system", "what is unusual", "recipe", "test", "published", "what the test measures"]
ROWS = [[cell.strip() for cell in line.strip("|").split("|")] for line in LINES if line.startswith("|")]
SYSTEMS = [row for row in ROWS if row != COLUMNS and row[0] != "---"]


def files_in(cell: str, folder: Path) -> list[Path]:
    return [folder / name for name in re.findall(r"`([\w/]+\.py)`", cell)]


@pytest.mark.parametrize("row", SYSTEMS, ids=[row[0] for row in SYSTEMS])
def test_row(row):
    assert len(row) == len(COLUMNS) and all(row)
    files = files_in(row[2], ROOT / "python/moe_ext") + files_in(row[3], ROOT / "tests")
    assert files_in(row[2], ROOT) and files_in(row[3], ROOT)
    assert not [str(f) for f in files + files_in(row[5], ROOT / "tests") if not f.exists()]


def test_every_recipe_is_in_the_table():
    listed = {path.name for row in SYSTEMS for path in files_in(row[2], ROOT)}
    recipes = {path.name for path in (ROOT / "python/moe_ext/recipes").glob("*.py")} - {"__init__.py"}
    assert len(recipes) >= 20 and not recipes - listed


def test_no_system_is_listed_twice():
    names = [row[0] for row in SYSTEMS]
    assert len(names) == len(set(names))
