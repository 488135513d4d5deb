// Products of a few rows with a weight's rows, compiled once for every instruction set (see setup.py) and chosen when
// first used. What products.cpp includes is always inlined, so no two of its objects share a symbol.
#pragma once

#include "../core/ops.h"

namespace beagle::cpu {

// Floats that a row of x is padded to, with zeros; a multiple of every instruction set's vector.
constexpr int64_t kPad = 16;
constexpr int64_t padded(int64_t width) { return (width + kPad - 1) / kPad * kPad; }

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
  // These, from rows in fp32, `stride` floats apart; `to` is aligned to 64 bytes. For a weight in bf16 they are rounded
  // to bf16.
  void (*prepare)(const float* x, int64_t stride, int64_t rows, int64_t width, void* to);
  // out[m * out_stride + n - first] for all rows m and first <= n < last; spare holds kPanel padded rows.
  void (*multiply)(const Weight& weight, const void* x, int64_t rows, int64_t first, int64_t last, float* out,
                   int64_t out_stride, float* spare);
};

struct Products {
  Product of[kKinds];  // by dtype, and kExact
};

const Products& products();

}  // namespace beagle::cpu
