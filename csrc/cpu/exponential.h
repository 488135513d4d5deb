// Exponentials to fp32's last bit or two, without a branch; always inlined, as lanes.h is.
#pragma once

#include "../core/common.h"

namespace beagle::cpu {

constexpr float kLog2E = 1.442695040888963f;

// 2^x for x <= 0, to fp32's last bit or two; below -126 it is 0, and NaN stays.
BEAGLE_FN float exp2_of(float x) {
  const float clamped = x < -126.0f ? -126.0f : x;
  const float shifted = clamped + 12582912.0f;  // rounds to the nearest integer in the low bits
  const float f = clamped - (shifted - 12582912.0f);
  float p = 1.52527338e-5f;
  p = p * f + 1.54035304e-4f;
  p = p * f + 1.33335581e-3f;
  p = p * f + 9.61812911e-3f;
  p = p * f + 5.55041087e-2f;
  p = p * f + 2.40226507e-1f;
  p = p * f + 6.93147181e-1f;
  p = p * f + 1.0f;
  const float scaled = bit_cast<float>(bit_cast<uint32_t>(p) + (bit_cast<uint32_t>(shifted) << 23));
  // a NaN's payload would be added into its exponent
  return x < -126.0f ? 0.0f : x == x ? scaled : x;
}

// tanh to fp32's last bit or two: below 0.55 a polynomial, since 1 - 2 e / (1 + e) would cancel.
BEAGLE_FN float tanh_of(float x) {
  const float size = x < 0.0f ? -x : x, square = x * x, e = exp2_of(size * (-2.0f * kLog2E));
  const float far = 1.0f - 2.0f * e / (1.0f + e);
  float p = -6.38112e-3f;
  p = p * square + 2.115393e-2f;
  p = p * square + -5.387445e-2f;
  p = p * square + 1.3332827e-1f;
  p = p * square + -3.3333326e-1f;
  // NaN stays: it is not above 0.55
  return size > 0.55f ? (x < 0.0f ? -far : far) : x + x * (square * p);
}

}  // namespace beagle::cpu
