// Attention of few query rows, a row's bits the same wherever its keys lie, whatever other rows and unseen keys lie
// between, and however the work is cut: scores are summed along the head size, then values and weights along the keys a
// row sees, in order and after the largest score is known. So nodes of a tree round as tokens decoded one at a time.
#pragma once

#include "../core/layer_ops.h"
#include "attention_tile.h"

namespace beagle::cpu {

// Of up to kFewNodes nodes.
constexpr int64_t kFewNodes = 64;
void exact_attention(const TreeAttention& op, int threads);

// Keys that are multiplied together.
constexpr int kSlab = 32;

// Of an exchange of runs of kRun between two vectors: where lane i of the first or the second comes from.
template <int kRun>
constexpr int partner(int i, bool second) {
  if (i & kRun) return kLanes + (second ? i : i - kRun);
  return second ? i + kRun : i;
}

template <int kRun, int... kLane>
inline __attribute__((always_inline)) void exchange(Vec& a, Vec& b, std::integer_sequence<int, kLane...>) {
#if defined(__clang__)
  const Vec first = __builtin_shufflevector(a, b, partner<kRun>(kLane, false)...);
  b = __builtin_shufflevector(a, b, partner<kRun>(kLane, true)...);
#else
  using Ints = typename Vector<kLanes>::Ints;
  const Vec first = __builtin_shuffle(a, b, Ints{partner<kRun>(kLane, false)...});
  b = __builtin_shuffle(a, b, Ints{partner<kRun>(kLane, true)...});
#endif
  a = first;
}

template <int kRun>
inline __attribute__((always_inline)) void exchange_all(Vec* rows) {
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i)
    if (!(i & kRun)) exchange<kRun>(rows[i], rows[i + kRun], std::make_integer_sequence<int, kLanes>());
}

// kSlab keys [kSlab][padded], `stride` apart, as [padded][kSlab].
inline __attribute__((always_inline)) void turn(const float* keys, int64_t stride, int64_t padded, float* turned) {
  for (int first = 0; first < kSlab; first += kLanes)
    for (int64_t d = 0; d < padded; d += kLanes) {
      Vec block[kLanes];
#pragma GCC unroll 16
      for (int j = 0; j < kLanes; ++j) block[j] = at(keys + (first + j) * stride + d);
      exchange_all<8>(block), exchange_all<4>(block), exchange_all<2>(block), exchange_all<1>(block);
#pragma GCC unroll 16
      for (int j = 0; j < kLanes; ++j) at(turned + (d + j) * kSlab + first) = block[j];
    }
}

// Scores of a slab of keys for kCount rows of queries, `stride` apart.
template <int kCount>
inline __attribute__((always_inline)) void slab_scores(const float* query, int64_t stride, const float* turned,
                                                       int64_t width, float* score, int64_t score_stride) {
  Vec sum[kCount][2] = {};
  for (int64_t d = 0; d < width; ++d) {
    const Vec near = at(turned + d * kSlab), far = at(turned + d * kSlab + kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < kCount; ++i) {
      sum[i][0] += query[i * stride + d] * near;
      sum[i][1] += query[i * stride + d] * far;
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kCount; ++i)
    at(score + i * score_stride) = sum[i][0], at(score + i * score_stride + kLanes) = sum[i][1];
}

// The largest of `count` scores, a multiple of kSlab; NaN is none.
inline __attribute__((always_inline)) float largest(const float* score, int64_t count) {
  Vec top = Vec{} - kInf;
  for (int64_t j = 0; j < count; j += kLanes) top = at(score + j) > top ? at(score + j) : top;
  float best = -kInf;
  for (int i = 0; i < kLanes; ++i) best = top[i] > best ? top[i] : best;
  return best;
}

// Adds `count` values to kCount rows, 16 kVecs numbers a row, and their weights to the rows' mass.
template <int kCount, int kVecs>
inline __attribute__((always_inline)) void add_in_order(const float* weight, int64_t weight_stride, const float* value,
                                                        int64_t stride, int count, float* sum, int64_t sum_stride,
                                                        float* mass) {
  Vec total[kCount][kVecs];
  float weights[kCount];
#pragma GCC unroll 4
  for (int i = 0; i < kCount; ++i) {
    weights[i] = mass[i];
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) total[i][v] = at(sum + i * sum_stride + v * kLanes);
  }
  for (int j = 0; j < count; ++j) {
    Vec row[kVecs];
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) row[v] = at(value + j * stride + v * kLanes);
#pragma GCC unroll 4
    for (int i = 0; i < kCount; ++i) {
      const float w = weight[i * weight_stride + j];
      weights[i] += w;
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) total[i][v] += w * row[v];
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < kCount; ++i) {
    mass[i] = weights[i];
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) at(sum + i * sum_stride + v * kLanes) = total[i][v];
  }
}

}  // namespace beagle::cpu
