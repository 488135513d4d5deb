// A row of logits read by vectors of 16 bytes, wherever it starts, and the largest logit of each group of 64.
#pragma once

#include "../core/logits.h"
#include "../core/philox.h"
#include "team.cuh"

namespace beagle::cuda {

// The larger of a and b; NaN if one is NaN. The packed ones do so by halves.
__device__ __forceinline__ float max_or_nan(float a, float b) {
#if defined(BEAGLE_EMULATED)
  return a != a || a > b ? a : b;
#else
  float c;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(c) : "f"(a), "f"(b));
  return c;
#endif
}

template <class T>
__device__ __forceinline__ uint32_t packed_max(uint32_t a, uint32_t b) {
#if defined(BEAGLE_EMULATED)
  uint32_t c = 0;
  for (int s = 0; s < 32; s += 16) {
    const float x = to_float(T{uint16_t(a >> s)}), y = to_float(T{uint16_t(b >> s)});
    c |= (x != x || x > y ? a : b) & 0xffffu << s;
  }
  return c;
#else
  uint32_t c;
  if constexpr (std::is_same_v<T, BFloat>) asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(c) : "r"(a), "r"(b));
  else asm("max.NaN.f16x2 %0, %1, %2;" : "=r"(c) : "r"(a), "r"(b));
  return c;
#endif
}

template <class T>
struct Row {
  static constexpr int kPer = 16 / sizeof(T);            // tokens of a vector
  static constexpr int kVectors = 32 / kPer;             // of a thread, which takes 32 tokens of a chunk
  static constexpr int kLanes = kGroup / kPer;           // that share a group
  static constexpr uint32_t kNone = sizeof(T) == 4 ? 0xff800000u : std::is_same_v<T, Half> ? 0xfc00fc00u : 0xff80ff80u;

  const T* logits;
  const uint4* start;  // logits, rounded down to 16 bytes
  uint32_t shift;      // by so many bytes
  int32_t vocab, first, last;  // vectors [first, last) can be read without touching what is not the row's

  __device__ Row(const T* logits, int64_t tokens) : logits(logits), vocab(int32_t(tokens)) {
    shift = uint32_t(reinterpret_cast<uintptr_t>(logits) % 16);
    start = reinterpret_cast<const uint4*>(reinterpret_cast<const char*>(logits) - shift);
    first = shift ? 1 : 0;
    last = most(shift ? (vocab + int32_t(shift / sizeof(T))) / kPer - 1 : vocab / kPer, first);
  }
  // The i-th token that no vector holds whole, of at most 3 kPer - 1; at least vocab where there are fewer.
  __device__ __forceinline__ int32_t odd_token(int32_t i) const {
    return i < first * kPer ? i : i + (last - first) * kPer;
  }
  __device__ __forceinline__ float at(int32_t token) const { return token < vocab ? to_float(logits[token]) : -kInf; }

  // Tokens of two aligned vectors from `shift` on.
  __device__ __forceinline__ uint4 join(const uint4& a, const uint4& b) const {
    const uint32_t word[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w}, bits = shift % 4 * 8;
    uint32_t two[6], one[5], out[4];
    BEAGLE_UNROLL
    for (int i = 0; i < 6; ++i) two[i] = shift & 8 ? word[i + 2] : word[i];
    BEAGLE_UNROLL
    for (int i = 0; i < 5; ++i) one[i] = shift & 4 ? two[i + 1] : two[i];
    BEAGLE_UNROLL
    for (int i = 0; i < 4; ++i) out[i] = uint32_t((uint64_t(one[i + 1]) << 32 | one[i]) >> bits);
    return {out[0], out[1], out[2], out[3]};
  }

  // Vectors j, j + stride, ... that can all be read.
  template <int N>
  __device__ __forceinline__ void load_whole(int32_t j, int32_t stride, uint4 (&raw)[N]) const {
    BEAGLE_COUNT(kLogits, N * kPer);
    BEAGLE_UNROLL
    for (int n = 0; n < N; ++n) raw[n] = start[j + n * stride];
    if (shift == 0) return;
    BEAGLE_UNROLL
    for (int n = 0; n < N; ++n) raw[n] = join(raw[n], start[j + n * stride + 1]);
  }

  // Vectors j, j + stride, ... of those that `wants` takes; the others, and what is beyond the row, are -inf. A vector
  // of the row that cannot be read whole is NaN.
  template <int N, class Wants>
  __device__ __forceinline__ void load(int32_t j, int32_t stride, uint4 (&raw)[N], const Wants& wants) const {
    bool whole[N];
    BEAGLE_UNROLL
    for (int n = 0; n < N; ++n) {
      const int32_t at = j + n * stride;
      const bool none = at * kPer >= vocab || !wants(at);
      const uint32_t fill = none ? kNone : ~0u;
      raw[n] = uint4{fill, fill, fill, fill};
      whole[n] = !none && at >= first && at < last;
      if (whole[n]) raw[n] = start[at];
      BEAGLE_COUNT(kLogits, whole[n] ? kPer : 0);
    }
    if (shift == 0) return;
    BEAGLE_UNROLL
    for (int n = 0; n < N; ++n) {
      if (whole[n]) raw[n] = join(raw[n], start[j + n * stride + 1]);
    }
  }
};

// The tokens of a vector, tidied.
template <class T>
__device__ __forceinline__ void unpack(const uint4& raw, float (&z)[Row<T>::kPer]) {
  const uint32_t word[4] = {raw.x, raw.y, raw.z, raw.w};
  BEAGLE_UNROLL
  for (int j = 0; j < Row<T>::kPer; ++j) {
    if constexpr (sizeof(T) == 4) z[j] = tidy(bit_cast<float>(word[j]));
    else z[j] = tidy(to_float(T{uint16_t(word[j / 2] >> j % 2 * 16)}));
  }
}

// The largest token of each vector's group, to all lanes that share it; NaN if one is.
template <class T, int N>
__device__ __forceinline__ void group_tops(const uint4 (&raw)[N], float (&top)[N]) {
  if constexpr (sizeof(T) == 4) {
    BEAGLE_UNROLL
    for (int n = 0; n < N; ++n) {
      const float a = max_or_nan(bit_cast<float>(raw[n].x), bit_cast<float>(raw[n].y));
      top[n] = max_or_nan(a, max_or_nan(bit_cast<float>(raw[n].z), bit_cast<float>(raw[n].w)));
      BEAGLE_UNROLL
      for (int s = 1; s < Row<T>::kLanes; s *= 2) top[n] = max_or_nan(top[n], __shfl_xor_sync(~0u, top[n], s));
    }
  } else {
    // two vectors' maxima share a word on the way through the lanes
    BEAGLE_UNROLL
    for (int n = 0; n < N; n += 2) {
      uint32_t m[2];
      BEAGLE_UNROLL
      for (int i = 0; i < 2; ++i) {
        const uint4& x = raw[n + i];
        m[i] = packed_max<T>(packed_max<T>(x.x, x.y), packed_max<T>(x.z, x.w));
      }
      uint32_t both = packed_max<T>(m[0] << 16 | (m[1] & 0xffff), (m[0] & 0xffff0000u) | m[1] >> 16);
      BEAGLE_UNROLL
      for (int s = 1; s < Row<T>::kLanes; s *= 2) both = packed_max<T>(both, __shfl_xor_sync(~0u, both, s));
      top[n] = to_float(T{uint16_t(both >> 16)}), top[n + 1] = to_float(T{uint16_t(both)});
    }
  }
}

__device__ __forceinline__ uint64_t warp_max(uint64_t x) {
  const uint32_t high = __reduce_max_sync(~0u, uint32_t(x >> 32));
  return uint64_t(high) << 32 | __reduce_max_sync(~0u, uint32_t(x >> 32) == high ? uint32_t(x) : 0);
}

// A group's largest logit, tidied, by a warp; whether one was NaN.
template <class T>
__device__ bool retake_top(const Row<T>& row, int32_t group, float& top) {
  const int32_t token = group * kGroup + int32_t(threadIdx.x % 32);
  const float a = row.at(token), b = row.at(token + 32);
  top = unorder(__reduce_max_sync(~0u, most(order(tidy(a)), order(tidy(b)))));
  return __any_sync(~0u, a != a || b != b);
}

// A chunk of a row that a block reads once: 32 tokens a thread. Thread t of a warp holds vectors of `raw` whose groups'
// largest logits go to tops; returns whether the warp met a NaN.
template <class T>
__device__ __forceinline__ bool store_tops(const Row<T>& row, int32_t begin, const uint4 (&raw)[Row<T>::kVectors],
                                           float* tops) {
  constexpr unsigned kVectors = Row<T>::kVectors, kLanes = Row<T>::kLanes;
  const unsigned per_step = blockDim.x / kLanes, lane = threadIdx.x % 32;
  float top[kVectors], *place = tops + threadIdx.x / kLanes;
  group_tops<T>(raw, top);
  bool strange = false;
  BEAGLE_UNROLL
  for (unsigned n = 0; n < kVectors; ++n, place += per_step) {
    top[n] = top[n] > kMax ? kMax : top[n];
    strange |= top[n] != top[n];
    if (lane % kLanes == 0) *place = top[n];
  }
  if (!__any_sync(~0u, strange)) return false;
  __syncwarp();
  bool nan = false;
  const unsigned own = threadIdx.x / 32 * (32 / kLanes);
  for (unsigned n = 0; n < kVectors; ++n) {
    for (unsigned u = n * per_step + own; u < n * per_step + own + 32 / kLanes; ++u) {
      const float before = tops[u];
      if (before == before) continue;
      float taken;
      nan |= retake_top(row, begin / kGroup + int32_t(u), taken);
      __syncwarp();
      if (lane == 0) tops[u] = taken;
    }
  }
  return nan;
}

}  // namespace beagle::cuda
