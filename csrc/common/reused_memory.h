// Weight gradients on the CPU, in memory that is used again. A training step makes and drops gradients of the same size
// every time. From malloc each comes as fresh pages, which the kernel clears first: 1.6 GB of gradients cost 0.25 s of
// system time on the machine where this was measured, and several times that while memory is fragmented, beside 1.0 s
// for the whole step.
//
// A gradient that is freed leaves its pages to the next one of its size. Until then they are marked MADV_FREE: the
// kernel takes them back as soon as memory is short. A size that is new gives all that is left over back at once, so
// what is kept was in use at the same time.
#pragma once

#include "checks.h"

namespace moe_ext::cpu {

// torch::stable::new_empty, from reused memory where it is large.
Tensor new_empty_reused(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType dtype);

}  // namespace moe_ext::cpu
