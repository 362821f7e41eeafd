"""What the built libmoe_ext_cuda.so holds: architectures, tensor-core instructions, no spills, no driver symbols.

Runs wherever the library was built; needs no GPU.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import moe_ext

LIBRARY = Path(moe_ext.__file__).parent / "libmoe_ext_cuda.so"
NUM_CUTLASS_KERNELS = 8  # of csrc/grouped_gemm/tensor_core_kernels.h, for each architecture
# csrc/grouped_gemm/sm90/products.h: of 2 dtypes and 3 tiles, 2 layouts plain and under 3 activations, and 2 wgrads; of 2
# dtypes, 2 layouts under the gradients of 3 activations.
NUM_PRODUCTS = 2 * 3 * (2 + 3 * 2 + 2) + 2 * 2 * 3

pytestmark = pytest.mark.skipif(not LIBRARY.exists(), reason="moe_ext was built without CUDA")


def find_tool(name: str) -> str:
    """From PATH, or the one that triton carries."""
    found = shutil.which(name)
    spec = importlib.util.find_spec("triton")
    if not found and spec and spec.origin:
        bundled = Path(spec.origin).parent / "backends/nvidia/bin" / name
        found = str(bundled) if bundled.exists() else None
    if not found:
        pytest.skip(f"{name} is neither on PATH nor in triton")
    return found


def run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@pytest.fixture(scope="module")
def code_of_kernels(tmp_path_factory) -> dict[str, dict[str, str]]:
    """Architecture -> mangled kernel name -> SASS, of the tensor-core kernels."""
    folder = tmp_path_factory.mktemp("cubins")
    subprocess.run([find_tool("cuobjdump"), "-xelf", "all", str(LIBRARY)], cwd=folder, check=True, capture_output=True)
    code: dict[str, dict[str, str]] = {"sm_80": {}, "sm_90a": {}}
    for cubin in sorted(folder.glob("*.cubin")):
        arch = "sm_90a" if "sm_90a" in cubin.name else "sm_80"
        if not any(name in cubin.read_bytes() for name in (b"cutlass", b"product_kernel")):
            continue
        for part in run(find_tool("nvdisasm"), "-c", str(cubin)).split(".section\t.text.")[1:]:
            name = part.split(",", 1)[0]
            if "cutlass" in name or "product_kernel" in name:
                code[arch][name] = part
    return code


def test_architectures():
    listed = run(find_tool("cuobjdump"), "-lelf", str(LIBRARY))
    assert "sm_80" in listed and "sm_90a" in listed
    assert "sm_80" in run(find_tool("cuobjdump"), "-lptx", str(LIBRARY))  # compute_80 PTX for later GPUs


def test_every_op_is_exported():
    if torch.version.cuda is None:
        pytest.skip("this torch has no CUDA, so the library is not loaded")
    names = [s.name for s in torch._C._jit_get_all_schemas() if s.name.startswith("moe_ext::")]
    missing = [n for n in names if not torch._C._dispatch_has_kernel_for_dispatch_key(n, "CUDA")]
    assert names and not missing


@pytest.mark.parametrize(
    "arch, maker, instruction, kernels",
    [
        ("sm_90a", "product_kernel", "HGMMA", NUM_PRODUCTS),
        ("sm_90a", "cutlass", "HGMMA", NUM_CUTLASS_KERNELS),
        ("sm_80", "cutlass", "HMMA", NUM_CUTLASS_KERNELS),
    ],
)
def test_tensor_cores_and_no_spills(arch, maker, instruction, kernels, code_of_kernels):
    code = {name: sass for name, sass in code_of_kernels[arch].items() if maker in name}
    assert len(code) == kernels
    for name, sass in code.items():
        assert re.search(rf"\b{instruction}\b", sass), f"{name}: no {instruction}"
        assert not re.search(r"\b(LDL|STL)\b", sass), f"{name} spills to local memory"


def test_products_keep_the_tensor_cores_busy(code_of_kernels):
    """Four wgmmas between a fence and the wait, nothing that synchronises among them, so ptxas serialised none; loads by
    TMA and cp.async."""
    for name, sass in code_of_kernels["sm_90a"].items():
        if "product_kernel" not in name:
            continue
        order = re.findall(r"\b(HGMMA|WARPGROUP\.ARRIVE|WARPGROUP\.DEPBAR|BAR\.SYNC|SYNCS)", sass)
        start = order.index("WARPGROUP.ARRIVE")
        assert order[start + 1 : start + 6] == ["HGMMA"] * 4 + ["WARPGROUP.DEPBAR"], f"{name}: {order}"
        assert order.count("HGMMA") == 4, f"{name}: the main loop was unrolled or repeated"
        assert "UTMALDG" in sass and "LDGSTS" in sass, name


def test_no_driver_symbols():
    """libcuda is found at run time: the library loads on a machine without a driver."""
    if not shutil.which("nm"):
        pytest.skip("nm is not installed")
    undefined = re.findall(r" U (cu[A-Z]\w*)", run("nm", "-D", "--undefined-only", str(LIBRARY)))
    assert not undefined


def test_library_is_small():
    assert LIBRARY.stat().st_size < 50 * 2**20
