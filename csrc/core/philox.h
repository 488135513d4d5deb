// Philox4x32-10 and Gumbel noise, in basic IEEE operations only: bit-identical on every device.
#pragma once

#include "common.h"

#if defined(__AVX2__) && !defined(__CUDACC__)
#include <immintrin.h>
#endif

namespace beagle {

enum Purpose : uint32_t { kTarget = 0, kDraft = 1, kAccept = 2, kResidual = 3 };

constexpr int kGroup = 64;           // ids of a group, which draws its largest noise first
constexpr uint32_t kOfGroups = 4;    // added to the purpose where groups draw

// Counter words 1 to 3 and the key; counter word 0 is token / 4, or group / 2.
struct Stream {
  uint32_t position, purpose, round, key0, key1;
  BEAGLE_FN Stream(uint64_t seed, int64_t at, uint32_t purpose, int64_t round)
      : position(uint32_t(at)), purpose(purpose), round(uint32_t(round)), key0(uint32_t(seed)),
        key1(uint32_t(seed >> 32)) {}
  BEAGLE_FN Stream of_groups() const {
    Stream other = *this;
    other.purpose += kOfGroups;
    return other;
  }
};

BEAGLE_FN void philox_round(uint32_t& c0, uint32_t& c1, uint32_t& c2, uint32_t& c3, uint32_t& k0, uint32_t& k1) {
  const uint64_t a = uint64_t(0xD2511F53u) * c0, b = uint64_t(0xCD9E8D57u) * c2;
  c0 = uint32_t(b >> 32) ^ c1 ^ k0;
  c2 = uint32_t(a >> 32) ^ c3 ^ k1;
  c1 = uint32_t(b);
  c3 = uint32_t(a);
  k0 += 0x9E3779B9u;
  k1 += 0xBB67AE85u;
}

#if defined(__AVX2__) && !defined(__CUDACC__)
#if defined(__AVX512F__)
using Lanes = __m512i;
BEAGLE_FN Lanes product(Lanes x, uint32_t m) { return _mm512_mul_epu32(x, _mm512_set1_epi64(m)); }
#else
using Lanes = __m256i;
BEAGLE_FN Lanes product(Lanes x, uint32_t m) { return _mm256_mul_epu32(x, _mm256_set1_epi64x(m)); }
#endif
using Wide = uint64_t __attribute__((vector_size(sizeof(Lanes))));
using Narrow = uint32_t __attribute__((vector_size(sizeof(Lanes) / 2)));

// Word w of counter group0 + j goes to x[w][j]. A counter word lives in the low half of a 64-bit lane; what the upper
// half holds is never read, since the product takes low halves.
template <int N>
BEAGLE_FN void philox(const Stream& s, uint32_t group0, uint32_t (*x)[N]) {
  constexpr int kLanes = sizeof(Lanes) / 8;
  static_assert(N % kLanes == 0);
  Wide iota;
  for (int l = 0; l < kLanes; ++l) iota[l] = uint64_t(l);
  for (int j = 0; j < N; j += kLanes) {
    Wide c0 = iota + (uint64_t(group0) + j), c1 = Wide{} + s.position, c2 = Wide{} + s.purpose, c3 = Wide{} + s.round;
    uint32_t k0 = s.key0, k1 = s.key1;
    for (int i = 0; i < 10; ++i) {
      const Wide a = Wide(product(Lanes(c0), 0xD2511F53u)), b = Wide(product(Lanes(c2), 0xCD9E8D57u));
      c0 = (b >> 32) ^ c1 ^ uint64_t(k0);
      c2 = (a >> 32) ^ c3 ^ uint64_t(k1);
      c1 = b;
      c3 = a;
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    const Wide words[4] = {c0, c1, c2, c3};
    for (int w = 0; w < 4; ++w) {
      const Narrow narrow = __builtin_convertvector(words[w], Narrow);
      __builtin_memcpy(&x[w][j], &narrow, sizeof(narrow));
    }
  }
}
#else
// Word w of counter group0 + j goes to x[w][j].
template <int N>
BEAGLE_FN void philox(const Stream& s, uint32_t group0, uint32_t (*x)[N]) {
#if !defined(__CUDACC__)
#pragma GCC ivdep
#else
#pragma unroll
#endif
  for (int j = 0; j < N; ++j) {
    uint32_t c0 = group0 + uint32_t(j), c1 = s.position, c2 = s.purpose, c3 = s.round, k0 = s.key0, k1 = s.key1;
    BEAGLE_UNROLL_ROUNDS
    for (int i = 0; i < 10; ++i) {
      philox_round(c0, c1, c2, c3, k0, k1);
    }
    x[0][j] = c0, x[1][j] = c1, x[2][j] = c2, x[3][j] = c3;
  }
}
#endif

struct Words { uint32_t x[4]; };

BEAGLE_FN Words philox(const Stream& s, uint32_t counter) {
  uint32_t c0 = counter, c1 = s.position, c2 = s.purpose, c3 = s.round, k0 = s.key0, k1 = s.key1;
  BEAGLE_UNROLL_ROUNDS
  for (int i = 0; i < 10; ++i) philox_round(c0, c1, c2, c3, k0, k1);
  return {{c0, c1, c2, c3}};
}

BEAGLE_FN uint32_t philox_word(const Stream& s, uint32_t token) {
  const Words w = philox(s, token / 4);
  return token & 2 ? (token & 1 ? w.x[3] : w.x[2]) : (token & 1 ? w.x[1] : w.x[0]);
}

// Natural logarithm of a positive normal number, within 1e-7 relative.
BEAGLE_FN float log_of(float x) {
  const int32_t bits = bit_cast<int32_t>(x), exponent = (bits - 0x3f3504f3) >> 23;
  const float z = bit_cast<float>(bits - int32_t(uint32_t(exponent) << 23)) - 1.0f, e = float(exponent);
  float r = 0.07149754f;
  r = r * z + -0.11571201f;
  r = r * z + 0.11661512f;
  r = r * z + -0.124110505f;
  r = r * z + 0.14249937f;
  r = r * z + -0.1666848f;
  r = r * z + 0.20000708f;
  r = r * z + -0.2499999f;
  r = r * z + 0.3333333f;
  const float square = z * z;
  const float tail = r * z * square + e * -2.12194440e-4f - 0.5f * square;
  return (z + tail) + e * 0.693359375f;
}

// 2^fraction of x log2(e), and its whole part; x <= 0.
BEAGLE_FN float exp_parts(float x, float lowest, int32_t& whole) {
  const float y = most(x * 1.4426950408889634f, lowest);
  int32_t n = int32_t(y);
  n -= float(n) > y;
  const float f = y - float(n);
  float p = 0.00189511f;
  p = p * f + 0.00894621f;
  p = p * f + 0.05586328f;
  p = p * f + 0.24014077f;
  p = p * f + 0.69315463f;
  p = p * f + 0.9999999f;
  whole = n;
  return p;
}

// exp(x) for x <= 0; below e^-87 it stays there.
BEAGLE_FN float exp_of(float x) {
  int32_t whole;
  const float p = exp_parts(x, -125.0f, whole);
  return bit_cast<float>(bit_cast<int32_t>(p) + int32_t(uint32_t(whole) << 23));
}

// exp(x) for x <= 0 in units of 2^-30, the fixed point of the reference: sums do not depend on their order.
BEAGLE_FN uint32_t exp_fixed(float x) {
  int32_t whole;
  const float p = exp_parts(x, -31.0f, whole);
  return uint32_t(int32_t(p * 0x1p30f)) >> -whole;
}

BEAGLE_FN float unit(uint32_t x) {
  // both summands are exact, so (x + 0.5) is rounded once
  const float v = (float(int32_t(x >> 16)) * 65536.0f + (float(int32_t(x & 0xffff)) + 0.5f)) * 0x1p-32f;
  return least(v, 1.0f - 0x1p-24f);
}

// An Exp(1) variable of a word.
BEAGLE_FN float exponential(uint32_t x) {
  const float v = unit(x), u = 1.0f - v, lost = 1.0f - u;
  // log1p(-v) = log(u) v / (1 - u) undoes the rounding of u
  const float exact = -log_of(u) * (v / (lost > 0.0f ? lost : 1.0f));
  return lost > 0.0f ? exact : v;
}

// The least of a group's 64 Exp(1) variables. Its noise, the group's largest, is -log of it, that of any other member
// -log(least + exponential(the member's own word)).
BEAGLE_FN float group_least(uint32_t x) { return exponential(x) * (1.0f / kGroup); }

// A group's least and the member that has it.
struct Group {
  float least;
  uint32_t holder;
  BEAGLE_FN Group(const Stream& s, uint32_t group) {
    const Words w = philox(s.of_groups(), group / 2);
    least = group_least(group & 1 ? w.x[2] : w.x[0]);
    holder = group * kGroup + ((group & 1 ? w.x[3] : w.x[1]) >> 26);
  }
  // Gumbel noise of a member whose word is x.
  BEAGLE_FN float noise(uint32_t token, uint32_t x) const {
    return -log_of(token == holder ? least : least + exponential(x));
  }
};

BEAGLE_FN float token_noise(const Stream& s, uint32_t token) {
  return Group(s, token / kGroup).noise(token, philox_word(s, token));
}

// What a value computed from a group's largest noise is raised by, so that rounding of its members' cannot exceed it.
constexpr float kSlack = 1e-6f;

// No value z + scale * noise of a group whose logits do not exceed `top` and whose largest noise is `noise` exceeds this.
BEAGLE_FN float group_bound(float top, float scale, float noise) {
  const float spread = scale * noise, size = (top < 0.0f ? -top : top) + (spread < 0.0f ? -spread : spread);
  return top > -kInf ? top + spread + kSlack * size : -kInf;
}

BEAGLE_FN double coin(uint64_t seed, int64_t position, uint32_t purpose, int64_t round) {
  return (double(philox_word(Stream(seed, position, purpose, round), 0)) + 0.5) * 0x1p-32;
}

}  // namespace beagle
