// Products of int8 by vectors, an output a lane: what int8_product.cpp needs of each instruction set. BEAGLE_LANES is
// defined where there is one for it.
#pragma once

#include "lanes.h"

#ifndef BEAGLE_ISA
#define BEAGLE_ISA baseline
#endif

#if defined(__AVX2__)
#include <immintrin.h>
#define BEAGLE_LANES
#endif

namespace beagle::cpu::BEAGLE_ISA {
namespace {

#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
// One instruction adds four products of unsigned with signed elements: the weight's have 128 added, and sums begin with
// -128 times those of x.
using Element = int8_t;
constexpr int32_t kOffset = -128;
BEAGLE_FN int64_t place(int64_t k) { return k; }
#else
// Products in 16 bits, of elements 0, 2 and then 1, 3 of each quad.
using Element = int16_t;
constexpr int32_t kOffset = 0;
BEAGLE_FN int64_t place(int64_t k) {
#if defined(BEAGLE_LANES)
  return (k & ~3) + (k & 1) * 2 + (k & 2) / 2;
#else
  return k;
#endif
}
#endif

#if !defined(BEAGLE_LANES)
constexpr int kMost = 1;
#else

// Four elements a lane.
BEAGLE_FN int32_t quad(const void* from) {
  int32_t bytes;
  __builtin_memcpy(&bytes, from, 4);
  return bytes;
}

#if defined(__AVX512F__)
constexpr int kLanes = 16, kMost = 8;
using Ints = __m512i;

BEAGLE_FN Ints all(int32_t x) { return _mm512_set1_epi32(x); }
BEAGLE_FN Ints added(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
BEAGLE_FN Floats<16> floats(Ints x) { return Floats<16>(_mm512_cvtepi32_ps(x)); }

#if defined(__AVX512VNNI__)
BEAGLE_FN Ints as_kept(Ints quads) { return _mm512_xor_si512(quads, _mm512_set1_epi8(-128)); }
struct Quads {
  Ints bytes;
  BEAGLE_FN explicit Quads(const char* from) : bytes(_mm512_load_si512(from)) {}
  BEAGLE_FN Ints add_to(Ints total, const Element* x) const { return _mm512_dpbusd_epi32(total, bytes, all(quad(x))); }
};
#else
BEAGLE_FN Ints as_kept(Ints quads) { return quads; }
struct Quads {
  Ints even, odd;
  BEAGLE_FN explicit Quads(const char* from) : odd(_mm512_load_si512(from)) {
    even = _mm512_srai_epi16(_mm512_slli_epi16(odd, 8), 8);
    odd = _mm512_srai_epi16(odd, 8);
  }
  BEAGLE_FN Ints add_to(Ints total, const Element* x) const {
    total = added(total, _mm512_madd_epi16(even, all(quad(x))));
    return added(total, _mm512_madd_epi16(odd, all(quad(x + 2))));
  }
};
#endif

// Of the transposition below: rows 4 kPart .. 4 kPart + 3 among themselves, and then quads kPart - 4 + 4 i of all rows.
template <int kStep, int kPart>
BEAGLE_FN void transpose_part(const int8_t* const* rows, int64_t k, char* half, char* to) {
  Ints* halves = reinterpret_cast<Ints*>(half);
  if constexpr (kPart < 4) {
    Ints a[4], b[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const int8_t* from = rows[4 * kPart + j] + k;
      if constexpr (kStep == 64) a[j] = _mm512_loadu_si512(from);
      else a[j] = _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
    }
    b[0] = _mm512_unpacklo_epi32(a[0], a[1]), b[1] = _mm512_unpackhi_epi32(a[0], a[1]);
    b[2] = _mm512_unpacklo_epi32(a[2], a[3]), b[3] = _mm512_unpackhi_epi32(a[2], a[3]);
    // each holds four rows of quads c, 4 + c, 8 + c, 12 + c
    halves += 4 * kPart;
    halves[0] = _mm512_unpacklo_epi64(b[0], b[2]), halves[1] = _mm512_unpackhi_epi64(b[0], b[2]);
    halves[2] = _mm512_unpacklo_epi64(b[1], b[3]), halves[3] = _mm512_unpackhi_epi64(b[1], b[3]);
  } else {
    constexpr int c = kPart - 4;
    Ints* quads = reinterpret_cast<Ints*>(to) + c;
    const Ints even = _mm512_shuffle_i32x4(halves[c], halves[4 + c], 0x88);
    const Ints odd = _mm512_shuffle_i32x4(halves[c], halves[4 + c], 0xdd);
    const Ints even2 = _mm512_shuffle_i32x4(halves[8 + c], halves[12 + c], 0x88);
    const Ints odd2 = _mm512_shuffle_i32x4(halves[8 + c], halves[12 + c], 0xdd);
    quads[0] = as_kept(_mm512_shuffle_i32x4(even, even2, 0x88));
    quads[4] = as_kept(_mm512_shuffle_i32x4(odd, odd2, 0x88));
    if constexpr (kStep == 64) {
      quads[8] = as_kept(_mm512_shuffle_i32x4(even, even2, 0xdd));
      quads[12] = as_kept(_mm512_shuffle_i32x4(odd, odd2, 0xdd));
    }
  }
}

#else  // AVX2
constexpr int kLanes = 8, kMost = 4;
using Ints = __m256i;

BEAGLE_FN Ints all(int32_t x) { return _mm256_set1_epi32(x); }
BEAGLE_FN Ints added(Ints a, Ints b) { return _mm256_add_epi32(a, b); }
BEAGLE_FN Floats<8> floats(Ints x) { return Floats<8>(_mm256_cvtepi32_ps(x)); }
BEAGLE_FN Ints aligned(const char* from) { return _mm256_load_si256(reinterpret_cast<const Ints*>(from)); }

#if defined(__AVXVNNI__)
BEAGLE_FN Ints as_kept(Ints quads) { return _mm256_xor_si256(quads, _mm256_set1_epi8(-128)); }
struct Quads {
  Ints bytes;
  BEAGLE_FN explicit Quads(const char* from) : bytes(aligned(from)) {}
  BEAGLE_FN Ints add_to(Ints total, const Element* x) const {
    return _mm256_dpbusd_avx_epi32(total, bytes, all(quad(x)));
  }
};
#else
BEAGLE_FN Ints as_kept(Ints quads) { return quads; }
struct Quads {
  Ints even, odd;
  BEAGLE_FN explicit Quads(const char* from) : odd(aligned(from)) {
    even = _mm256_srai_epi16(_mm256_slli_epi16(odd, 8), 8);
    odd = _mm256_srai_epi16(odd, 8);
  }
  BEAGLE_FN Ints add_to(Ints total, const Element* x) const {
    total = added(total, _mm256_madd_epi16(even, all(quad(x))));
    return added(total, _mm256_madd_epi16(odd, all(quad(x + 2))));
  }
};
#endif

template <int kStep, int kPart>
BEAGLE_FN void transpose_part(const int8_t* const* rows, int64_t k, char* half, char* to) {
  static_assert(kStep == 32);
  Ints* halves = reinterpret_cast<Ints*>(half);
  if constexpr (kPart < 2) {
    Ints a[4], b[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j)
      a[j] = _mm256_loadu_si256(reinterpret_cast<const Ints*>(rows[4 * kPart + j] + k));
    b[0] = _mm256_unpacklo_epi32(a[0], a[1]), b[1] = _mm256_unpackhi_epi32(a[0], a[1]);
    b[2] = _mm256_unpacklo_epi32(a[2], a[3]), b[3] = _mm256_unpackhi_epi32(a[2], a[3]);
    halves += 4 * kPart;
    halves[0] = _mm256_unpacklo_epi64(b[0], b[2]), halves[1] = _mm256_unpackhi_epi64(b[0], b[2]);
    halves[2] = _mm256_unpacklo_epi64(b[1], b[3]), halves[3] = _mm256_unpackhi_epi64(b[1], b[3]);
  } else {
#pragma GCC unroll 2
    for (int c = 2 * kPart - 4; c < 2 * kPart - 2; ++c) {
      Ints* quads = reinterpret_cast<Ints*>(to) + c;
      quads[0] = as_kept(_mm256_permute2x128_si256(halves[c], halves[4 + c], 0x20));
      quads[4] = as_kept(_mm256_permute2x128_si256(halves[c], halves[4 + c], 0x31));
    }
  }
}
#endif

// kStep elements of each row from k on, to kStep / 4 vectors of quads, a row a lane: in kParts parts, which use `half`
// in between, so that they may take turns with products of what was transposed before.
constexpr int kParts = kLanes / 2, kHalfBytes = 4 * kLanes * kLanes;
template <int kStep, int... kPart>
BEAGLE_FN void transpose(const int8_t* const* rows, int64_t k, char* half, char* to,
                         std::integer_sequence<int, kPart...>) {
  (transpose_part<kStep, kPart>(rows, k, half, to), ...);
}
#endif

}  // namespace
}  // namespace beagle::cpu::BEAGLE_ISA
