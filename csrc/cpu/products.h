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

// A linear layer's weight [outputs, width] where it lies, its rows `stride` elements apart.
struct Weight {
  const void* rows;
  int64_t outputs, width, stride;
};

// What is done with weights of one kind.
struct Product {
  // Bytes of rows of x as `multiply` reads them.
  int64_t (*prepared)(int64_t rows, int64_t width);
  // These, from rows in fp32, `stride` floats apart; `to` is aligned to 64 bytes.
  void (*prepare)(const float* x, int64_t stride, int64_t rows, int64_t width, void* to);
  // out[m * out_stride + n - first] for all rows m and first <= n < last; spare holds kPanel padded rows.
  void (*multiply)(const Weight& weight, const void* x, int64_t rows, int64_t first, int64_t last, float* out,
                   int64_t out_stride, float* spare);
};

struct Products {
  Product of[3];  // by dtype
};

const Products& products();

// Of what is compiled several times, the one that serves on this machine.
const char* instruction_set();

}  // namespace beagle::cpu
