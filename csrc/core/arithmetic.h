// Logarithm and exponential in additions, products and fused multiply-adds alone: bit-identical on every device.
#pragma once

#include "common.h"

#if defined(__AVX512F__) && !defined(__CUDACC__)
#include <immintrin.h>
#endif

namespace beagle {

// a b + c rounded once; where the machine has no instruction for it, by doubles, which differs in one of 2^29 cases.
BEAGLE_FN float fused(float a, float b, float c) {
#if defined(__CUDA_ARCH__) && !defined(BEAGLE_EMULATED)
  return __fmaf_rn(a, b, c);
#elif defined(__FMA__) || defined(__aarch64__)
  return __builtin_fmaf(a, b, c);
#else
  return float(double(a) * double(b) + double(c));
#endif
}

#if !defined(__CUDACC__)
// The same of vectors, of 16 floats.
template <class F>
BEAGLE_FN F fused(const F& a, const F& b, const F& c) {
#if defined(__AVX512F__)
  return F(_mm512_fmadd_ps(__m512(a), __m512(b), __m512(c)));
#else
  F sum;
  for (int l = 0; l < int(sizeof(F) / 4); ++l) sum[l] = fused(float(a[l]), float(b[l]), float(c[l]));
  return sum;
#endif
}
#endif

// Natural logarithm of a positive normal number, within 1e-7 relative.
BEAGLE_FN float log_of(float x) {
  const int32_t bits = bit_cast<int32_t>(x), exponent = (bits - 0x3f3504f3) >> 23;
  const float z = bit_cast<float>(bits - int32_t(uint32_t(exponent) << 23)) - 1.0f, e = float(exponent);
  float r = 0.07149754f;
  r = fused(r, z, -0.11571201f);
  r = fused(r, z, 0.11661512f);
  r = fused(r, z, -0.124110505f);
  r = fused(r, z, 0.14249937f);
  r = fused(r, z, -0.1666848f);
  r = fused(r, z, 0.20000708f);
  r = fused(r, z, -0.2499999f);
  r = fused(r, z, 0.3333333f);
  const float square = z * z;
  const float tail = fused(r * z, square, fused(e, -2.12194440e-4f, -0.5f * square));
  return (z + tail) + e * 0.693359375f;
}

constexpr float kLog2E = 1.4426950408889634f;

// `unit` times 2^fraction of d scale, the fraction in [-1/2, 1/2], and the whole rest of it; below `unit` at 0. |d scale|
// is below 2^22. Of numbers or of vectors of them.
template <class F, class I>
BEAGLE_FN F exp2_parts(F d, F scale, float unit, I& whole) {
  // adding 1.5 2^23 leaves the whole part, rounded, in the low bits
  const F shifted = fused(d, scale, F{} + 12582912.0f), f = fused(d, scale, 12582912.0f - shifted);
  whole = bit_cast<I>(shifted) - 0x4b400000;
  F p = F{} + 0.001325328f * unit;
  p = fused(p, f, F{} + 0.009667583f * unit);
  p = fused(p, f, F{} + 0.05550751f * unit);
  p = fused(p, f, F{} + 0.24022356f * unit);
  p = fused(p, f, F{} + 0.693147f * unit);
  return fused(p, f, F{} + 0.99999994f * unit);
}

// 2^(d scale) for d scale from -125 to 0.
BEAGLE_FN float exp2_of(float d, float scale) {
  int32_t whole;
  const float p = exp2_parts(d, scale, 1.0f, whole);
  return bit_cast<float>(bit_cast<int32_t>(p) + int32_t(uint32_t(whole) << 23));
}
// e^x for x <= 0; below e^-86 it stays there.
BEAGLE_FN float exp_of(float x) { return exp2_of(most(x, -86.0f), kLog2E); }

// 2^(d scale) for d scale from -31 to 0 in units of 2^-30, the fixed point of the reference: sums do not depend on their
// order. Less than 2^30.
BEAGLE_FN uint32_t exp2_fixed(float d, float scale) {
  int32_t whole;
  const float p = exp2_parts(d, scale, 0x1p30f, whole);
  return uint32_t(int32_t(p)) >> -whole;
}

}  // namespace beagle
