"""Loads one set of op libraries under several torches and CPythons, and writes down what worked.

    python tests/load_matrix.py --write tests/load_matrix.md      # the installed moe_ext, every combination
    python tests/load_matrix.py --torches 2.11 --pythons 3.12     # one of them

For each combination the wheel of torch is downloaded without what it depends on (one at a time, deleted after use),
moe_ext is imported, every schema must have a CPU kernel (and a CUDA kernel where that torch has CUDA and its libraries
are there), and a layer must give the right numbers, forward, backward and under torch.func. CUDA libraries are those
beside the running torch. Not a test of the suite: it downloads half a gigabyte for each combination.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch

import moe_ext

PYTHONS = ("3.10", "3.11", "3.12", "3.13")
TORCHES = ("2.11", "2.12", "2.13", "2.14")
# What torch imports, in versions that suit the oldest of PYTHONS; where they have compiled parts, they run without.
NEEDED = ("typing_extensions", "sympy", "mpmath", "networkx", "jinja2", "markupsafe", "fsspec", "filelock")

PROBE = """
import json, sys, warnings
warnings.filterwarnings("ignore")
import torch, moe_ext
names = [s.name for s in torch._C._jit_get_all_schemas() if s.name.startswith("moe_ext::")]
def missing(key):
    return [n for n in names if not torch._C._dispatch_has_kernel_for_dispatch_key(n, key)]
torch.manual_seed(0)
hidden, logits = torch.randn(9, 8, dtype=torch.double), torch.randn(9, 4, dtype=torch.double)
up, down = torch.randn(4, 12, 8, dtype=torch.double), torch.randn(4, 8, 6, dtype=torch.double)
def loss(ops, hidden, logits, up, down):
    weights, ids = ops.topk_gating(logits, 2, renormalize=True)
    plan = ops.routing_plan(ids, 4)
    return ops.moe_mlp(hidden, up, down, plan, weights, weight_layout="enk").square().sum()
import moe_ext.reference
arguments = (hidden, logits, up, down)
leaves = [x.clone().requires_grad_() for x in arguments]
results = [torch.autograd.grad(loss(ops, *leaves), leaves) for ops in (moe_ext, moe_ext.reference)]
results.append(torch.func.grad(lambda *a: loss(moe_ext, *a), argnums=(0, 1, 2, 3))(*arguments))
right = all(torch.allclose(a, b) for found in results for a, b in zip(found, results[1]))
try:
    torch.func.jvp(lambda x: moe_ext.expert_activation(x), (hidden,), (hidden,))
    right = False
except NotImplementedError:
    pass
try:
    host = bool(moe_ext.build_info()["version"])
except ImportError:
    host = False
cuda = torch.version.cuda if moe_ext._library.PACKAGE.joinpath("libmoe_ext_cuda.so").exists() else None
print(json.dumps({
    "python": ".".join(map(str, sys.version_info[:3])), "torch": torch.__version__, "ops": len(names),
    "without CPU kernel": missing("CPU"), "cuda library": "loaded" if cuda else "not loaded",
    "without CUDA kernel": missing("CUDA") if cuda else [], "numbers": right, "moe_ext._host": host,
}))
"""


def find_python(version: str) -> str | None:
    """An interpreter of this minor version: on PATH, or among pyenv's."""
    candidates = [f"python{version}", *map(str, Path.home().glob(f".pyenv/versions/{version}*/bin/python"))]
    for candidate in candidates:
        try:
            run = subprocess.run(
                [candidate, "-c", "import sys; print(sys.version_info[:2])"], capture_output=True, text=True
            )
        except OSError:
            continue
        if run.returncode == 0 and run.stdout.strip() == str(tuple(map(int, version.split(".")))):
            return candidate
    return None


def pip(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def for_python(version: str) -> list[str]:
    return ["--no-deps", "--only-binary=:all:", "--python-version", version]


def probe(version: str, torch_version: str, package: Path, needed: Path, work: Path) -> dict[str, object]:
    """One cell of the matrix."""
    cell: dict[str, object] = {"python": version, "torch": torch_version}
    interpreter = find_python(version)
    if interpreter is None:
        return {**cell, "error": "no such interpreter"}
    site = work / "site"
    site.mkdir()
    try:
        if pip("download", *for_python(version), f"torch=={torch_version}.*", "--dest", str(work)).returncode != 0:
            return {**cell, "error": "not obtainable"}
        (wheel,) = work.glob("torch-*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(site)
        wheel.unlink()
        # Torch looks for CUDA's libraries in its neighbour folder.
        nvidia = Path(torch.__file__).resolve().parent.parent / "nvidia"
        if nvidia.exists():
            (site / "nvidia").symlink_to(nvidia)
        command = [interpreter, "-s", "-c", PROBE]
        path = ":".join(map(str, (package.parent, site, needed)))
        run = subprocess.run(command, env={"PYTHONPATH": path, "PATH": "/usr/bin:/bin"}, capture_output=True, text=True)
        if run.returncode != 0:
            return {**cell, "error": (run.stderr.strip().splitlines() or [f"exit status {run.returncode}"])[-1]}
        return {**cell, **json.loads(run.stdout.splitlines()[-1])}
    finally:
        shutil.rmtree(work)
        work.mkdir()


def is_good(cell: dict[str, object]) -> bool:
    return cell.get("numbers") is True and not cell["without CPU kernel"] and not cell["without CUDA kernel"]


def matrix_text(cells: list[dict[str, object]]) -> str:
    """The matrix as a Markdown table, with what went wrong below it."""
    pythons = list(dict.fromkeys(cell["asked_python"] for cell in cells))
    torches = list(dict.fromkeys(cell["asked_torch"] for cell in cells))
    built = moe_ext.build_info()
    lines = [
        "# One build, several torches and CPythons", "",
        "Written by `python tests/load_matrix.py --write tests/load_matrix.md`. One `libmoe_ext.so` and one",
        f"`libmoe_ext_cuda.so`, built with torch {built['built_with_torch']}: loaded, every op with its kernels, a layer",
        "forward, backward and under torch.func with the right numbers. `+ CUDA library` where that torch loads it too.",
        "", "| torch | " + " | ".join(f"CPython {p}" for p in pythons) + " |", "|---" * (len(pythons) + 1) + "|",
    ]  # fmt: skip
    notes = []
    for version in torches:
        row = []
        for cell in (cell for cell in cells if cell["asked_torch"] == version):
            text = str(cell["torch"]) + (" + CUDA library" if cell.get("cuda library") == "loaded" else "")
            row.append(text if is_good(cell) else "no")
            if not is_good(cell):
                reason = cell.get("error") or json.dumps(cell)
                notes.append(f"- torch {version}, CPython {cell['asked_python']}: {reason}")
        lines.append(f"| {version} | " + " | ".join(row) + " |")
    return "\n".join([*lines, "", *notes]).rstrip() + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torches", nargs="+", default=TORCHES, metavar="MINOR", help=f"default: {' '.join(TORCHES)}")
    parser.add_argument("--pythons", nargs="+", default=PYTHONS, metavar="MINOR", help=f"default: {' '.join(PYTHONS)}")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the matrix there as Markdown")
    options = parser.parse_args()
    package, cells = Path(moe_ext.__file__).resolve().parent, []
    with tempfile.TemporaryDirectory() as temporary:
        needed, work = Path(temporary) / "needed", Path(temporary) / "work"
        work.mkdir()
        if (run := pip("install", *for_python(min(PYTHONS)), "--target", str(needed), *NEEDED)).returncode != 0:
            raise SystemExit(run.stderr)
        for torch_version in options.torches:
            for version in options.pythons:
                cell = {
                    "asked_torch": torch_version,
                    "asked_python": version,
                    **probe(version, torch_version, package, needed, work),
                }
                cells.append(cell)
                print("ok  " if is_good(cell) else "FAIL", json.dumps(cell), flush=True)
    text = matrix_text(cells)
    print(text)
    if options.write:
        options.write.write_text(text)
    sys.exit(not all(map(is_good, cells)))


if __name__ == "__main__":
    main()
