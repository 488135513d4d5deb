#include "products.h"

#include "lanes.h"

#ifndef BEAGLE_ISA
#define BEAGLE_ISA baseline
#endif

namespace beagle::cpu::BEAGLE_ISA {
namespace {

// A vector's floats, and how many vectors of sums the registers hold beside what is loaded.
#if defined(__AVX512F__)
constexpr int kLanes = 16, kSums = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8, kSums = 8;
#elif defined(__SSE2__)
constexpr int kLanes = 4, kSums = 8;
#else
constexpr int kLanes = 4, kSums = 16;
#endif
// Weight rows of a tile, where there are x rows enough to share them.
constexpr int kWide = 4;
// Tiles up to which a panel in 16 bits is widened as each one reads it; for more it is widened once, before.
constexpr int kWidened = 2;

using Vec = Floats<kLanes>;
typedef uint32_t Bits __attribute__((vector_size(4 * kLanes)));
typedef uint16_t Narrow __attribute__((vector_size(2 * kLanes), aligned(2), may_alias));

BEAGLE_FN Vec load(const float* from) { return *reinterpret_cast<const Vec*>(from); }
BEAGLE_FN Bits wide_bits(const void* from) { return __builtin_convertvector(*static_cast<const Narrow*>(from), Bits); }
BEAGLE_FN Vec load(const BFloat* from) { return Vec(wide_bits(from) << 16); }
BEAGLE_FN Vec load(const Half* from) {
  // as to_float has it
  const Bits bits = wide_bits(from);
  const Vec magnitude = Vec((bits & 0x7fff) << 13) * 0x1p112f;
  const Bits special = Bits((bits & 0x7c00) == 0x7c00) & 0x7f800000;
  return Vec(Bits(magnitude) | special | (bits & 0x8000) << 16);
}

constexpr int power_of_two(int least) { return least <= 1 ? 1 : 2 * power_of_two((least + 1) / 2); }

// kWeights weight rows times kRows rows of x. Lane i of a sum takes the products at i, i + kLanes, ..., in order, and
// lanes are added in one order too: an output depends on nothing but the two rows. Meanwhile kAhead weight rows from
// `ahead` on are asked into the L2 cache.
template <int kWeights, int kRows, int kAhead, class T>
BEAGLE_FN void tile(const T* weight, int64_t stride, const T* ahead, const float* x, int64_t width, float* out) {
  constexpr int kTotal = power_of_two(kWeights * kRows), kGroup = kTotal < kLanes ? kTotal : kLanes;
  Vec sum[kTotal];
#pragma GCC unroll 16
  for (int i = 0; i < kTotal; ++i) sum[i] = Vec{};
  for (int64_t k = 0; k < width; k += kLanes) {
#pragma GCC unroll 16
    for (int j = 0; j < kAhead; ++j) __builtin_prefetch(ahead + j * stride + k, 0, 2);
    Vec row[kRows];
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) row[i] = load(x + i * row_stride(width) + k);
#pragma GCC unroll 16
    for (int j = 0; j < kWeights; ++j) {
      const Vec w = load(weight + j * stride + k);
#pragma GCC unroll 16
      for (int i = 0; i < kRows; ++i) sum[i * kWeights + j] += row[i] * w;
    }
  }
#pragma GCC unroll 4
  for (int g = 0; g < kTotal; g += kGroup) {
    add_lanes<kLanes, kGroup>(sum + g);
    alignas(64) float lanes[kLanes];
    *reinterpret_cast<Vec*>(lanes) = sum[g];
#pragma GCC unroll 16
    for (int j = 0; j < kGroup; ++j) out[g + j] = lanes[j * (kLanes / kGroup)];
  }
}

// What a call of multiply is given, beside the weight's rows.
struct Call {
  const float* x;
  int64_t rows, width;
  float* out;
  int64_t out_stride;
};

// `count` weight rows, at `weight`, with kRows rows of x from row m on, into columns from n on.
template <int kWeights, int kRows, int kAhead, class W>
BEAGLE_FN void block(const Call& call, const W* weight, int64_t stride, const W* ahead, int64_t m, int64_t n,
                     int64_t count) {
  const int64_t width = padded(call.width);
  float out[power_of_two(kWeights * kRows)];
  tile<kWeights, kRows, kAhead>(weight, stride, ahead, call.x + m * row_stride(width), width, out);
  for (int i = 0; i < kRows; ++i)
    for (int j = 0; j < count; ++j) call.out[(m + i) * call.out_stride + n + j] = out[i * kWeights + j];
}

// All rows of x with one panel of weight rows, in tiles of equal height; the tiles share the fetching of the next panel.
template <int kWeights, int kAhead, class W>
BEAGLE_FN void panel(const Call& call, const W* weight, int64_t stride, int64_t n, int64_t count) {
  constexpr int kRows = kSums / kWeights;
  const int64_t tiles = (call.rows + kRows - 1) / kRows;
  const W* ahead = weight + kWeights * stride;
  for (int64_t i = 0, m = 0; i < tiles; ++i) {
    const int64_t rows = (call.rows - m + tiles - i - 1) / (tiles - i);
#define BLOCK(rows) block<kWeights, (rows < kRows ? rows : kRows), kAhead>(call, weight, stride, ahead, m, n, count)
    if (rows == 1) BLOCK(1);
    if (rows == 2) BLOCK(2);
    if (rows == 3) BLOCK(3);
    if (rows == 4) BLOCK(4);
    m += rows;
    ahead += kAhead * stride;
  }
}

// Weight rows as fp32, padded with zeros.
template <class T>
BEAGLE_FN void widen(const T* weight, int64_t stride, int64_t count, int64_t width, float* to) {
  for (int64_t j = 0; j < count; ++j, weight += stride, to += padded(width)) {
    int64_t k = 0;
    for (; k + kLanes <= width; k += kLanes) {
      __builtin_prefetch(weight + count * stride + k, 0, 2);
      *reinterpret_cast<Vec*>(to + k) = load(weight + k);
    }
    for (; k < padded(width); ++k) to[k] = k < width ? to_float(weight[k]) : 0.0f;
  }
}

// Weight rows first .. last - 1 in panels, each multiplied where it lies unless it is ragged or better widened first.
template <int kWeights, int kAhead, class T>
BEAGLE_FN void panels(const Weight& weight, const Call& call, int64_t first, int64_t last, float* spare) {
  const bool exact = call.width == padded(call.width) && (sizeof(T) == 4 || call.rows <= kWidened * kSums / kWeights);
  for (int64_t n = first; n < last; n += kWeights) {
    const T* rows = static_cast<const T*>(weight.rows) + n * weight.stride;
    const int64_t count = least<int64_t>(kWeights, last - n);
    if (exact && count == kWeights) {
      panel<kWeights, kAhead>(call, rows, weight.stride, n - first, count);
      continue;
    }
    widen(rows, weight.stride, count, call.width, spare);
    panel<kWeights, 0>(call, spare, padded(call.width), n - first, count);
  }
}

template <class T>
void multiply(const Weight& weight, const void* x, int64_t rows, int64_t first, int64_t last, float* out,
              int64_t out_stride, float* spare) {
  constexpr int kRows = kSums / kWide;
  const Call call{static_cast<const float*>(x), rows, weight.width, out, out_stride};
  if (rows == 1) return panels<kSums, kSums, T>(weight, call, first, last, spare);
  if (rows == 2) return panels<kSums / 2, kSums / 2, T>(weight, call, first, last, spare);
  if (rows <= kRows) return panels<kWide, kWide, T>(weight, call, first, last, spare);
  if (rows <= 3 * kRows) return panels<kWide, 2, T>(weight, call, first, last, spare);
  panels<kWide, 1, T>(weight, call, first, last, spare);
}

int64_t prepared(int64_t rows, int64_t width) { return 4 * rows * row_stride(width); }

// Rows padded with zeros.
void prepare(const float* x, int64_t stride, int64_t rows, int64_t width, void* to) {
  float* row = static_cast<float*>(to);
  for (int64_t m = 0; m < rows; ++m, x += stride, row += row_stride(width)) {
    for (int64_t k = 0; k < width; ++k) row[k] = x[k];
    for (int64_t k = width; k < padded(width); ++k) row[k] = 0.0f;
  }
}

}  // namespace

extern const Products kProducts;
const Products kProducts = {{{prepared, prepare, multiply<float>},
                             {prepared, prepare, multiply<Half>},
                             {prepared, prepare, multiply<BFloat>}}};

}  // namespace beagle::cpu::BEAGLE_ISA
