// A row of logits read by vectors: the key of its largest, and the largest of each group of 64.
#pragma once

#include "../core/logits.h"
#include "../core/philox.h"
#include "lanes.h"

namespace beagle::cpu {

constexpr int kLanes = 16;
using Reals = Floats<kLanes>;
using Marks = Vector<kLanes>::Ints;
using Shorts = uint16_t __attribute__((vector_size(32), aligned(2), may_alias));

BEAGLE_FN Marks widen(const void* p) { return __builtin_convertvector(*static_cast<const Shorts*>(p), Marks); }
BEAGLE_FN void load_lanes(const float* p, Reals& z) { z = *reinterpret_cast<const Reals*>(p); }
BEAGLE_FN void load_lanes(const BFloat* p, Reals& z) { z = reinterpret_cast<Reals>(widen(p) << 16); }
BEAGLE_FN void load_lanes(const Half* p, Reals& z) {
  const Marks bits = widen(p), special = (bits & 0x7c00) == 0x7c00;
  const Reals magnitude = reinterpret_cast<Reals>((bits & 0x7fff) << 13) * 0x1p112f;
  z = reinterpret_cast<Reals>(reinterpret_cast<Marks>(magnitude) | (special & 0x7f800000) | (bits & 0x8000) << 16);
}

// x, or `low` where x is below it or no number.
BEAGLE_FN Reals at_least(const Reals& x, float low) {
#if defined(__AVX512F__)
  return Reals(_mm512_max_ps(__m512(x), _mm512_set1_ps(low)));
#else
  return x > low ? x : Reals{} + low;
#endif
}

// Bit l: whether lane l is marked.
BEAGLE_FN uint32_t bits_of(const Marks& marks) {
#if defined(__AVX512DQ__)
  return _mm512_movepi32_mask(__m512i(marks));
#elif defined(__AVX2__)
  __m256 half[2];
  __builtin_memcpy(half, &marks, sizeof(marks));
  return uint32_t(_mm256_movemask_ps(half[0])) | uint32_t(_mm256_movemask_ps(half[1])) << 8;
#else
  uint32_t bits = 0;
  for (int l = 0; l < kLanes; ++l) bits |= uint32_t(marks[l] & 1) << l;
  return bits;
#endif
}

// Key of the largest logit in [begin, end) by a plain scan.
template <class T>
BEAGLE_FN uint64_t scan_key(const T* row, int64_t begin, int64_t end, int32_t& status) {
  uint64_t key = 0;
  float best = -kInf;
  for (int64_t i = begin; i < end; ++i) {
    const float x = to_float(row[i]), z = tidy(x);
    if (x != x) status |= kStatusNan;
    if (z > best) best = z, key = make_key(z, uint32_t(i));
  }
  return key;
}

// Key of the largest logit in [begin, end), 0 if none is above -inf; status takes kStatusNan. Lane l keeps the largest
// of its tokens and the first tile that held it.
template <class T>
BEAGLE_FN uint64_t top_key(const T* row, int64_t begin, int64_t end, int32_t& status) {
  constexpr int kVectors = 16, kStep = kLanes * kVectors;
  const int64_t whole = begin + (end - begin) / kStep * kStep;
  Reals best = Reals{} - kInf;
  Marks where = Marks{}, nan = Marks{};
  int32_t tile = 0;
  for (int64_t i = begin; i < whole; i += kStep, ++tile) {
    Reals m = Reals{} - kInf;
    for (int v = 0; v < kVectors; ++v) {
      Reals z;
      load_lanes(row + i + v * kLanes, z);
      __builtin_prefetch(row + i + v * kLanes + 4 * kStep, 0, 0);
      nan |= z != z;
      m = z > m ? z : m;
    }
    where = m > best ? Marks{} + tile : where;
    best = m > best ? m : best;
  }
  float top = -kInf;
  int32_t first = 0;
  for (int l = 0; l < kLanes; ++l) {
    if (best[l] > top || (best[l] == top && where[l] < first)) top = best[l], first = where[l];
  }
  if (bits_of(nan)) status |= kStatusNan;
  // an infinite one counts as kMax, which an earlier token may hold
  if (top > kMax) return scan_key(row, begin, end, status);
  uint64_t key = 0;
  if (top > -kInf) {
    int64_t i = begin + int64_t(first) * kStep;
    while (i < whole && to_float(row[i]) != top) ++i;
    key = make_key(top, uint32_t(i));
  }
  return whole < end ? most(key, scan_key(row, whole, end, status)) : key;
}

// The largest of each of 16 vectors, in its order.
template <int kCount = kLanes, int... kLane>
BEAGLE_FN void fold_tops(Reals* m, std::integer_sequence<int, kLane...> lanes) {
  constexpr int kRun = kCount / 2;
  for (int j = 0; j < kRun; ++j) {
#if defined(__clang__)
    const Reals a = __builtin_shufflevector(m[j], m[j + kRun], source<kLanes, kRun>(kLane, false)...);
    const Reals b = __builtin_shufflevector(m[j], m[j + kRun], source<kLanes, kRun>(kLane, true)...);
#else
    const Reals a = __builtin_shuffle(m[j], m[j + kRun], Marks{source<kLanes, kRun>(kLane, false)...});
    const Reals b = __builtin_shuffle(m[j], m[j + kRun], Marks{source<kLanes, kRun>(kLane, true)...});
#endif
    m[j] = a > b ? a : b;
  }
  if constexpr (kRun > 1) fold_tops<kRun>(m, lanes);
}

// The largest tidied logit of each group of 64 in [begin, end); whether a logit was NaN.
template <class T>
BEAGLE_FN bool group_tops(const T* row, int64_t begin, int64_t end, float* tops) {
  constexpr int kVectors = kGroup / kLanes;
  Marks nan = Marks{};
  int64_t i = begin;
  for (; i + kLanes * kGroup <= end; tops += kLanes) {
    Reals m[kLanes];
#pragma GCC unroll 16
    for (int g = 0; g < kLanes; ++g) {
      m[g] = Reals{} - kInf;
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v, i += kLanes) {
        Reals z;
        load_lanes(row + i, z);
        __builtin_prefetch(row + i + kLanes * kGroup, 0, 0);
        nan |= z != z;
        m[g] = z > m[g] ? z : m[g];
      }
    }
    fold_tops(m, std::make_integer_sequence<int, kLanes>());
    *reinterpret_cast<Reals*>(tops) = m[0] > kMax ? Reals{} + kMax : m[0];
  }
  bool bad = bits_of(nan) != 0;
  alignas(64) float z[kGroup];
  for (; i < end; i += kGroup) {
    bad |= load_tile(row, i, end, z);
    *tops++ = tile_max(z);
  }
  return bad;
}

BEAGLE_FN const Reals& lanes_at(const float* p) { return *reinterpret_cast<const Reals*>(p); }

// The largest of `count` values, a multiple of 16 above 0.
BEAGLE_FN float largest(const float* value, int64_t count) {
  Reals best = Reals{} - kInf;
  for (int64_t i = 0; i < count; i += kLanes) best = lanes_at(value + i) > best ? lanes_at(value + i) : best;
  float top = best[0];
  for (int l = 1; l < kLanes; ++l) top = most(top, best[l]);
  return top;
}

// Index of one of the largest of `count` values, a multiple of 16 above 0.
BEAGLE_FN int64_t index_of_largest(const float* value, int64_t count) {
  constexpr int kTurns = 4;  // independent chains of comparisons
  Reals best[kTurns];
  Marks where[kTurns];
  for (int t = 0; t < kTurns; ++t) best[t] = Reals{} - kInf, where[t] = Marks{};
  const auto take = [&](int t, int32_t i) BEAGLE_INLINED {
    const Reals x = lanes_at(value + i);
    where[t] = x > best[t] ? Marks{} + i : where[t];
    best[t] = x > best[t] ? x : best[t];
  };
  int32_t i = 0;
  for (; i + kTurns * kLanes <= count; i += kTurns * kLanes)
    for (int t = 0; t < kTurns; ++t) take(t, i + t * kLanes);
  for (; i < count; i += kLanes) take(0, i);
  for (int t = 1; t < kTurns; ++t) {
    where[0] = best[t] > best[0] ? where[t] : where[0];
    best[0] = best[t] > best[0] ? best[t] : best[0];
  }
  int lane = 0;
  for (int l = 1; l < kLanes; ++l) lane = best[0][l] > best[0][lane] ? l : lane;
  return where[0][lane] + lane;
}

// Calls each(j) for the values that are at least `low` and above -inf.
template <class Each>
BEAGLE_FN void for_lanes(const float (&value)[kGroup], float low, const Each& each) {
  for (int v = 0; v < kGroup; v += kLanes) {
    const Reals x = lanes_at(value + v);
    for (uint32_t bits = bits_of(x >= low & x > -kInf); bits; bits &= bits - 1) each(v + __builtin_ctz(bits));
  }
}

// A sum of many vectors of 16, in fp32 for a while and in fp64 over all.
struct LaneSum {
  Reals lanes = Reals{};
  double whole = 0.0;
  int vectors = 0;
  BEAGLE_FN void add(const float (&value)[kGroup]) {
    for (int v = 0; v < kGroup; v += kLanes) lanes += lanes_at(value + v);
    if (++vectors == 16) flush();
  }
  BEAGLE_FN void flush() {
    for (int l = 0; l < kLanes; ++l) whole += double(lanes[l]);
    lanes = Reals{}, vectors = 0;
  }
  BEAGLE_FN double total() {
    flush();
    return whole;
  }
};

}  // namespace beagle::cpu
