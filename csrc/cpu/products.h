// Products of a few rows with a weight's rows, compiled once for every instruction set (see setup.py) and chosen when
// first used. What products.cpp includes is always inlined, so no two of its objects share a symbol.
#pragma once

#include "../core/ops.h"

namespace beagle::cpu {

// Floats that a row of x is padded to, with zeros; a multiple of every instruction set's vector.
constexpr int64_t kPad = 16;
constexpr int64_t padded(int64_t width) { return (width + kPad - 1) / kPad * kPad; }

// Floats between rows of x: an odd number of cache lines, so that rows do not compete for the same places of the cache.
constexpr int64_t row_stride(int64_t width) { return padded(width) / kPad % 2 ? padded(width) : padded(width) + kPad; }

// Most weight rows that are multiplied together.
constexpr int64_t kPanel = 16;

struct Products {
  // out[m, n] for all m and first <= n < last; x is [op.rows, padded(op.width)], row_stride(op.width)
  // apart, and spare holds kPanel padded rows.
  void (*multiply[3])(const SkinnyLinear& op, const float* x, int64_t first, int64_t last, float* spare);
};

const Products& products();

// Of what is compiled several times, the one that serves on this machine.
const char* instruction_set();

}  // namespace beagle::cpu
