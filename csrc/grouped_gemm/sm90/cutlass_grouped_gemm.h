// The sm_90a grouped GEMM by CUTLASS 3.x, persistent, warp-specialised, TMA loads and stores, one problem per expert:
// what product_kernel.h is measured against. It updates tensor maps whenever the group changes.
//
// One kernel template serves both products, as D = A * B of row-major D [rows, columns]:
//   forward  ENK: A = input [M_e, K] row-major,              B = weight[e] seen as [K, N] column-major
//   forward  EKN: A = input,                                 B = weight[e] [K, N] row-major
//   wgrad    ENK: A = grad_output_e^T [N, M_e] column-major, B = input_e [M_e, K] row-major; EKN: operands swapped
// Traffic: A and B tiles through TMA multicast inside a cluster, D by TMA store; bound: tensor cores for large groups,
// weight reads for small ones.
#pragma once

#include <cute/tensor.hpp>
#include <cutlass/cutlass.h>
#include <cutlass/epilogue/collective/collective_builder.hpp>
#include <cutlass/epilogue/dispatch_policy.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/gemm/device/gemm_universal_adapter.h>
#include <cutlass/gemm/dispatch_policy.hpp>
#include <cutlass/gemm/group_array_problem_shape.hpp>
#include <cutlass/gemm/kernel/gemm_universal.hpp>

#include "../tensor_core_kernels.h"

namespace moe_ext::sm90_cutlass {

using RowMajor = cutlass::layout::RowMajor;
using ColumnMajor = cutlass::layout::ColumnMajor;

// Two consumer warpgroups share one 128x256 tile: the highest rate where groups have many rows.
struct Tile {
  using TileShape = cute::Shape<cute::_128, cute::_256, cute::_64>;
  using ClusterShape = cute::Shape<cute::_2, cute::_1, cute::_1>;
  using MainloopSchedule = cutlass::gemm::KernelPtrArrayTmaWarpSpecializedCooperative;
  using EpilogueSchedule = cutlass::epilogue::PtrArrayTmaWarpSpecializedCooperative;
};

template <typename Element, typename LayoutA, typename LayoutB, typename ElementD>
struct GroupedKernel {
  using ProblemShape = cutlass::gemm::GroupProblemShape<cute::Shape<int, int, int>>;
  static constexpr int kAlignment = 16 / sizeof(Element);
  static constexpr int kAlignmentD = 16 / sizeof(ElementD);
  // No source: C is void, beta is never read.
  using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, typename Tile::TileShape, typename Tile::ClusterShape,
      cutlass::epilogue::collective::EpilogueTileAuto, float, float, void, RowMajor*, kAlignmentD, ElementD, RowMajor*,
      kAlignmentD, typename Tile::EpilogueSchedule,
      cutlass::epilogue::fusion::LinearCombination<ElementD, float, void, float>>::CollectiveOp;
  using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Element, LayoutA*, kAlignment, Element, LayoutB*, kAlignment,
      float, typename Tile::TileShape, typename Tile::ClusterShape,
      cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(sizeof(typename Epilogue::SharedStorage))>,
      typename Tile::MainloopSchedule>::CollectiveOp;
  using Gemm = cutlass::gemm::device::GemmUniversalAdapter<
      cutlass::gemm::kernel::GemmUniversal<ProblemShape, Mainloop, Epilogue>>;
};

// A stride of a row-major (or column-major) matrix has one run-time number, its leading dimension.
template <typename Stride>
Stride leading_stride(int64_t leading) {
  Stride stride{};
  if constexpr (cute::is_static<typename cute::tuple_element<0, Stride>::type>::value) {
    cute::get<1>(stride) = leading;
  } else {
    cute::get<0>(stride) = leading;
  }
  return stride;
}

template <typename Element, typename LayoutA, typename LayoutB, typename ElementD>
const char* launch(const TensorCoreProblem& problem) {
  using Kernel = GroupedKernel<Element, LayoutA, LayoutB, ElementD>;
  using Gemm = typename Kernel::Gemm;
  using StrideA = typename Gemm::GemmKernel::InternalStrideA;
  using StrideB = typename Gemm::GemmKernel::InternalStrideB;
  using StrideD = typename Gemm::GemmKernel::InternalStrideD;
  static_assert(
      sizeof(StrideA) == sizeof(int64_t) && sizeof(StrideB) == sizeof(int64_t) && sizeof(StrideD) == sizeof(int64_t),
      "problem_arrays writes strides as their one run-time number");
  static_assert(sizeof(cute::Shape<int, int, int>) == sizeof(ProblemSize));

  const ProblemArrays arrays = place_problem_arrays(problem.workspace, problem.groups);
  typename Gemm::Arguments arguments{};
  arguments.mode = cutlass::gemm::GemmUniversalMode::kGrouped;
  arguments.problem_shape = {static_cast<int>(problem.groups),
                             reinterpret_cast<cute::Shape<int, int, int>*>(arrays.sizes), nullptr};
  arguments.mainloop = {reinterpret_cast<const Element**>(arrays.a), reinterpret_cast<StrideA*>(arrays.lda),
                        reinterpret_cast<const Element**>(arrays.b), reinterpret_cast<StrideB*>(arrays.ldb)};
  arguments.epilogue.thread.alpha = 1.f;
  arguments.epilogue.thread.beta = 0.f;
  arguments.epilogue.ptr_C = nullptr;
  arguments.epilogue.dC = nullptr;
  arguments.epilogue.ptr_D = reinterpret_cast<ElementD**>(arrays.d);
  arguments.epilogue.dD = reinterpret_cast<StrideD*>(arrays.ldd);
  arguments.hw_info.device_id = problem.device;
  arguments.hw_info.sm_count = problem.multiprocessors;

  if (Gemm::get_workspace_size(arguments) > kCutlassWorkspaceBytes) return "sm90 grouped GEMM: workspace too small";
  Gemm gemm;
  if (gemm.can_implement(arguments) != cutlass::Status::kSuccess) return "sm90 grouped GEMM: shape not implementable";
  if (gemm.initialize(arguments, arrays.kernel_workspace, problem.stream) != cutlass::Status::kSuccess) {
    return "sm90 grouped GEMM: initialisation failed";
  }
  const cutlass::Status status = gemm.run(problem.stream);
  return status == cutlass::Status::kSuccess ? nullptr : cutlass::cutlassGetStatusString(status);
}

}  // namespace moe_ext::sm90_cutlass
