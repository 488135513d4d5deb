// z + T g of what the filters keep of a row, -inf for the rest.
#pragma once

#include "nucleus.h"

namespace beagle::cpu {

// Into `bounds` a row's largest logit and the least that top-k and top-p keep; returns the row's status.
template <class T>
BEAGLE_OWN int32_t bounds_of(const T* row, int64_t vocab, const RowSampling& sampling, float* bounds, float* room) {
  Part<T> part(row, 0, vocab, Stream(0, 0, 0, 0), sampling.temperature, room);
  part.read();
  bounds[0] = part.top(), bounds[1] = -kInf;
  if (bounds[0] == -kInf) return part.status | kStatusNoFinite;
  if (sampling.filters(vocab)) bounds[1] = nucleus_cut(part, kept_of(part, sampling), sampling.top_p);
  return part.status;
}

// Of a group's logits, of which those that are kept are marked: fewer than a vector's are drawn one by one.
BEAGLE_FN void perturb_group(float (&z)[kGroup], uint64_t marks, float temperature, const Stream& stream, uint32_t group) {
  constexpr int kQuads = kGroup / 4, kFew = 3;
  alignas(64) float value[kGroup];
  const Group drawn(stream, group);
  if (__builtin_popcountll(marks) <= kFew) {
    for (int j = 0; j < kGroup; ++j) value[j] = -kInf;
    for (; marks; marks &= marks - 1) {
      const int j = __builtin_ctzll(marks);
      const uint32_t token = group * kGroup + uint32_t(j);
      value[j] = z[j] + temperature * drawn.noise(token, philox_word(stream, token));
    }
  } else {
    alignas(64) uint32_t quad[kQuads], x[4][kQuads], word[kGroup];
    for (int q = 0; q < kQuads; ++q) quad[q] = group * kQuads + uint32_t(q);
    philox(stream, quad, x);
    for (int q = 0; q < kQuads; ++q)
      for (int w = 0; w < 4; ++w) word[4 * q + w] = x[w][q];
    for (int j = 0; j < kGroup; ++j) value[j] = z[j] + temperature * -log_of(drawn.least + exponential(word[j]));
    const int holder = int(drawn.holder % kGroup);
    value[holder] = z[holder] + temperature * -log_of(drawn.least);
    for (int j = 0; j < kGroup; ++j) value[j] = marks >> j & 1 ? value[j] : -kInf;
  }
  __builtin_memcpy(z, value, sizeof(value));
}

// Tokens [begin, end) of a row, which begin at a group, into `values`.
template <class T>
BEAGLE_OWN void perturb_part(const T* row, int64_t begin, int64_t end, const RowSampling& sampling, const Stream& stream,
                             const float* bounds, float* values) {
  Kept kept(sampling, bounds[0]);
  kept.kth = bounds[1];
  alignas(64) float z[kGroup];
  for (int64_t i = begin; i < end; i += kGroup) {
    load_tile(row, i, end, z);
    if (sampling.noisy()) {
      uint64_t marks = 0;
      for (int v = 0; v < kGroup; v += kLanes) {
        const Reals x = lanes_at(z + v);
        const Marks keeps = (x >= kept.kth) & ((x - kept.top) * kept.scale >= kept.floor) & (x > -kInf);
        marks |= uint64_t(bits_of(keeps)) << v;
      }
      perturb_group(z, marks, sampling.temperature, stream, uint32_t(i / kGroup));
    }
    __builtin_memcpy(values + i, z, size_t(least<int64_t>(end - i, kGroup)) * sizeof(float));
  }
}

}  // namespace beagle::cpu
