// Philox4x32-10 and Gumbel noise, in basic IEEE operations only: bit-identical on every device.
#pragma once

#include "arithmetic.h"

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

// Word w of counter[j] goes to x[w][j]. A counter word lives in the low half of a 64-bit lane; what the upper half holds
// is never read, since the product takes low halves. Even and odd counters go through in two vectors, side by side.
template <int N>
BEAGLE_OWN void philox(const Stream& s, const uint32_t (&counter)[N], uint32_t (*x)[N]) {
  constexpr int kStep = sizeof(Lanes) / 4;
  static_assert(N % kStep == 0);
  BEAGLE_COUNT(kPhilox, N);
  for (int j = 0; j < N; j += kStep) {
    Wide c[2][4];
    __builtin_memcpy(&c[0][0], &counter[j], sizeof(Wide));
    c[1][0] = c[0][0] >> 32;
    for (int h = 0; h < 2; ++h) c[h][1] = Wide{} + s.position, c[h][2] = Wide{} + s.purpose, c[h][3] = Wide{} + s.round;
    uint32_t k0 = s.key0, k1 = s.key1;
    BEAGLE_UNROLL_ROUNDS
    for (int i = 0; i < 10; ++i) {
      BEAGLE_UNROLL_ROUNDS
      for (int h = 0; h < 2; ++h) {
        const Wide a = Wide(product(Lanes(c[h][0]), 0xD2511F53u)), b = Wide(product(Lanes(c[h][2]), 0xCD9E8D57u));
        c[h][0] = (b >> 32) ^ c[h][1] ^ uint64_t(k0);
        c[h][2] = (a >> 32) ^ c[h][3] ^ uint64_t(k1);
        c[h][1] = b;
        c[h][3] = a;
      }
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    for (int w = 0; w < 4; ++w) {
      const Wide both = (c[0][w] & 0xffffffffu) | (c[1][w] << 32);
      __builtin_memcpy(&x[w][j], &both, sizeof(both));
    }
  }
}
#else
// Word w of counter[j] goes to x[w][j].
template <int N>
BEAGLE_OWN void philox(const Stream& s, const uint32_t (&counter)[N], uint32_t (*x)[N]) {
  BEAGLE_COUNT(kPhilox, N);
#if !defined(__CUDACC__)
#pragma GCC ivdep
#else
#pragma unroll
#endif
  for (int j = 0; j < N; ++j) {
    uint32_t c0 = counter[j], c1 = s.position, c2 = s.purpose, c3 = s.round, k0 = s.key0, k1 = s.key1;
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
  BEAGLE_COUNT(kPhilox, 1);
  uint32_t c0 = counter, c1 = s.position, c2 = s.purpose, c3 = s.round, k0 = s.key0, k1 = s.key1;
  BEAGLE_UNROLL_ROUNDS
  for (int i = 0; i < 10; ++i) philox_round(c0, c1, c2, c3, k0, k1);
  return {{c0, c1, c2, c3}};
}

BEAGLE_FN uint32_t philox_word(const Stream& s, uint32_t token) {
  const Words w = philox(s, token / 4);
  return token & 2 ? (token & 1 ? w.x[3] : w.x[2]) : (token & 1 ? w.x[1] : w.x[0]);
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

// No noise of a group whose least is drawn by `word` exceeds this, nor that of a token with `word` for its own, which is
// log 64 less, the token's bound: -log(e / 64) <=
// -log(v / 64), and log2(1 + m) >= m + 0.2787 m (1 - m). What may be the best lies within a hundredth or two of it.
BEAGLE_FN float noise_bound(uint32_t word) {
  const float x = float(int32_t(word >> 16)) * 65536.0f + float(int32_t(word & 0xffff));
  const int32_t bits = bit_cast<int32_t>(most(x, 0.5f));
  const float m = bit_cast<float>((bits & 0x7fffff) | 0x3f800000) - 1.0f;
  const float log2 = float((bits >> 23) - 127) + m + 0.2787f * m * (1.0f - m);
  return (32.0f + 6.0f - log2) * 0.6931472f + 1e-5f;
}
BEAGLE_FN float token_bound(uint32_t word) { return noise_bound(word) - 4.1588831f; }

// A bound below this cannot reach z + T g = `value`, whatever rounding adds near it.
BEAGLE_FN float reach_of(float value, float temperature) {
  const float finite = least(value, kMax);
  return finite - 2e-6f * ((finite < 0.0f ? -finite : finite) + 64.0f * temperature);
}

BEAGLE_FN double coin(uint64_t seed, int64_t position, uint32_t purpose, int64_t round) {
  return (double(philox_word(Stream(seed, position, purpose, round), 0)) + 0.5) * 0x1p-32;
}

}  // namespace beagle
