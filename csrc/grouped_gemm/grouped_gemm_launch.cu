// Picks the kernel of a grouped product: sm90/ or sm80/ tensor cores where shapes allow, else simt/. Also the bias
// gradient: one block per (expert, 32 vectors of columns), its warps stride over the rows with 16-byte loads, partial
// sums meet in shared memory in warp order: deterministic; M*N elements read.
#include "../common/cuda_launch.h"
#include "grouped_gemm_kernels.h"
#include "kernel_choice.h"
#include "sm90/products.h"
#include "simt/grouped_gemm_simt.h"
#include "tensor_core_kernels.h"
#include "tile_scheduler.h"
#include "zero_rows.h"

namespace moe_ext {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;

using CutlassKernel = const char* (*)(const TensorCoreProblem&);

// The CUTLASS kernel for this device, or nullptr if none was compiled for it.
CutlassKernel pick(const DeviceProperties& device, CutlassKernel sm90, CutlassKernel sm80) {
  return device.capability == 90 && sm90 ? sm90 : device.capability >= 80 ? sm80 : nullptr;
}

#if defined(MOE_EXT_HAS_SM90) && !defined(MOE_EXT_EMULATED)
#define MOE_SM90(name) sm90_cutlass::name
#else
#define MOE_SM90(name) nullptr
#endif
#ifdef MOE_EXT_HAS_SM80
#define MOE_SM80(name) sm80::name
#else
#define MOE_SM80(name) nullptr
#endif
#define MOE_PICK(name) pick(device, MOE_SM90(name), MOE_SM80(name))

CutlassKernel pick_forward(const DeviceProperties& device, WeightLayout layout, GemmDtype dtype) {
  if (layout == WeightLayout::kENK) {
    return dtype == GemmDtype::kBFloat16 ? MOE_PICK(forward_enk_bf16) : MOE_PICK(forward_enk_fp16);
  }
  return dtype == GemmDtype::kBFloat16 ? MOE_PICK(forward_ekn_bf16) : MOE_PICK(forward_ekn_fp16);
}

CutlassKernel pick_wgrad(const DeviceProperties& device, GemmDtype dtype, bool float32_output) {
  if (float32_output) return dtype == GemmDtype::kBFloat16 ? MOE_PICK(wgrad_bf16_fp32) : MOE_PICK(wgrad_fp16_fp32);
  return dtype == GemmDtype::kBFloat16 ? MOE_PICK(wgrad_bf16) : MOE_PICK(wgrad_fp16);
}

template <typename T, typename Out, int width>
__global__ void __launch_bounds__(kThreads)
    bias_grad_kernel(const T* __restrict__ grad_output, Out* __restrict__ grad_bias,
                     const int32_t* __restrict__ expert_offsets, int64_t num_experts, int64_t max_rows, int64_t n) {
  using Packed = Vector<T, width>;
  __shared__ float partial[kWarps][kWarpSize * width];
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const auto* source = reinterpret_cast<const Packed*>(grad_output);
  const int64_t row_vectors = n / width, segments = ceil_div(row_vectors, kWarpSize);
  for (int64_t item = blockIdx.x; item < num_experts * segments; item += gridDim.x) {
    const int64_t expert = item / segments, vector = item % segments * kWarpSize + lane;
    const RowRange range = rows_of_expert(expert_offsets, expert, max_rows);
    float sums[width] = {};
    if (vector < row_vectors) {
#pragma unroll 4
      for (int64_t row = range.begin + warp; row < range.end; row += kWarps) {
        const Packed values = source[row * row_vectors + vector];
#pragma unroll
        for (int i = 0; i < width; ++i) sums[i] += static_cast<float>(values.values[i]);
      }
    }
#pragma unroll
    for (int i = 0; i < width; ++i) partial[warp][lane * width + i] = sums[i];
    __syncthreads();
    const int64_t first_column = item % segments * kWarpSize * width;
    for (int c = threadIdx.x; c < kWarpSize * width && first_column + c < n; c += kThreads) {
      float sum = 0.f;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) sum += partial[w][c];
      grad_bias[expert * n + first_column + c] = static_cast<Out>(sum);
    }
    __syncthreads();
  }
}

template <typename T, typename Out>
void bias_grad(const GroupedBiasGradArgs& args) {
  const bool vectorized = rows_are_vectorizable<T>(args.n, {args.grad_output});
  const int width = vectorized ? full_width<T>() : 1;
  const int64_t items = args.num_experts * ceil_div(args.n / width, kWarpSize);
  const auto kernel = vectorized ? bias_grad_kernel<T, Out, full_width<T>()> : bias_grad_kernel<T, Out, 1>;
  launch_kernel(kernel, static_cast<unsigned>(std::min(items, kMaxBlocks)), kThreads, 0, args.stream,
                static_cast<const T*>(args.grad_output), static_cast<Out*>(args.grad_bias), args.expert_offsets,
                args.num_experts, args.max_rows, args.n);
}

}  // namespace

size_t grouped_gemm_workspace_bytes(int64_t num_experts, int device) {
  return problem_array_bytes(num_experts) + kCutlassWorkspaceBytes;
}

const char* launch_grouped_gemm(const GroupedGemmArgs& args) {
  if (args.max_rows == 0 || args.n == 0) return nullptr;
  const DeviceProperties device = read_device(args.device);
  const bool fits = args.k > 0 && fits_tensor_cores(args.dtype, args.n, args.k, {args.input, args.weight, args.output});
#ifdef MOE_EXT_HAS_SM90
  const int tile = pick_sm90_tile(device, args.num_experts, ceil_div(args.max_rows, args.num_experts), args.n);
  if (fits && tile >= 0) {
    return sm90::products_of(tile, args.dtype).store[static_cast<int>(args.layout)]({args}, device.multiprocessors);
  }
#endif
  zero_rows_of_no_expert(args, device.multiprocessors);
  const CutlassKernel kernel = fits ? pick_forward(device, args.layout, args.dtype) : nullptr;
  if (!kernel) {
    simt::grouped_gemm(args, device.multiprocessors);
    return nullptr;
  }
  const Product product = args.layout == WeightLayout::kENK ? Product::kForwardENK : Product::kForwardEKN;
  const int bytes = element_bytes(args.dtype);
  fill_problem_arrays(place_problem_arrays(args.workspace, args.num_experts), product, args.input, args.weight,
                      args.output, bytes, bytes, args.expert_offsets, nullptr, args.num_experts, args.max_rows, args.n,
                      args.k, args.stream);
  return kernel({args.workspace, args.num_experts, args.device, device.multiprocessors, args.stream});
}

const char* launch_grouped_gemm_wgrad(const GroupedWgradArgs& args) {
  if (args.n == 0 || args.k == 0) return nullptr;
  const DeviceProperties device = read_device(args.device);
  const bool nk = args.layout == WeightLayout::kENK;
  const int64_t rows = nk ? args.n : args.k, columns = nk ? args.k : args.n;
  const bool fits = args.max_rows > 0 &&
                    fits_tensor_cores(args.dtype, args.n, args.k, {args.input, args.grad_output, args.grad_weight});
#ifdef MOE_EXT_HAS_SM90
  const int tile = pick_sm90_tile(device, args.num_experts, rows, columns);
  if (fits && tile >= 0) {
    const sm90::Products& products = sm90::products_of(tile, args.dtype);
    return (args.float32_output ? products.wgrad_fp32 : products.wgrad)(args, {}, device.multiprocessors);
  }
#endif
  const CutlassKernel kernel = fits ? pick_wgrad(device, args.dtype, args.float32_output) : nullptr;
  if (!kernel) {
    simt::grouped_gemm_wgrad(args, device.multiprocessors);
    return nullptr;
  }
  zero_empty_experts(args);
  fill_problem_arrays(place_problem_arrays(args.workspace, args.num_experts), Product::kWgrad,
                      nk ? args.grad_output : args.input, nk ? args.input : args.grad_output, args.grad_weight,
                      element_bytes(args.dtype), args.float32_output ? 4 : 2, args.expert_offsets,
                      args.trainable_experts, args.num_experts, args.max_rows, rows, columns, args.stream);
  return kernel({args.workspace, args.num_experts, args.device, device.multiprocessors, args.stream});
}

const char* launch_grouped_bias_grad(const GroupedBiasGradArgs& args) {
  if (args.n == 0) return nullptr;
  switch (args.dtype) {
    case GemmDtype::kFloat32: bias_grad<float, float>(args); break;
    case GemmDtype::kBFloat16:
      args.float32_output ? bias_grad<BFloat16, float>(args) : bias_grad<BFloat16, BFloat16>(args);
      break;
    case GemmDtype::kFloat16: args.float32_output ? bias_grad<Half, float>(args) : bias_grad<Half, Half>(args); break;
  }
  return nullptr;
}

}  // namespace moe_ext
