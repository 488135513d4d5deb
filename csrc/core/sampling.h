// Perturbed argmax with filters over one row of logits.
#pragma once

#include <math.h>

#include "filters.h"
#include "logits.h"
#include "philox.h"

namespace beagle {

// Offers every token of [begin, end) whose score can beat `best` to `score(token, z, noise)`, which returns a key or 0.
// `bound(z)` is at least score - scale x noise for every token whose logit is at most z.
template <class Team, class T, class Bound, class Score>
BEAGLE_FN uint64_t noisy_argmax(Team& team, const T* row, int64_t begin, int64_t end, const Stream& stream, float scale,
                                uint64_t best, const Bound& bound, const Score& score) {
  constexpr int kTile = Team::kTile, kGroups = kTile / 4;
  alignas(64) float z[kTile];
  alignas(64) uint32_t x[4][kGroups];
  for (int64_t i = begin + team.rank() * kTile; i < end; i += int64_t(team.size()) * kTile) {
    load_tile(row, i, end, z);
    const float roof = bound(tile_max(z)), leader = best ? key_value(best) : -kInf;
    if (!(roof + scale * kGumbelMax >= leader)) continue;
    philox<kGroups>(stream, uint32_t(i / 4), x);
    // half a thousandth below the exact difference covers the rounding of z + T g at any magnitude that matters
    const float slack = 1e-6f * (fabsf(leader) + fabsf(roof));
    const uint32_t limit = leader > -kInf ? word_limit((leader - roof - slack) / scale - 5e-4f) : 0xffffffffu;
    uint32_t alive = 0;
    BEAGLE_UNROLL
    for (int w = 0; w < 4; ++w) {
#if !defined(__CUDACC__)
#pragma GCC ivdep
#endif
      for (int j = 0; j < kGroups; ++j) alive |= uint32_t(x[w][j] <= limit);
    }
    if (!alive) continue;
    for (int j = 0; j < kTile; ++j) {
      const uint32_t word = x[j % 4][j / 4];
      if (word <= limit && z[j] > -kInf) best = most(best, score(i + j, z[j], word));
    }
  }
  return team.max(best);
}

struct LinearBound {
  BEAGLE_FN float operator()(float z) const { return z; }
};

struct PerturbedScore {
  float temperature, cut;
  BEAGLE_FN uint64_t operator()(int64_t token, float z, uint32_t word) const {
    return z >= cut ? make_key(z + temperature * gumbel(word), uint32_t(token)) : 0;
  }
};

// A row's part [begin, end) of choose_tokens: the best key, 0 if no token is above -inf.
template <class Team, class T>
BEAGLE_FN uint64_t choose(Team& team, const T* row, int64_t begin, int64_t end, const RowSampling& sampling, float cut,
                          const Stream& stream, int32_t& status) {
  const uint64_t top = top_key(team, row, begin, end, status);
  if (!sampling.noisy() || top == 0) return top;
  const PerturbedScore score{sampling.temperature, cut};
  const uint64_t start = score(key_index(top), key_value(top), philox_word(stream, key_index(top)));
  return noisy_argmax(team, row, begin, end, stream, sampling.temperature, start, LinearBound{}, score);
}

// Chunk `chunk` of `chunks` of a row. A row with filters needs its cut before anything else, so chunk 0 takes it whole.
template <class Team, class T>
BEAGLE_FN uint64_t choose_chunk(Team& team, const T* row, int64_t vocab, int64_t chunk, int64_t chunks,
                                const RowSampling& sampling, const Stream& stream, int32_t& status, Scratch& scratch) {
  const bool filters = sampling.filters(vocab);
  if (filters && chunk > 0) return 0;
  const int64_t tokens = filters ? vocab : ((vocab + chunks - 1) / chunks + 63) / 64 * 64;
  const int64_t begin = chunk * tokens, end = least(begin + tokens, vocab);
  if (begin >= end) return 0;
  float cut = -kInf;
  if (filters) {
    int32_t ignored = 0;
    const uint64_t top = top_key(team, row, 0, vocab, ignored);
    if (top != 0) cut = filter_cut(team, row, vocab, sampling, key_value(top), scratch);
  }
  return choose(team, row, begin, end, sampling, cut, stream, status);
}

// The row's token from its chunks' keys; status gains their flags.
BEAGLE_FN int64_t finish_choice(const uint64_t* keys, const int32_t* flags, int64_t chunks, int32_t& status) {
  uint64_t best = 0;
  for (int64_t c = 0; c < chunks; ++c) best = most(best, keys[c]), status |= flags[c];
  if (best == 0) status |= kStatusNoFinite;
  return best == 0 ? 0 : int64_t(key_index(best));
}

}  // namespace beagle
