#include "products.h"

#include "lanes.h"

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

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
constexpr int64_t kAny = 1 << 30;

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

// Elements of X that a row of `width` is padded to with zeros, whole cache lines; and elements between rows of x, an odd
// number of cache lines, so that rows do not compete for the same places of the cache.
template <class X>
constexpr int64_t lined(int64_t width) { return (width * sizeof(X) + 63) / 64 * 64 / sizeof(X); }
template <class X>
constexpr int64_t row_stride(int64_t width) { return ((width * sizeof(X) + 63) / 64 | 1) * 64 / sizeof(X); }

// A kind of product: a weight of W times x as X, kStep of each in a vector; what a ragged panel is copied as; tiles up to
// which a panel is multiplied where it lies, each tile widening it anew: for more it is copied once, before; and whether
// up to 8 rows of x share a tile.
template <class T>
struct Widened {
  using W = T;
  using X = float;
  using Vector = Vec;
  using Copied = Widened<float>;
  static constexpr int64_t kStep = kLanes, kMostTiles = sizeof(T) == 4 ? kAny : 2;
  static constexpr bool kTall = false;
  template <class From>
  BEAGLE_FN static Vec read(const From* from) { return load(from); }
  BEAGLE_FN static Vec add(Vec sum, Vec x, Vec w) { return sum + x * w; }
  BEAGLE_FN static float copy(T w) { return to_float(w); }
};

// A weight that is kept in bf16 where x is fp32: the products are those of the same numbers in fp32.
struct Exact : Widened<BFloat> {
  static constexpr bool kTall = kLanes == 16;  // widening costs more than it costs to load 8 rows of x for 2 of the weight
};

#if defined(__AVX512BF16__)
// Pairs of bf16 by one instruction: their products are added in fp32, the odd one first, and denormals count as zero.
struct Pairs {
  using W = BFloat;
  using X = BFloat;
  using Vector = __m512bh;
  using Copied = Pairs;
  static constexpr int64_t kStep = 32, kMostTiles = kAny;
  static constexpr bool kTall = false;
  BEAGLE_FN static __m512bh read(const BFloat* from) { return __m512bh(_mm512_loadu_si512(from)); }
  BEAGLE_FN static Vec add(Vec sum, __m512bh x, __m512bh w) { return Vec(_mm512_dpbf16_ps(__m512(sum), x, w)); }
  BEAGLE_FN static BFloat copy(BFloat w) { return w; }
};
using OfBFloat = Pairs;
#else
using OfBFloat = Widened<BFloat>;
#endif

constexpr int power_of_two(int least) { return least <= 1 ? 1 : 2 * power_of_two((least + 1) / 2); }

// kWeights weight rows times kRows rows of x. Lane i of a sum takes the products of each vector's lane i in order, and
// lanes are added in one order too: an output depends on nothing but the two rows. Meanwhile kAhead weight rows from
// `ahead` on are asked into the L2 cache.
template <class Kind, int kWeights, int kRows, int kAhead>
BEAGLE_FN void tile(const typename Kind::W* weight, int64_t stride, const typename Kind::W* ahead,
                    const typename Kind::X* x, int64_t width, float* out) {
  constexpr int kTotal = power_of_two(kWeights * kRows), kGroup = kTotal < kLanes ? kTotal : kLanes;
  Vec sum[kTotal];
#pragma GCC unroll 16
  for (int i = 0; i < kTotal; ++i) sum[i] = Vec{};
  for (int64_t k = 0; k < width; k += Kind::kStep) {
#pragma GCC unroll 16
    for (int j = 0; j < kAhead; ++j) __builtin_prefetch(ahead + j * stride + k, 0, 2);
    typename Kind::Vector row[kRows];
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) row[i] = Kind::read(x + i * row_stride<typename Kind::X>(width) + k);
#pragma GCC unroll 16
    for (int j = 0; j < kWeights; ++j) {
      const auto w = Kind::read(weight + j * stride + k);
#pragma GCC unroll 16
      for (int i = 0; i < kRows; ++i) sum[i * kWeights + j] = Kind::add(sum[i * kWeights + j], row[i], w);
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
template <class X>
struct Call {
  const X* x;
  int64_t rows, width;
  float* out;
  int64_t out_stride;
};

// `count` weight rows, at `weight`, with kRows rows of x from row m on, into columns from n on.
template <class Kind, int kWeights, int kRows, int kAhead>
BEAGLE_FN void block(const Call<typename Kind::X>& call, const typename Kind::W* weight, int64_t stride,
                     const typename Kind::W* ahead, int64_t m, int64_t n, int64_t count) {
  using X = typename Kind::X;
  float out[power_of_two(kWeights * kRows)];
  const X* x = call.x + m * row_stride<X>(call.width);
  tile<Kind, kWeights, kRows, kAhead>(weight, stride, ahead, x, lined<X>(call.width), out);
  for (int i = 0; i < kRows; ++i)
    for (int j = 0; j < count; ++j) call.out[(m + i) * call.out_stride + n + j] = out[i * kWeights + j];
}

// All rows of x with one panel of weight rows, in tiles of equal height; the tiles share the fetching of the next panel.
template <class Kind, int kWeights, int kAhead, int kRows>
BEAGLE_FN void panel(const Call<typename Kind::X>& call, const typename Kind::W* weight, int64_t stride, int64_t n,
                     int64_t count) {
  const int64_t tiles = (call.rows + kRows - 1) / kRows;
  const auto* ahead = weight + kWeights * stride;
  for (int64_t i = 0, m = 0; i < tiles; ++i) {
    const int64_t rows = (call.rows - m + tiles - i - 1) / (tiles - i);
#define BLOCK(rows) \
  block<Kind, kWeights, (rows < kRows ? rows : kRows), kAhead>(call, weight, stride, ahead, m, n, count)
    if (rows == 1) BLOCK(1);
    if (rows == 2) BLOCK(2);
    if (rows == 3) BLOCK(3);
    if (rows == 4) BLOCK(4);
    if (rows == 5) BLOCK(5);
    if (rows == 6) BLOCK(6);
    if (rows == 7) BLOCK(7);
    if (rows == 8) BLOCK(8);
    m += rows;
    ahead += kAhead * stride;
  }
}

// Weight rows as the kind's copies, padded with zeros.
template <class Kind>
BEAGLE_FN void copy(const typename Kind::W* weight, int64_t stride, int64_t count, int64_t width,
                    typename Kind::Copied::W* to) {
  constexpr int64_t kStep = Kind::kStep;
  const int64_t whole = lined<typename Kind::X>(width);
  for (int64_t j = 0; j < count; ++j, weight += stride, to += whole) {
    int64_t k = 0;
    for (; k + kStep <= width; k += kStep) {
      __builtin_prefetch(weight + count * stride + k, 0, 2);
      const auto vector = Kind::read(weight + k);
      __builtin_memcpy(to + k, &vector, sizeof vector);
    }
    for (; k < whole; ++k) to[k] = k < width ? Kind::copy(weight[k]) : typename Kind::Copied::W{};
  }
}

// Weight rows first .. last - 1 in panels, each multiplied where it lies unless it is ragged or better copied first.
template <class Kind, int kWeights, int kAhead, int kRows = kSums / kWeights>
BEAGLE_FN void panels(const Weight& weight, const Call<typename Kind::X>& call, int64_t first, int64_t last,
                      float* spare) {
  using W = typename Kind::W;
  using Copied = typename Kind::Copied;
  const int64_t whole = lined<typename Kind::X>(call.width);
  const bool exact = call.width == whole && call.rows <= Kind::kMostTiles * kRows;
  for (int64_t n = first; n < last; n += kWeights) {
    const W* rows = static_cast<const W*>(weight.rows) + n * weight.stride;
    const int64_t count = least<int64_t>(kWeights, last - n);
    if (exact && count == kWeights) {
      panel<Kind, kWeights, kAhead, kRows>(call, rows, weight.stride, n - first, count);
      continue;
    }
    auto* copies = reinterpret_cast<typename Copied::W*>(spare);
    copy<Kind>(rows, weight.stride, count, call.width, copies);
    panel<Copied, kWeights, 0, kRows>(call, copies, whole, n - first, count);
  }
}

template <class Kind>
void multiply(const Weight& weight, const void* x, int64_t rows, int64_t first, int64_t last, float* out,
              int64_t out_stride, float* spare) {
  constexpr int kRows = kSums / kWide;
  const Call<typename Kind::X> call{static_cast<const typename Kind::X*>(x), rows, weight.width, out, out_stride};
  if (rows == 1) return panels<Kind, kSums, kSums>(weight, call, first, last, spare);
  if (rows == 2) return panels<Kind, kSums / 2, kSums / 2>(weight, call, first, last, spare);
  if (rows <= kRows) return panels<Kind, kWide, kWide>(weight, call, first, last, spare);
  if (Kind::kTall && rows <= 8) return panels<Kind, kSums / 8, kSums / 4, 8>(weight, call, first, last, spare);
  if (rows <= 3 * kRows) return panels<Kind, kWide, 2>(weight, call, first, last, spare);
  panels<Kind, kWide, 1>(weight, call, first, last, spare);
}

template <class Kind>
int64_t prepared(int64_t rows, int64_t width, int64_t) {
  return rows * row_stride<typename Kind::X>(width) * int64_t(sizeof(typename Kind::X));
}

// Rows in X, padded with zeros; as T has it, so that all instruction sets multiply the same x.
template <class Kind>
void prepare(const float* x, int64_t stride, int64_t rows, int64_t width, int64_t, void* to) {
  using X = typename Kind::X;
  constexpr bool kRound = std::is_same_v<typename Kind::W, BFloat> && !std::is_same_v<Kind, Exact>;
  X* row = static_cast<X*>(to);
  for (int64_t m = 0; m < rows; ++m, x += stride, row += row_stride<X>(width)) {
    for (int64_t k = 0; k < width; ++k) {
      if constexpr (!kRound) row[k] = x[k];
      else if constexpr (sizeof(X) == 4) row[k] = to_float(narrow<BFloat>(x[k]));
      else row[k] = narrow<BFloat>(x[k]);
    }
    for (int64_t k = width; k < lined<X>(width); ++k) row[k] = X{};
  }
}

template <class Kind>
constexpr Product kProduct = {prepared<Kind>, prepare<Kind>, multiply<Kind>};

}  // namespace

extern const Product kProducts[kKinds];
const Product kProducts[kKinds] = {kProduct<Widened<float>>, kProduct<Widened<Half>>, kProduct<OfBFloat>,
                                   {},  // kInt8's is int8_product.cpp's
                                   kProduct<Exact>};

}  // namespace beagle::cpu::BEAGLE_ISA
