// A few rows times a weight of any kind as a linear layer stores it: the weight is read once, where it lies.
#pragma once

#include "products.h"

namespace beagle::cpu {

// x and out [rows, weight.outputs] of `dtype`, x's rows x_stride elements apart, out contiguous; a weight of `kind`.
struct Linear {
  const void* x;
  void* out;
  int32_t dtype;
  int64_t rows, x_stride;
  int kind;
  Weight weight;
};

void linear(const Linear& op, int threads);

}  // namespace beagle::cpu
