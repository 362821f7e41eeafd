"""Loads one pair of op libraries under several torches and Pythons, and prints what worked.

    python tests/load_matrix.py                       # the libraries of the installed moe_ext
    python tests/load_matrix.py --libraries DIR --environments DIR

Each environment is a virtual environment made here (with pip, so the torches must be obtainable). Under each the
libraries are loaded, every schema must have a CPU kernel (and a CUDA kernel where that torch has CUDA), and an op must
give the right numbers. Not a test of the suite: it downloads several torches.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
from pathlib import Path

# (CPython, torch): the oldest torch that is supported, the newest, and one without CUDA.
MATRIX = [("3.12", "torch==2.11.0"), ("3.11", "torch==2.14.1"), ("3.11", "torch==2.13.0")]

PROBE = """
import json, pathlib, sys, torch
folder = pathlib.Path(sys.argv[1])
torch.ops.load_library(str(folder / "libmoe_ext.so"))
has_cuda = torch.version.cuda is not None and (folder / "libmoe_ext_cuda.so").exists()
if has_cuda:
    torch.ops.load_library(str(folder / "libmoe_ext_cuda.so"))
names = [s.name for s in torch._C._jit_get_all_schemas() if s.name.startswith("moe_ext::")]
def missing(key):
    return [n for n in names if not torch._C._dispatch_has_kernel_for_dispatch_key(n, key)]
ids = torch.tensor([[1, 0], [1, 2]], dtype=torch.int32)
offsets, counts, slots, rows = torch.ops.moe_ext.routing_plan(ids, 3, None, None, 1)
hidden = torch.arange(4.0).view(2, 2)
permuted = torch.ops.moe_ext.permute(hidden, slots, rows, 2)
weight = torch.eye(2).repeat(3, 1, 1)
product, _ = torch.ops.moe_ext.grouped_gemm(permuted, weight, offsets, "enk", None, None, None, 2, "none",
                                            "concatenated", 1.0, 1.0, False)
summed = torch.ops.moe_ext.unpermute(product, slots, rows, None, 2)
print(json.dumps({
    "python": ".".join(map(str, sys.version_info[:3])), "torch": torch.__version__, "ops": len(names),
    "without CPU kernel": missing("CPU"), "cuda library": "loaded" if has_cuda else "torch without CUDA",
    "without CUDA kernel": missing("CUDA") if has_cuda else [],
    "numbers": bool(torch.equal(summed, 2 * hidden) and counts.tolist() == [1, 2, 1]),
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


def probe(version: str, torch: str, libraries: Path, environments: Path) -> dict[str, object]:
    """One row of the matrix."""
    environment = environments / f"{version}-{torch.replace('==', '-')}"
    python = environment / "bin/python"
    if not python.exists():
        interpreter = find_python(version)
        if interpreter is None:
            return {"python": version, "torch": torch, "error": "no such interpreter"}
        subprocess.run([interpreter, "-m", "venv", str(environment)], check=True)
    if subprocess.run([python, "-c", "import torch"], capture_output=True).returncode != 0:
        install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", torch, "numpy"]
        if subprocess.run(install).returncode != 0:
            return {"python": version, "torch": torch, "error": "not obtainable"}
    run = subprocess.run([python, "-c", PROBE, str(libraries)], capture_output=True, text=True)
    if run.returncode != 0:
        return {"python": version, "torch": torch, "error": run.stderr.strip().splitlines()[-1]}
    return json.loads(run.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--libraries", type=Path, help="folder of libmoe_ext.so and libmoe_ext_cuda.so")
    parser.add_argument(
        "--environments", type=Path, help="where the virtual environments are kept (default: temporary)"
    )
    options = parser.parse_args()
    libraries = options.libraries
    if libraries is None:
        spec = importlib.util.find_spec("moe_ext")
        if spec is None or spec.origin is None:
            raise SystemExit("moe_ext is not installed; give --libraries")
        libraries = Path(spec.origin).parent
    with tempfile.TemporaryDirectory() as temporary:
        environments = options.environments or Path(temporary)
        rows = [probe(version, torch, libraries.resolve(), environments.resolve()) for version, torch in MATRIX]
    failed = False
    for row in rows:
        good = row.get("numbers") is True and not row["without CPU kernel"] and not row["without CUDA kernel"]
        failed |= not good
        print("ok  " if good else "FAIL", json.dumps(row))
    sys.exit(failed)


if __name__ == "__main__":
    main()
