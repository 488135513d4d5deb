// A draft's candidates: every token's perturbed value, its log-sum-exp, and the values worth keeping.
#pragma once

#include "sampling.h"

namespace beagle {

// Running log-sum-exp: the largest value and the sum of exp(value - largest).
struct LogSum {
  float top = -kInf;
  double sum = 0.0;
  BEAGLE_FN void add(float other_top, double other_sum) {
    if (other_top == -kInf) return;
    if (other_top > top) {
      sum *= top > -kInf ? double(exp_of(top - other_top)) : 0.0;
      top = other_top;
    }
    sum += other_sum * double(exp_of(other_top - top));
  }
  BEAGLE_FN float value() const { return top + log_of(float(sum)); }
};

// z + T g, less 2 T below the cut, of N tokens from i on; returns false for a tile that is all -inf.
template <int N>
BEAGLE_FN void perturb_tile(float (&z)[N], int64_t i, int64_t end, const RowSampling& sampling, float cut, const Stream& stream,
                            const int64_t* token_ids) {
  if (!sampling.noisy()) return;
  alignas(64) uint32_t word[N];
  if (token_ids) {
    for (int j = 0; j < N; ++j) word[j] = i + j < end ? philox_word(stream, uint32_t(token_ids[i + j])) : 0;
  } else {
    uint32_t x[4][N / 4];
    philox<N / 4>(stream, uint32_t(i / 4), x);
    BEAGLE_UNROLL
    for (int j = 0; j < N; ++j) word[j] = x[j % 4][j / 4];
  }
  const float t = sampling.temperature;
  BEAGLE_UNROLL
  for (int j = 0; j < N; ++j) {
    const float value = z[j] + t * gumbel(word[j]);
    z[j] = z[j] >= cut ? value : value - 2.0f * t;
  }
}

template <int N>
BEAGLE_FN float tile_sum(const float (&value)[N], float top) {
  alignas(64) float part[N];
  BEAGLE_UNROLL
  for (int j = 0; j < N; ++j) part[j] = exp_of(value[j] - top);
  return lane_sum(part);
}

// The largest logit of a row and the filters' cut, -inf where nothing filters.
template <class Team, class T>
BEAGLE_FN float penalty_cut(Team& team, const T* row, int64_t vocab, const RowSampling& sampling, Scratch& scratch) {
  if (!sampling.filters(vocab)) return -kInf;
  int32_t ignored = 0;
  const uint64_t top = top_key(team, row, 0, vocab, ignored);
  return top == 0 ? -kInf : filter_cut(team, row, vocab, sampling, key_value(top), scratch);
}

}  // namespace beagle
