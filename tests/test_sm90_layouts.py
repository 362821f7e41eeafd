"""csrc/grouped_gemm/sm90/operand_layout.h against CuTe: swizzles, wgmma descriptors, accumulator fragments.

Compiled for the CPU with the headers of the PyPI package nvidia-cutlass and those of the CUDA toolkit; no GPU.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from host_library import find_compiler

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = r"""
#include <cstdio>
#include <cstdlib>
#include <cute/tensor.hpp>
#include <cute/atom/mma_traits_sm90_gmma.hpp>
#include "grouped_gemm/sm90/operand_layout.h"

using namespace cute;
namespace ours = moe_ext::sm90;
using Element = cutlass::bfloat16_t;

void expect(bool ok, const char* what, long a = 0, long b = 0) {
  if (!ok) std::printf("%s differs at %ld, %ld\n", what, a, b), std::exit(1);
}

// Where our buffers hold element (row, depth) of an operand, in bytes.
int our_byte(ours::Major major, int row, int depth) {
  return major == ours::Major::kK ? ours::swizzled(row, depth * 2)
                                  : row / 64 * ours::kBlockBytes + ours::swizzled(depth, row % 64 * 2);
}

template <SM90::GMMA::Major major, int rows>
void check_operand() {
  constexpr auto our_major = static_cast<ours::Major>(major);
  // MN-major blocks of 64 rows lie one after the other, each with the whole depth: depth varies first.
  using Order = std::conditional_t<major == SM90::GMMA::Major::K, Step<_1, _2>, Step<_2, _1>>;
  const auto layout =
      tile_to_shape(SM90::GMMA::Layout_SW128_Atom<Element, major>{}, Shape<Int<rows>, Int<ours::kBlockDepth>>{}, Order{});
  alignas(1024) static Element memory[rows * ours::kBlockDepth];
  const auto tensor = make_tensor(make_smem_ptr(memory), layout);
  for (int row = 0; row < rows; ++row) {
    for (int depth = 0; depth < ours::kBlockDepth; ++depth) {
      const long theirs = reinterpret_cast<char*>(&tensor(row, depth)) - reinterpret_cast<char*>(memory);
      expect(theirs == our_byte(our_major, row, depth), "operand byte", row, depth);
    }
  }
  // The descriptor of each wgmma step, but for the start address, which has no meaning on the CPU...
  const auto steps = flat_divide(tensor, Shape<Int<rows>, Int<ours::kInstructionDepth>>{});
  const auto descriptor = SM90::GMMA::make_gmma_desc<major>(steps(_, _, 0, 0));
  constexpr uint64_t kAddress = 0x3fff;
  expect((descriptor.desc_ & ~kAddress) == (ours::make_descriptor(0, our_major) & ~kAddress), "descriptor",
         long(descriptor.desc_), long(ours::make_descriptor(0, our_major)));
  // ... which advances by what lies between the steps, before the swizzle.
  for (int k = 0; k < ours::kBlockDepth / ours::kInstructionDepth; ++k) {
    const auto plain = layout.layout_b();
    const int offset = (plain(0, k * ours::kInstructionDepth) - plain(0, 0)) * 2;
    expect(offset == k * ours::step_bytes(our_major), "step", k, offset);
  }
}

template <class Traits, int columns>
void check_fragment() {
  const auto layout = typename Traits::CLayout{};  // (thread, index) -> row + 64 * column
  for (int thread = 0; thread < 128; ++thread) {
    for (int index = 0; index < columns / 2; ++index) {
      const auto position = ours::fragment_position(thread, index);
      expect(layout(thread, index) == position.row + 64 * position.column, "fragment", thread, index);
    }
  }
}

int main() {
  check_operand<SM90::GMMA::Major::K, 64>();
  check_operand<SM90::GMMA::Major::K, 256>();
  check_operand<SM90::GMMA::Major::MN, 128>();
  check_operand<SM90::GMMA::Major::MN, 256>();
  using namespace SM90::GMMA;
  check_fragment<MMA_Traits<MMA_64x256x16_F32BF16BF16_SS<Major::K, Major::K>>, 256>();
  check_fragment<MMA_Traits<MMA_64x128x16_F32F16F16_SS<Major::K, Major::MN>>, 128>();
  std::printf("equal\n");
}
"""


def include_directories() -> list[Path]:
    spec = importlib.util.find_spec("cutlass_library")
    if not spec or not spec.origin:
        pytest.skip("the package nvidia-cutlass is not installed")
    nvcc = shutil.which("nvcc")
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda", nvcc and str(Path(nvcc).resolve().parent.parent)]
    cuda = [Path(home) / "include" for home in homes if home and (Path(home) / "include/cuda_fp16.h").exists()]
    if not cuda:
        pytest.skip("no headers of a CUDA toolkit")
    # CUDA 13 keeps libcu++ in a folder of its own.
    return [ROOT / "csrc", Path(spec.origin).parent / "source/include", cuda[0], cuda[0] / "cccl"]


def test_layouts_and_descriptors_are_those_of_cute(tmp_path):
    compiler = find_compiler()
    (tmp_path / "layouts.cpp").write_text(PROGRAM)
    includes = [f"-I{path}" for path in include_directories()]
    command = [compiler, "-std=c++20", "-O0", "-w", *includes, "layouts.cpp", "-o", "layouts"]
    built = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr[-3000:]
    run = subprocess.run([str(tmp_path / "layouts")], capture_output=True, text=True)
    assert run.returncode == 0 and run.stdout.endswith("equal\n"), run.stdout
