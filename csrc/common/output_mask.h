// output_mask: which of a backward's gradients are computed, in the order of its results.
#pragma once

#include <vector>

#include "checks.h"

namespace moe_ext {

inline void check_output_mask(const std::vector<bool>& output_mask, size_t num_gradients) {
  MOE_CHECK(output_mask.size() == num_gradients, "output_mask: expected ", num_gradients,
            " entries, one for each gradient, got ", output_mask.size());
}

}  // namespace moe_ext
