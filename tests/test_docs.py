"""Every Python block of the README and of docs/ runs, and the documentation builds without a warning."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCKS = [
    (page.relative_to(ROOT).as_posix(), number, block)
    for page in PAGES
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.S))
]


@pytest.mark.parametrize("page, number, block", BLOCKS, ids=[f"{page}-{number}" for page, number, _ in BLOCKS])
def test_block_runs(page, number, block):
    torch.use_deterministic_algorithms(False)
    exec(compile(block, f"{page} block {number}", "exec"), {"__name__": "__docs__"})


def test_there_are_blocks():
    pages = {page for page, _, _ in BLOCKS}
    assert {"README.md", "docs/quickstart.md", "docs/training.md", "docs/migration.md"} <= pages


def test_documentation_builds(tmp_path):
    """Warnings are errors: a page in no table of contents, a name that autodoc cannot import, a broken link."""
    pytest.importorskip("sphinx", reason="sphinx is not installed (requirements/dev.txt)")
    build = subprocess.run(
        [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html", ROOT / "docs", tmp_path],
        capture_output=True,
        text=True,
    )
    assert build.returncode == 0, build.stderr[-3000:]
    reference = (tmp_path / "reference/gating.html").read_text()
    assert 'id="moe_ext.topk_gating"' in reference and "renormalize_eps" in reference


def test_every_public_name_is_documented():
    import moe_ext

    reference = "\n".join(page.read_text() for page in (ROOT / "docs/reference").glob("*.md"))
    missing = [name for name in moe_ext.__all__ if f"moe_ext.{name}\n" not in reference + "\n"]
    assert not missing
