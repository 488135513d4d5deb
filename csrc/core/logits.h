// A tile of a row of logits, tidied.
#pragma once

#include "common.h"

namespace beagle {

// A logit as sampling sees it: NaN is -inf, +inf the largest number.
BEAGLE_FN float tidy(float z) {
  z = z == z ? z : -kInf;
  return z > kMax ? kMax : z;
}

template <int N, class T>
BEAGLE_FN void load_full(const T* p, T (&raw)[N]) {
#if defined(__CUDA_ARCH__)
  if (reinterpret_cast<uintptr_t>(p) % 16 == 0) {
    constexpr int kVectors = N * sizeof(T) / 16;
    BEAGLE_UNROLL
    for (int i = 0; i < kVectors; ++i) reinterpret_cast<uint4*>(raw)[i] = reinterpret_cast<const uint4*>(p)[i];
    return;
  }
#endif
  BEAGLE_UNROLL
  for (int i = 0; i < N; ++i) raw[i] = p[i];
}

// N tidied logits from i, -inf from end on; whether one was NaN.
template <int N, class T>
BEAGLE_FN bool load_tile(const T* row, int64_t i, int64_t end, float (&z)[N]) {
  alignas(64) T raw[N];
  int32_t nan = 0;
  BEAGLE_COUNT(kLogits, least<int64_t>(N, end - i));
  if (i + N <= end) {
    load_full(row + i, raw);
    BEAGLE_UNROLL
    for (int j = 0; j < N; ++j) {
      const float x = to_float(raw[j]);
      nan |= x != x;
      z[j] = tidy(x);
    }
    return nan;
  }
  BEAGLE_UNROLL
  for (int j = 0; j < N; ++j) {
    const float x = i + j < end ? to_float(row[i + j]) : -kInf;
    nan |= x != x;
    z[j] = tidy(x);
  }
  return nan;
}

template <int N>
BEAGLE_FN float tile_max(const float (&z)[N]) {
  constexpr int kLanes = N < 16 ? N : 16;
  float m[kLanes];
  BEAGLE_UNROLL
  for (int l = 0; l < kLanes; ++l) m[l] = z[l];
  BEAGLE_UNROLL
  for (int j = kLanes; j < N; j += kLanes)
    for (int l = 0; l < kLanes; ++l) m[l] = z[j + l] > m[l] ? z[j + l] : m[l];
  BEAGLE_UNROLL
  for (int s = kLanes / 2; s > 0; s /= 2)
    for (int l = 0; l < s; ++l) m[l] = m[l + s] > m[l] ? m[l + s] : m[l];
  return m[0];
}

template <int N>
BEAGLE_FN float lane_sum(const float (&value)[N]) {
  constexpr int kLanes = N < 16 ? N : 16;
  float lane[kLanes] = {};
  BEAGLE_UNROLL
  for (int j = 0; j < N; j += kLanes)
    for (int l = 0; l < kLanes; ++l) lane[l] += value[j + l];
  float sum = 0.0f;
  BEAGLE_UNROLL
  for (int l = 0; l < kLanes; ++l) sum += lane[l];
  return sum;
}

}  // namespace beagle
