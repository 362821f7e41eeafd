"""What the built libmoe_ext_cuda.so holds: architectures, tensor-core instructions, no spills, no driver symbols.

Runs wherever the library was built; needs no GPU.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import moe_ext
from sass import parse

LIBRARY = Path(moe_ext.__file__).parent / "libmoe_ext_cuda.so"
NUM_CUTLASS_KERNELS = 8  # of csrc/grouped_gemm/tensor_core_kernels.h, for each architecture
# csrc/grouped_gemm/sm90/products.h: of 2 dtypes and 4 tiles, 2 layouts plain and under 3 activations, and 2 wgrads; of 2
# dtypes, 2 layouts under the gradients of 3 activations.
NUM_PRODUCTS = 2 * 4 * (2 + 3 * 2 + 2) + 2 * 2 * 3
# Kernels that move whole rows, in the form for aligned rows -> 16-byte loads that a lane has under way before it uses
# the first: kVectorsPerLane, kRowsAtOnce, or for activations the least of plain and gated rows.
ROW_KERNELS = {
    "permute_kernel": 4,
    "unpermute_kernel": 4,
    "unpermute_backward_kernel": 4,
    "activation_kernel": 2,
    "activation_backward_kernel": 3,
}
WIDTHS = ("Li8E", "Li4E")  # of 16-byte vectors of 16-bit and 32-bit elements, in mangled names

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


def disassembled(folder: Path, *marks: str) -> Iterator[tuple[str, str, str]]:
    """Architecture, mangled name and SASS of the library's kernels whose names hold a mark. Cubins go to `folder`."""
    subprocess.run([find_tool("cuobjdump"), "-xelf", "all", str(LIBRARY)], cwd=folder, check=True, capture_output=True)
    for cubin in sorted(folder.glob("*.cubin")):
        if not any(mark.encode() in cubin.read_bytes() for mark in marks):
            continue
        arch = "sm_90a" if "sm_90a" in cubin.name else "sm_80"
        for part in run(find_tool("nvdisasm"), "-c", str(cubin)).split(".section\t.text.")[1:]:
            name = part.split(",", 1)[0]
            if any(mark in name for mark in marks):
                yield arch, name, part


@pytest.fixture(scope="module")
def code_of_kernels(tmp_path_factory) -> dict[str, dict[str, str]]:
    """Architecture -> mangled kernel name -> SASS, of the tensor-core kernels."""
    code: dict[str, dict[str, str]] = {"sm_80": {}, "sm_90a": {}}
    for arch, name, sass in disassembled(tmp_path_factory.mktemp("cubins"), "cutlass", "product_kernel"):
        code[arch][name] = sass
    return code


@pytest.fixture(scope="module")
def resources() -> dict[str, dict[str, int]]:
    """Kernel of the whole library, with its architecture -> bytes of stack and local memory, and registers."""
    listed = run(find_tool("cuobjdump"), "--dump-resource-usage", str(LIBRARY))
    arch, found = "", {}
    for line in listed.splitlines():
        if match := re.search(r"arch = (\S+)", line):
            arch = match.group(1)
        elif match := re.search(r"Function (\S+):", line):
            name = f"{arch} {match.group(1)}"
        elif "REG:" in line:
            found[name] = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", line)}
    return found


@pytest.fixture(scope="module")
def row_kernels(tmp_path_factory) -> dict[str, str]:
    """Mangled name, with its architecture -> SASS of the vectorised instantiations of ROW_KERNELS."""
    marks = [f"{len(kernel)}{kernel}I" for kernel in ROW_KERNELS]
    found = disassembled(tmp_path_factory.mktemp("row_cubins"), *marks)
    return {f"{arch} {name}": sass for arch, name, sass in found if any(width in name for width in WIDTHS)}


def kernel_of(name: str) -> str | None:
    return next((kernel for kernel in ROW_KERNELS if f"{len(kernel)}{kernel}I" in name), None)


def loads_under_way(sass: str) -> int:
    """The most 16-byte loads between two instructions that wait for data of an earlier one: arithmetic or a store."""
    most = here = 0
    for line in sass.splitlines():
        if re.search(r"\bLDG\.E\S*\.128", line):
            here += 1
            most = max(most, here)
        elif re.search(r"\b(FFMA|FMUL|FADD|HADD2|MUFU|STG)\b", line):
            here = 0
    return most


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
        assert "UTMALDG" in sass and "LDGSTS" in sass and "ARRIVES.LDGSTSBAR" in sass, name
        assert ("STSM" in sass) == ("EfLNS0" not in name), f"{name}: 16-bit results leave by stmatrix"
        in_clusters = "ELi4ELi2ELNS0_6Finish" in name  # stages, cluster
        assert (".MULTICAST" in sass, sass.count("UCGABAR_WAIT")) == (in_clusters, 2 * in_clusters), name
        # Fences of the whole GPU only where the cluster meets, never in the loop.
        assert sass.count("MEMBAR.ALL.GPU") == 2 * in_clusters, name


def test_products_keep_to_the_registers_of_their_role(code_of_kernels, resources):
    """A warp that names a register past its setmaxnreg, or runs the other role's code, faults on the hardware only."""
    for name, text in code_of_kernels["sm_90a"].items():
        if "product_kernel" not in name:
            continue
        kernel = parse(text)
        roles = {}
        for at, instruction in enumerate(kernel.instructions):
            if match := re.match(r"USETMAXREG\.(\w+)\.CTAPOOL .*?(0x[0-9a-f]+)$", instruction):
                assert match[1] not in roles, name
                roles[match[1]] = int(match[2], 16), kernel.after(at)
        assert {role: registers for role, (registers, _) in roles.items()} == {"TRY_ALLOC": 224, "DEALLOC": 56}, name
        for registers, code in roles.values():
            assert kernel.highest_register(code) < registers, name
        math, producer = roles["TRY_ALLOC"][1], roles["DEALLOC"][1]
        # The blocks of a cluster part at a barrier, of both roles.
        shared = [kernel.instructions[at] for at in sorted(math & producer)]
        assert not shared or any("UCGABAR_WAIT" in instruction for instruction in shared), f"{name}: roles share code"
        touching = re.compile(r"\b(HGMMA|UTMA\w+|SYNCS\S*|LD[GS]\w*|ST[GS]\S*)\s+(?!RZ)")
        assert not any(touching.search(instruction) for instruction in shared), f"{name}: roles share code"
        assert any("HGMMA" in kernel.instructions[at] for at in math), name
        assert any("UTMALDG" in kernel.instructions[at] for at in producer), name
        assert resources[f"sm_90a {name}"]["REG"] == 168, f"{name}: not what setmaxnreg starts from"


def test_products_ask_for_gathered_rows_at_once(code_of_kernels):
    """At least a stage's four slots of a thread in one run of code, and a token from a slot without a division."""
    for name, text in code_of_kernels["sm_90a"].items():
        if "product_kernel" not in name:
            continue
        kernel = parse(text)
        start = next(at for at, line in enumerate(kernel.instructions) if "USETMAXREG.DEALLOC" in line)
        producer = "\n".join(kernel.instructions[at] for at in sorted(kernel.after(start)))
        runs = re.split(r"\b(?:BRA|SYNCS|LDGSTS)\b", producer)
        assert max(len(re.findall(r"\bLDG\b", run)) for run in runs) >= 4, name
        assert not re.search(r"\bI2F\.RP\b", producer), f"{name}: a signed division"


def test_no_kernel_uses_local_memory(resources):
    """Neither spills nor arrays that a run-time index moved out of registers, anywhere in the library."""
    assert len(resources) > 100
    spilling = {name: use for name, use in resources.items() if use["STACK"] or use["LOCAL"]}
    assert not spilling


def test_rows_move_in_16_byte_accesses(row_kernels):
    """fp32, bf16 and fp16; activations in three row layouts. A second width of store is the weight gradient's alone."""
    found = {kernel: 0 for kernel in ROW_KERNELS}
    for name, sass in row_kernels.items():
        kernel = kernel_of(name)
        assert kernel
        found[kernel] += 1
        stores = set(re.findall(r"\bSTG\.\S+", sass))
        wide = {store for store in stores if store.endswith(".128")}
        narrow = {"STG.E"} if kernel == "unpermute_backward_kernel" else set()
        assert wide and stores - wide == narrow, f"{name}: {stores}"
        assert not re.search(r"\b(LDL|STL)\b", sass), name
        assert loads_under_way(sass) >= ROW_KERNELS[kernel], f"{name}: {loads_under_way(sass)}"
    per_arch = {"permute_kernel": 3, "unpermute_kernel": 3, "unpermute_backward_kernel": 3, "activation_kernel": 9,
                "activation_backward_kernel": 9}  # fmt: skip
    assert found == {kernel: 2 * count for kernel, count in per_arch.items()}


def test_received_rows_leave_in_whole_vectors(tmp_path):
    """Four pieces of a segment, as they came or dequantised: the compiler takes no vector apart into its elements."""
    found = 0
    for arch, name, sass in disassembled(tmp_path, "unpack_rows_kernel"):
        if (kind := re.search(r"unpack_rows_kernelI(.*)Lb([01])ELi[48]E", name)) is None:
            continue
        found += 1
        width = 64 if kind[1] != "f" and kind[2] == "1" else 128
        stores = re.findall(r"\bSTG\.\S+", sass)
        assert stores.count(f"STG.E.{width}") == 4, f"{arch} {name}: {stores}"
        assert not any("U16" in store for store in stores), f"{arch} {name}: {stores}"
    assert found == 2 * 3 * 2  # architectures, dtypes, as they are or e4m3


def test_no_driver_symbols():
    """libcuda is found at run time: the library loads on a machine without a driver."""
    if not shutil.which("nm"):
        pytest.skip("nm is not installed")
    undefined = re.findall(r" U (cu[A-Z]\w*)", run("nm", "-D", "--undefined-only", str(LIBRARY)))
    assert not undefined


def test_library_is_small():
    assert LIBRARY.stat().st_size < 50 * 2**20
