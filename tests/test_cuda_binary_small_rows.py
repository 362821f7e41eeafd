"""The small-rows kernels in the built libmoe_ext_cuda.so: instructions and spills. Needs no GPU."""

from __future__ import annotations

import re

import pytest

from test_cuda_binary import LIBRARY, disassembled

KERNEL = "small_rows_kernel"

pytestmark = pytest.mark.skipif(not LIBRARY.exists(), reason="moe_ext was built without CUDA")


@pytest.fixture(scope="module")
def code(tmp_path_factory) -> dict[str, dict[str, str]]:
    """Architecture -> mangled kernel name -> SASS."""
    found: dict[str, dict[str, str]] = {"sm_80": {}, "sm_90a": {}}
    for arch, name, sass in disassembled(tmp_path_factory.mktemp("cubins"), KERNEL):
        found[arch][name] = sass
    return found


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_instructions(arch, code):
    """Tensor cores for 16 bits, FMA for fp32, weights past the registers, no spills."""
    assert len(code[arch]) == 3 * 2 * 2  # dtypes, layouts, warps
    for name, sass in code[arch].items():
        float32 = f"{KERNEL}If" in name
        assert float32 != bool(re.search(r"\bHMMA\b", sass)), f"{name}: HMMA in fp32, or none in 16 bits"
        assert re.search(r"\bFFMA\b", sass), f"{name}: no FFMA"
        # In one step a thread asks for 8 vectors of weights and at least one of rows, 16 bytes each.
        assert len(re.findall(r"\bLDGSTS\.E\.BYPASS\.LTC128B\.128\b", sass)) >= 9, f"{name}: narrow copies"
        # griddepcontrol.wait: such a kernel is launched before the one ahead of it has ended.
        assert (arch == "sm_90a") == bool(re.search(r"\bACQBULK\b", sass)), f"{name}: no wait for the previous kernel"
        assert not re.search(r"\b(LDL|STL)\b", sass), f"{name} spills to local memory"
