// The sm_80 grouped GEMM: CUTLASS 2.x GemmGrouped, persistent, cp.async, scheduled on the device from device sizes.
// Serves every GPU that is not sm_90, later ones through compute_80 PTX. Operands as in sm90/cutlass_grouped_gemm.h.
// Bound: tensor cores for large groups, weight reads for small ones.
#pragma once

#include <cutlass/cutlass.h>
#include <cutlass/epilogue/thread/linear_combination.h>
#include <cutlass/gemm/device/gemm_grouped.h>
#include <cutlass/gemm/kernel/default_gemm_grouped.h>
#include <cutlass/gemm/kernel/gemm_grouped.h>

#include "../tensor_core_kernels.h"

namespace moe_ext::sm80 {

using RowMajor = cutlass::layout::RowMajor;
using ColumnMajor = cutlass::layout::ColumnMajor;

constexpr int kStages = 4;

template <typename Element, typename LayoutA, typename LayoutB, typename ElementD>
const char* launch(const TensorCoreProblem& problem) {
  constexpr int kAlignment = 16 / sizeof(Element);
  using Epilogue = cutlass::epilogue::thread::LinearCombination<ElementD, 16 / sizeof(ElementD), float, float,
                                                                cutlass::epilogue::thread::ScaleType::OnlyAlphaScaling>;
  using Kernel = typename cutlass::gemm::kernel::DefaultGemmGrouped<
      Element, LayoutA, cutlass::ComplexTransform::kNone, kAlignment, Element, LayoutB,
      cutlass::ComplexTransform::kNone, kAlignment, ElementD, RowMajor, float, cutlass::arch::OpClassTensorOp,
      cutlass::arch::Sm80, cutlass::gemm::GemmShape<128, 128, 32>, cutlass::gemm::GemmShape<64, 64, 32>,
      cutlass::gemm::GemmShape<16, 8, 16>, Epilogue, cutlass::gemm::threadblock::GemmBatchedIdentityThreadblockSwizzle,
      kStages, cutlass::gemm::kernel::GroupScheduleMode::kDeviceOnly>::GemmKernel;
  using Gemm = cutlass::gemm::device::GemmGrouped<Kernel>;
  static_assert(sizeof(cutlass::gemm::GemmCoord) == sizeof(ProblemSize));

  const ProblemArrays arrays = place_problem_arrays(problem.workspace, problem.groups);
  const int active = Gemm::maximum_active_blocks();
  if (active <= 0) return "sm80 grouped GEMM: no block fits on a multiprocessor";
  typename Epilogue::Params epilogue(1.f);
  typename Gemm::Arguments arguments(
      reinterpret_cast<cutlass::gemm::GemmCoord*>(arrays.sizes), static_cast<int>(problem.groups),
      active * problem.multiprocessors, epilogue, reinterpret_cast<Element**>(const_cast<void**>(arrays.a)),
      reinterpret_cast<Element**>(const_cast<void**>(arrays.b)), reinterpret_cast<ElementD**>(arrays.d),
      reinterpret_cast<ElementD**>(arrays.d), arrays.lda, arrays.ldb, arrays.ldd, arrays.ldd);
  if (Gemm::get_workspace_size(arguments) > kCutlassWorkspaceBytes) return "sm80 grouped GEMM: workspace too small";
  Gemm gemm;
  if (gemm.initialize(arguments, arrays.kernel_workspace, problem.stream) != cutlass::Status::kSuccess) {
    return "sm80 grouped GEMM: initialisation failed";
  }
  const cutlass::Status status = gemm.run(problem.stream);
  return status == cutlass::Status::kSuccess ? nullptr : cutlass::cutlassGetStatusString(status);
}

}  // namespace moe_ext::sm80
