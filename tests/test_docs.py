"""Every Python block of the README and of docs/ runs, and the documentation builds without a warning."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import __main__ as bench
from bench.headline import headline, read_from
from moe_ext.distributed.placement.__main__ import main as place

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCKS = [
    (page.relative_to(ROOT).as_posix(), number, block)
    for page in PAGES
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.S))
]


@pytest.mark.parametrize("page, number, block", BLOCKS, ids=[f"{page}-{number}" for page, number, _ in BLOCKS])
def test_block_runs(page, number, block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.use_deterministic_algorithms(False)
    exec(compile(block, f"{page} block {number}", "exec"), {"__name__": "__docs__"})


def test_there_are_blocks():
    pages = {page for page, _, _ in BLOCKS}
    assert {"README.md", "docs/quickstart.md", "docs/training.md", "docs/migration.md"} <= pages


README = PAGES[0].read_text()
RESULTS = sorted((ROOT / "bench/results").glob("*.json"))


def commands(name: str) -> list[list[str]]:
    """The arguments of every call of a command that the README prints, without what shell and prose add."""
    lines = re.findall(rf"(?:^    |`)(?:[A-Z_]+=\S+ )*{re.escape(name)}(?: +([^`\n#]*))?", README, re.MULTILINE)
    return [shlex.split(line) for line in lines]


def test_figures_of_the_readme_are_those_of_the_result_files():
    assert read_from(ROOT / "README.md") == headline(RESULTS), (
        "run: python -m bench headline bench/results/*.json --page README.md"
    )


@pytest.mark.parametrize("folder", sorted({path.parent for path in (ROOT / "bench/results").rglob("*.json")}), ids=str)
def test_results_page_is_what_the_command_prints(folder, capsys):
    results, page = sorted(folder.glob("*.json")), (folder / "README.md").read_text()
    bench.main(["report", *map(str, results)])
    name = folder.relative_to(ROOT)
    assert capsys.readouterr().out == page, f"run: python -m bench report {name}/*.json > {name}/README.md"
    for path in results:
        assert f"## {path.name}" in page


def test_bench_commands_of_the_readme_parse():
    found = commands("python -m bench")
    assert len(found) >= 8
    for arguments in found:
        if arguments[-1:] != ["--help"]:
            bench.parse(arguments)
    assert {tuple(a)[:1] for a in found} >= {("report",), ("compare",), ("shapes",), ("headline",), ("tune-tiles",)}


def test_make_targets_and_variables_of_the_readme_exist():
    makefile = (ROOT / "Makefile").read_text()
    targets = {arguments[0] for arguments in commands("make")}
    assert targets >= {"bench", "test", "help", "docs", "wheel"}
    assert not [target for target in targets if f"\n{target}:" not in makefile]
    sources = "".join(p.read_text() for p in (ROOT / "setup.py", ROOT / "Makefile", *(ROOT / "csrc").rglob("*.cpp"), *(ROOT / "csrc").rglob("*.h"), *(ROOT / "csrc").rglob("*.cu")))  # fmt: skip
    variables = re.findall(r"^\| `([A-Z_0-9]+)` \|", README, re.MULTILINE)
    assert len(variables) >= 5 and not [name for name in variables if name not in sources]


def test_placement_command_of_the_readme(tmp_path, monkeypatch, capsys):
    """On the trace that the block above it records."""
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (requirements/dev.txt)")
    monkeypatch.chdir(tmp_path)
    (block,) = (block for page, _, block in BLOCKS if page == "README.md" and "TraceRecorder" in block)
    exec(compile(block, "README.md", "exec"), {"__name__": "__docs__"})
    (arguments,) = commands("python -m moe_ext.distributed.placement")
    assert place(arguments) == 0
    assert "balancedness" in capsys.readouterr().out
    assert Path("placement.json").exists() and Path("loads.png").exists()


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
