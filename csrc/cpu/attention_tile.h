// Attention of a tile of query rows to a tile of keys by the online softmax, in vectors of 16 numbers.
#pragma once

#include <algorithm>
#include <vector>

#include "exponential.h"
#include "lanes.h"

namespace beagle::cpu {

constexpr int kLanes = 16, kKeys = 64, kRows = 32;
// From this many rows on, a vector holds one key's scores for 16 rows instead of 16 numbers of one row.
constexpr int kAcross = 10;

using Vec = Floats<kLanes>;

inline __attribute__((always_inline)) Vec& at(float* place) { return *reinterpret_cast<Vec*>(place); }
inline __attribute__((always_inline)) const Vec& at(const float* place) { return *reinterpret_cast<const Vec*>(place); }

// A tile of queries and what its rows have summed so far. `query` is [rows][padded], or [padded][kRows] where scores
// are computed across rows; `sum` is [rows][value_padded].
struct Queries {
  std::vector<float> query, sum;
  float top[kRows], mass[kRows];
  int64_t first;
  int rows;
  bool across;
};

// A tile of keys and values in fp32, zeros past `count` up to a multiple of 16.
struct Keys {
  const float *key, *value;
  int64_t key_stride, value_stride;
  int count;
  int padded_count() const { return (count + kLanes - 1) / kLanes * kLanes; }
};

// A soft cap c: a score z becomes `most` tanh(z `inverse`), that is c tanh(z / c) in powers of two.
struct Cap {
  float inverse, most;
};

// `score` is [kRows][kKeys], or [kKeys][kRows] where it is computed across rows.
struct Scratch {
  Scratch(int64_t padded, int64_t value_padded, Cap cap)
      : padded(padded), value_padded(value_padded), cap(cap), key(kKeys * padded), value(kKeys * value_padded) {}
  int64_t padded, value_padded;
  Cap cap;
  std::vector<float> key, value;
  float score[kKeys * kRows] = {}, keep[kRows] = {};
  std::vector<Queries> tiles;
};

template <class T>
inline __attribute__((always_inline)) void widen(const T* from, float* to, int64_t width, float scale) {
  for (int64_t d = 0; d < width; ++d) to[d] = to_float(from[d]) * scale;
}

// Scores of 16 keys for one query row.
inline __attribute__((always_inline)) Vec dots(const float* query, const float* key, int64_t stride, int64_t padded) {
  Vec sum[kLanes] = {};
  for (int64_t d = 0; d < padded; d += kLanes) {
    const Vec q = at(query + d);
#pragma GCC unroll 16
    for (int j = 0; j < kLanes; ++j) sum[j] += q * at(key + j * stride + d);
  }
  add_lanes<kLanes, kLanes>(sum);
  return sum[0];
}

// Scores of kCount keys for 16 kVecs rows: the queries lie by columns, so that nothing is summed across a vector.
template <int kCount, int kVecs>
inline __attribute__((always_inline)) void dots_across(const float* query, const float* key, int64_t stride,
                                                       int64_t width, float* score) {
  Vec sum[kCount][kVecs] = {};
  for (int64_t d = 0; d < width; ++d) {
    Vec q[kVecs];
#pragma GCC unroll 2
    for (int v = 0; v < kVecs; ++v) q[v] = at(query + d * kRows + v * kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < kCount; ++i)
#pragma GCC unroll 2
      for (int v = 0; v < kVecs; ++v) sum[i][v] += key[i * stride + d] * q[v];
  }
#pragma GCC unroll 16
  for (int i = 0; i < kCount; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < kVecs; ++v) at(score + i * kRows + v * kLanes) = sum[i][v];
}

// Adds a tile's values to kCount rows, 16 kVecs numbers a row; a value is loaded once for all of them.
template <int kCount, int kVecs>
inline __attribute__((always_inline)) void add_values(float* sum, const float* keep, const float* score,
                                                      int64_t row_stride, int64_t key_stride, const Keys& keys,
                                                      int64_t d, int64_t padded) {
  Vec total[kCount][kVecs];
#pragma GCC unroll 8
  for (int i = 0; i < kCount; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) total[i][v] = at(sum + i * padded + d + v * kLanes) * keep[i];
  for (int j = 0; j < keys.count; ++j) {
    Vec value[kVecs];
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) value[v] = at(keys.value + j * keys.value_stride + d + v * kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < kCount; ++i)
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) total[i][v] += score[j * key_stride + i * row_stride] * value[v];
  }
#pragma GCC unroll 8
  for (int i = 0; i < kCount; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) at(sum + i * padded + d + v * kLanes) = total[i][v];
}

template <int kCount, int kVecs>
inline __attribute__((always_inline)) void add_all_values(Queries& q, Scratch& s, int r, int64_t row_stride,
                                                          int64_t key_stride, const Keys& keys) {
  const int64_t padded = s.value_padded;
  float* sum = &q.sum[r * padded];
  const float* score = s.score + r * row_stride;
  int64_t d = 0;
  for (; d + kVecs * kLanes <= padded; d += kVecs * kLanes)
    add_values<kCount, kVecs>(sum, s.keep + r, score, row_stride, key_stride, keys, d, padded);
  for (; d < padded; d += kLanes)
    add_values<kCount, 1>(sum, s.keep + r, score, row_stride, key_stride, keys, d, padded);
}

template <int kCount>
inline __attribute__((always_inline)) void cap_scores(float* score, Cap cap) {
  for (int i = 0; i < kCount; ++i) score[i] = cap.most * tanh_of(score[i] * cap.inverse);
}

// Adds a tile's keys to few query rows by the online softmax, one row after the other; bit j of seen[r] is key j.
template <bool kCapped>
inline __attribute__((always_inline)) void add_tile(Queries& q, Scratch& s, const uint64_t* seen, const Keys& keys) {
  const int count = keys.padded_count();
  for (int r = 0; r < q.rows; ++r) {
    float* score = s.score + r * kKeys;
    for (int j = 0; j < count; j += kLanes)
      at(score + j) = dots(&q.query[r * s.padded], keys.key + j * keys.key_stride, keys.key_stride, s.padded);
    for (int j = 0; kCapped && j < count; j += kLanes) cap_scores<kLanes>(score + j, s.cap);
    if (seen[r] != ~0ull)
      for (int j = 0; j < count; ++j) score[j] = seen[r] >> j & 1 ? score[j] : -kInf;
    float top = q.top[r], mass = 0.0f;
    for (int j = 0; j < count; ++j) top = score[j] > top ? score[j] : top;
    // a row that has seen no key yet: its scores stay 2^-inf = 0 against any finite pivot
    const float pivot = top == -kInf ? 0.0f : top;
    for (int j = 0; j < count; ++j) score[j] = exp2_of(score[j] - pivot);
    for (int j = 0; j < count; ++j) mass += score[j];
    s.keep[r] = exp2_of(q.top[r] - pivot);
    q.mass[r] = q.mass[r] * s.keep[r] + mass;
    q.top[r] = top;
  }
  int r = 0;
  for (; r + 1 < q.rows; r += 4) add_all_values<4, 4>(q, s, r, kKeys, 1, keys);
  if (r < q.rows) add_all_values<1, 4>(q, s, r, kKeys, 1, keys);
}

// The same for many rows, 16 a vector.
template <int kWide, bool kCapped>
inline __attribute__((always_inline)) void add_tile_across(Queries& q, Scratch& s, const uint64_t* seen, bool whole,
                                                           int64_t width, const Keys& keys) {
  constexpr int kVecs = kWide / kLanes, kStep = 16 / kVecs;
  const int count = keys.padded_count();
  for (int j = 0; j < count; j += kStep)
    dots_across<kStep, kVecs>(q.query.data(), keys.key + j * keys.key_stride, keys.key_stride, width,
                              s.score + j * kRows);
  for (int j = 0; kCapped && j < count; ++j) cap_scores<kWide>(s.score + j * kRows, s.cap);
  for (int half = 0; half < 64 && !whole; half += 32) {
    uint32_t part[kWide];
    for (int r = 0; r < kWide; ++r) part[r] = uint32_t(seen[r] >> half);
    for (int j = half; j < std::min(count, half + 32); ++j)
      for (int r = 0; r < kWide; ++r) s.score[j * kRows + r] = part[r] >> (j - half) & 1 ? s.score[j * kRows + r] : -kInf;
  }
  float top[kWide], mass[kWide] = {};
  for (int r = 0; r < kWide; ++r) top[r] = q.top[r];
  for (int j = 0; j < count; ++j)
    for (int r = 0; r < kWide; ++r) top[r] = s.score[j * kRows + r] > top[r] ? s.score[j * kRows + r] : top[r];
  for (int r = 0; r < kWide; ++r) {
    const float pivot = top[r] == -kInf ? 0.0f : top[r];
    s.keep[r] = exp2_of(q.top[r] - pivot);
    q.top[r] = top[r];
    top[r] = pivot;
  }
  for (int j = 0; j < count; ++j)
    for (int r = 0; r < kWide; ++r) {
      const float p = exp2_of(s.score[j * kRows + r] - top[r]);
      s.score[j * kRows + r] = p;
      mass[r] += p;
    }
  for (int r = 0; r < kWide; ++r) q.mass[r] = q.mass[r] * s.keep[r] + mass[r];
  for (int r = 0; r < q.rows; r += 8) add_all_values<8, 2>(q, s, r, 1, kRows, keys);
}

}  // namespace beagle::cpu
