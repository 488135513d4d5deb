// Products of a few rows with a weight's rows, compiled once for every instruction set (see setup.py) and chosen when
// first used. What products.cpp and int8_product.cpp include is always inlined, so no two of their objects share a
// symbol.
#pragma once

#include "../core/layer_ops.h"

namespace beagle::cpu {

// Floats that a row of x is padded to, with zeros; a multiple of every instruction set's vector.
constexpr int64_t kPad = 16;
constexpr int64_t padded(int64_t width) { return (width + kPad - 1) / kPad * kPad; }

// Most weight rows that are multiplied together.
constexpr int64_t kPanel = 16;

// A linear layer's weight [outputs, width] where it lies, its rows `stride` elements apart. In int8 it has scales
// [outputs, width / group], one for each `group` elements of a row, a multiple of kLeastGroup that divides the width.
struct Weight {
  const void* rows;
  int64_t outputs, width, stride;
  const float* scales = nullptr;
  int64_t group = 0;
};
constexpr int64_t kLeastGroup = 32;

// What is done with weights of one kind; `group` is the weight's.
struct Product {
  // Bytes of rows of x as `multiply` reads them.
  BEAGLE_FN int64_t prepared(int64_t rows, int64_t width, int64_t group = 0) const { return bytes(rows, width, group); }

  // These, from rows in fp32, `stride` floats apart; `to` is aligned to 64 bytes. For a weight in bf16 they are rounded
  // to bf16, for one in int8 quantised group by group.
  BEAGLE_FN void prepare(const float* x, int64_t stride, int64_t rows, int64_t width, void* to,
                         int64_t group = 0) const {
    fill(x, stride, rows, width, group, to);
  }

  // out[m * out_stride + n - first] for all rows m and first <= n < last; spare holds kPanel padded rows of floats.
  BEAGLE_FN void multiply(const Weight& weight, const void* x, int64_t rows, int64_t first, int64_t last, float* out,
                          int64_t out_stride, float* spare) const {
    times(weight, x, rows, first, last, out, out_stride, spare);
  }

  int64_t (*bytes)(int64_t rows, int64_t width, int64_t group);
  void (*fill)(const float* x, int64_t stride, int64_t rows, int64_t width, int64_t group, void* to);
  void (*times)(const Weight& weight, const void* x, int64_t rows, int64_t first, int64_t last, float* out,
                int64_t out_stride, float* spare);
};

// By kind of weight, a dtype or a Kind; bytes of an element of each.
constexpr int64_t kElementBytes[kKinds] = {4, 2, 2, 1, 2};

// Outputs that one task computes: so many that it reads some 64 KiB of the weight, which keeps the hand-out cheap and the
// threads busy alike.
constexpr int64_t outputs_a_task(int32_t kind, int64_t width) {
  return ((1 << 16) / ((width < 1 ? 1 : width) * kElementBytes[kind]) / kPanel + 1) * kPanel;
}
struct Products {
  Product of[kKinds];
};

const Products& products();

}  // namespace beagle::cpu
