// Types, bit tricks and the Team concept shared by every algorithm, on host and device.
//
// A Team runs one algorithm together: a CUDA block, or one host thread. It has
//   kTile            tokens one member handles at a time
//   rank(), size()   this member and how many there are
//   sync()           everything written before is seen by all members after
//   max, sum, any    of one value a member, the result given to all
//   scan(x)          sum of x over the members before this one
//   add, set         *p += x and *p |= x on memory the members share
//   put(p, x)        *p = x, where several members may write the same
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define BEAGLE_FN __host__ __device__ __forceinline__
#define BEAGLE_INLINED
#define BEAGLE_OWN BEAGLE_FN
#define BEAGLE_UNROLL _Pragma("unroll")
#define BEAGLE_UNROLL_ROUNDS _Pragma("unroll")
#else
#define BEAGLE_FN inline __attribute__((always_inline))
// A function that each object file has for itself: called, where inlining it everywhere would take long to compile.
#define BEAGLE_OWN static inline __attribute__((noinline))
// of a lambda: [&](int i) BEAGLE_INLINED { ... }
#define BEAGLE_INLINED __attribute__((always_inline))
// data loops are left to the vectoriser
#define BEAGLE_UNROLL
#define BEAGLE_UNROLL_ROUNDS _Pragma("GCC unroll 10")
#endif

// Adds n to emulator::kLogits, kPhilox or kLooks, in builds that count: BEAGLE_COUNT(kLogits, N).
#if defined(BEAGLE_EMULATED)
#include "../emulator/emulator.h"
#define BEAGLE_COUNT(what, n) ::emulator::count(::emulator::what, uint64_t(n))
#else
#define BEAGLE_COUNT(what, n) static_cast<void>(0)
#endif

namespace beagle {

constexpr float kInf = __builtin_huge_valf();
constexpr float kMax = 3.402823466e38f;
constexpr int32_t kStatusNan = 1, kStatusNoFinite = 2, kStatusBadTree = 4;

template <class To, class From>
BEAGLE_FN To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof(To));
  return to;
}

struct Half { uint16_t bits; };
struct BFloat { uint16_t bits; };

BEAGLE_FN float to_float(float x) { return x; }
BEAGLE_FN float to_float(BFloat x) { return bit_cast<float>(uint32_t(x.bits) << 16); }
BEAGLE_FN float to_float(Half x) {
  // the product moves the exponent bias and normalises subnormals; what ends above 65504 was inf or NaN
  const float magnitude = bit_cast<float>(uint32_t(x.bits & 0x7fff) << 13) * 0x1p112f;
  const uint32_t special = (x.bits & 0x7c00) == 0x7c00 ? 0x7f800000u : 0u;
  return bit_cast<float>(bit_cast<uint32_t>(magnitude) | special | uint32_t(x.bits & 0x8000) << 16);
}

// Rounded to the nearest, ties to even.
template <class T> T narrow(float x);
template <> BEAGLE_FN float narrow<float>(float x) { return x; }
template <> BEAGLE_FN BFloat narrow<BFloat>(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  if (x != x) return {uint16_t(bits >> 16 | 0x40)};
  return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
template <> BEAGLE_FN Half narrow<Half>(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return {uint16_t(sign | 0x7e00)};
  if (magnitude >= 0x477ff000) return {uint16_t(sign | 0x7c00)};
  if (magnitude < 0x38800000) {
    // subnormal: adding 0.5 leaves the rounded fraction in the low bits
    const float shifted = bit_cast<float>(magnitude) + 0.5f;
    return {uint16_t(sign | (bit_cast<uint32_t>(shifted) - 0x3f000000))};
  }
  return {uint16_t(sign | ((magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13))};
}

// Order-preserving map of floats without NaN to unsigned integers; both zeros map alike.
BEAGLE_FN uint32_t order(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x + 0.0f);
  return bits ^ (bits >> 31 ? 0xffffffffu : 0x80000000u);
}
BEAGLE_FN float unorder(uint32_t key) {
  return bit_cast<float>(key ^ (key >> 31 ? 0x80000000u : 0xffffffffu));
}

// Keys compare by value, then lowest index first; 0 is below every key.
BEAGLE_FN uint64_t make_key(float value, uint32_t index) { return uint64_t(order(value)) << 32 | uint32_t(~index); }
BEAGLE_FN uint32_t key_index(uint64_t key) { return ~uint32_t(key); }
BEAGLE_FN float key_value(uint64_t key) { return unorder(uint32_t(key >> 32)); }

template <class T>
BEAGLE_FN T least(T a, T b) { return b < a ? b : a; }
template <class T>
BEAGLE_FN T most(T a, T b) { return a < b ? b : a; }

// Where row (b, n) of a [B, N, V] array starts, in elements; every row offset of the library is computed here.
BEAGLE_FN int64_t row_offset(int64_t b, int64_t n, int64_t stride_b, int64_t stride_n) {
  return b * stride_b + n * stride_n;
}

// The team of one host thread.
struct Thread {
  static constexpr int kTile = 256;
  BEAGLE_FN int rank() const { return 0; }
  BEAGLE_FN int size() const { return 1; }
  BEAGLE_FN void sync() const {}
  template <class T>
  BEAGLE_FN T max(T x) const { return x; }
  template <class T>
  BEAGLE_FN T sum(T x) const { return x; }
  BEAGLE_FN bool any(bool x) const { return x; }
  BEAGLE_FN uint64_t scan(uint64_t) const { return 0; }
  template <class T>
  BEAGLE_FN void add(T* p, T x) const { *p += x; }
  BEAGLE_FN void set(uint64_t* p, uint64_t bits) const { *p |= bits; }
  BEAGLE_FN void put(float* p, float x) const { *p = x; }
};

}  // namespace beagle
