// Activations over blocks of accumulated sums on the CPU: what a tile of an expert's product goes through while it is
// hot. Blocks hold floats, or doubles for float64; the GEMM kernels round them to 16 bits and widen them.
#pragma once

#include "activation.h"

namespace moe_ext::cpu {

// output [rows][cols] = activation. Column c of gate and up lies at [c * step], step 2 where they are interleaved;
// a plain activation has no up. Strides count elements.
using ActivateBlock = void (*)(const void* gate, const void* up, int64_t stride, void* output, int64_t output_stride,
                               int64_t rows, int64_t cols, const ActivationSpec& spec);

// For a row with router weight s, and dA' in `gradient`:
//   gate, up := s * dA' * derivative       gradient := s * activation       dots[row * dots_stride] = <dA', activation>
// A row that is not held becomes zeros. `weights` have the blocks' type.
using DifferentiateBlock = void (*)(void* gate, void* up, int64_t stride, void* gradient, int64_t gradient_stride,
                                    int64_t rows, int64_t cols, const void* weights, const bool* held, double* dots,
                                    int64_t dots_stride, const ActivationSpec& spec);

struct ActivationBlocks {
  ActivateBlock activate;
  DifferentiateBlock differentiate;
};

ActivationBlocks activation_blocks(const ActivationSpec& spec, bool is_double);

// sums [rows][cols] += values [cols], all of them floats or doubles.
void add_to_rows(void* sums, int64_t stride, int64_t rows, int64_t cols, const void* values, bool is_double);

}  // namespace moe_ext::cpu
