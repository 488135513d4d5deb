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

// The larger of the two; y where x is no number.
BEAGLE_FN Reals larger(const Reals& x, const Reals& y) {
#if defined(__AVX512F__)
  return Reals(_mm512_max_ps(__m512(x), __m512(y)));
#else
  return x > y ? x : y;
#endif
}
BEAGLE_FN Reals at_least(const Reals& x, float low) { return larger(x, Reals{} + low); }

// 2^(d scale) for d scale from -125 to 0.
BEAGLE_FN Reals exp2_of(const Reals& d, float scale) {
  Marks whole;
  const Reals p = exp2_parts(d, Reals{} + scale, 1.0f, whole);
  return Reals(Marks(p) + (whole << 23));
}

BEAGLE_FN float largest_lane(const Reals& x) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps(__m512(x));
#else
  float top = x[0];
  for (int l = 1; l < kLanes; ++l) top = most(top, x[l]);
  return top;
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

// 64 logits from i, -inf from end on; NaN and +inf stay what they are, but for the last few.
template <class T>
BEAGLE_FN void load_group(const T* row, int64_t i, int64_t end, float (&z)[kGroup]) {
  if (i + kGroup > end) {
    load_tile(row, i, end, z);
    return;
  }
  BEAGLE_COUNT(kLogits, kGroup);
#pragma GCC unroll 4
  for (int v = 0; v < kGroup; v += kLanes) {
    Reals x;
    load_lanes(row + i + v, x);
    *reinterpret_cast<Reals*>(z + v) = x;
  }
}

// 64 logits of a row whose largest is `top`, tidied where an infinite one is about; NaN may stay.
template <class T>
BEAGLE_FN void load_finite(const T* row, int64_t i, int64_t end, float top, float (&z)[kGroup]) {
  if (top < kMax) load_group(row, i, end, z);
  else load_tile(row, i, end, z);
}

// Moves the marked ones of 16 values together to `to`, at or below `from`, and returns how many they are; what lies behind
// them up to `from` + 16 is lost.
template <class T>
BEAGLE_FN int store_marked(const T* from, uint32_t lanes, T* to) {
  static_assert(sizeof(T) == 4);
#if defined(__AVX512F__)
  _mm512_storeu_si512(to, _mm512_maskz_compress_epi32(__mmask16(lanes), _mm512_loadu_si512(from)));
#else
  for (uint32_t rest = lanes; rest; rest &= rest - 1) *to++ = from[__builtin_ctz(rest)];
#endif
  return __builtin_popcount(lanes);
}

// Key of the largest logit in [begin, end) by a plain scan.
template <class T>
BEAGLE_OWN uint64_t scan_key(const T* row, int64_t begin, int64_t end, int32_t& status) {
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
BEAGLE_OWN uint64_t top_key(const T* row, int64_t begin, int64_t end, int32_t& status) {
  constexpr int kVectors = 16, kStep = kLanes * kVectors;
  BEAGLE_COUNT(kLogits, end - begin);
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
    m[j] = larger(a, b);
  }
  if constexpr (kRun > 1) fold_tops<kRun>(m, lanes);
}

// Whether a lane of any vector seen was NaN: of two at a time where one instruction compares them.
struct Nans {
#if defined(__AVX512F__)
  uint32_t lanes = 0;
  BEAGLE_FN void see(const Reals& x, const Reals& y) { lanes |= _mm512_cmp_ps_mask(__m512(x), __m512(y), _CMP_UNORD_Q); }
  BEAGLE_FN bool any() const { return lanes != 0; }
#else
  Marks lanes = Marks{};
  BEAGLE_FN void see(const Reals& x, const Reals& y) { lanes |= (x != x) | (y != y); }
  BEAGLE_FN bool any() const { return bits_of(lanes) != 0; }
#endif
};

// The largest tidied logit of each group of 64 in [begin, end); whether a logit was NaN.
template <class T>
BEAGLE_OWN bool group_tops(const T* row, int64_t begin, int64_t end, float* tops) {
  Nans nans;
  int64_t i = begin;
  for (; i + kLanes * kGroup <= end; tops += kLanes) {
    BEAGLE_COUNT(kLogits, kLanes * kGroup);
    Reals m[kLanes];
#pragma GCC unroll 16
    for (int g = 0; g < kLanes; ++g, i += kGroup) {
      Reals z[4];
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) {
        load_lanes(row + i + v * kLanes, z[v]);
        __builtin_prefetch(row + i + v * kLanes + kLanes * kGroup, 0, 0);
      }
      nans.see(z[0], z[1]), nans.see(z[2], z[3]);
      m[g] = Reals{} - kInf;
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) m[g] = larger(z[v], m[g]);
    }
    fold_tops(m, std::make_integer_sequence<int, kLanes>());
    *reinterpret_cast<Reals*>(tops) = m[0] > kMax ? Reals{} + kMax : m[0];
  }
  bool bad = nans.any();
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
  for (int64_t i = 0; i < count; i += kLanes) best = larger(lanes_at(value + i), best);
  return largest_lane(best);
}

// Index of one of the largest of `count` values, a multiple of 16 above 0.
BEAGLE_FN int64_t index_of_largest(const float* value, int64_t count) {
  Reals best = lanes_at(value);
  Marks where = Marks{};
  for (int32_t i = kLanes; i < count; i += kLanes) {
    const Reals x = lanes_at(value + i);
    where = x > best ? Marks{} + i : where;
    best = x > best ? x : best;
  }
  const uint32_t lanes = bits_of(best == largest_lane(best));
  const int lane = lanes ? __builtin_ctz(lanes) : 0;
  return where[lane] + lane;
}

// Calls each(j) for the values that `takes` marks.
template <class Takes, class Each>
BEAGLE_FN void for_marked(const float (&value)[kGroup], const Takes& takes, const Each& each) {
  for (int v = 0; v < kGroup; v += kLanes)
    for (uint32_t bits = bits_of(takes(lanes_at(value + v))); bits; bits &= bits - 1) each(v + __builtin_ctz(bits));
}
// The same for values that are at least `low` and above -inf.
template <class Each>
BEAGLE_FN void for_lanes(const float (&value)[kGroup], float low, const Each& each) {
  for_marked(value, [&](const Reals& x) BEAGLE_INLINED { return (x >= low) & (x > -kInf); }, each);
}

// A sum of many vectors of 16, in fp32 for a while and in fp64 over all.
struct LaneSum {
  Reals lanes = Reals{};
  double whole = 0.0;
  int vectors = 0;
  BEAGLE_FN void add(const Reals& value) {
    lanes += value;
    if (++vectors == 64) flush();
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
