"""The CUDA kernels, compiled for the CPU by tests/emulation, through the tests of their family and on misaligned tensors.

Covers every .cu file and the sm_90a products. What CUTLASS makes is not run: on sm_80 plain loops stand in for it, over
the same problem arrays. What it cannot show: races between blocks, anything about speed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# Family -> every how many of its tests run; co-prime to the numbers of parameters, so that all values occur.
FAMILIES = {
    "gating": 1, "gating_knobs": 1, "router_losses": 1, "plan": 1, "permutation": 1, "grouped_gemm": 7, "small_rows": 1,
    "experts": 7, "lora": 1, "all_to_all": 1, "misaligned": 1,
}  # fmt: skip


@pytest.fixture(scope="session")
def emulated_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """libmoe_ext_emulated.so, built into build/emulation of the checkout."""
    if not shutil.which("cmake") or not shutil.which("ninja"):
        pytest.skip("cmake and ninja are needed to build the emulated kernels")
    build = ROOT / "build" / f"emulation-{sys.implementation.cache_tag}"
    library = build / "lib" / "libmoe_ext_emulated.so"
    configure = [
        "cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja", f"-DMOE_EXT_PYTHON={sys.executable}",
        "-DMOE_EXT_EMULATION=ON", f"-DMOE_EXT_OUTPUT_DIR={library.parent}",
    ]  # fmt: skip
    subprocess.run(configure, check=True, capture_output=True)
    built = subprocess.run(
        ["cmake", "--build", str(build), "--target", "moe_ext_emulated"], capture_output=True, text=True
    )
    assert built.returncode == 0, built.stdout[-3000:]
    return library


def run_tests(library: Path, *arguments: str, **environment: str) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", *arguments],
        env={
            **os.environ,
            "MOE_EXT_LIBRARY": str(library),
            "OMP_NUM_THREADS": "1",  # threads of one process would only wait for each other
            **environment,
        },
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-2000:]
    print(run.stdout.splitlines()[-1])


@pytest.mark.parametrize("family", FAMILIES)
def test_family(family, emulated_library):
    run_tests(
        emulated_library, "-m", "not cpu", str(ROOT / f"tests/test_{family}.py"), MOE_EXT_SAMPLE=str(FAMILIES[family])
    )


@pytest.mark.parametrize("capability, tile", [("80", "128x128"), ("90", "128x128"), ("90", "128x256x2")])
@pytest.mark.parametrize("family", ["grouped_gemm", "experts", "misaligned"])
def test_family_on_tensor_cores(family, capability, tile, emulated_library):
    """The same with the sm_90a products in the place of the portable kernels; on sm_80, what chooses CUTLASS's kernels,
    fills their arrays and zeroes what they leave out."""
    run_tests(
        emulated_library, "-m", "not cpu", str(ROOT / f"tests/test_{family}.py"),
        MOE_EXT_SAMPLE="5" if tile == "128x128" else "11",  # pairs of large tiles take long
        MOE_EMULATOR_CAPABILITY=capability, MOE_EXT_SM90_TILE=tile,  # else the small-rows kernel would take them
    )  # fmt: skip


@pytest.mark.parametrize("seed, tile", list(enumerate(["128x256", "128x128", "64x256"])))
def test_sm90_tiles(seed, tile, emulated_library):
    """Every compiled tile on what only tensor cores see, threads and copies in another order each time."""
    run_tests(
        emulated_library, "-k", "tensor_cores or stay_with", str(ROOT / "tests/test_grouped_gemm.py"),
        MOE_EXT_SAMPLE="3", MOE_EMULATOR_CAPABILITY="90", MOE_EXT_SM90_TILE=tile, MOE_EMULATOR_SEED=str(seed),
    )  # fmt: skip
