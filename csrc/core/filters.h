// What top-k, top-p and min-p ask of a logit, and a threshold over many by radix descent.
#pragma once

#include <math.h>

#include "logits.h"
#include "ops.h"
#include "philox.h"

namespace beagle {

// What a row's filters ask of a logit that does not depend on the other logits, once the k-th largest is known.
struct Kept {
  float top, scale;   // the row's largest logit; log2(e) / T
  float kth, floor;   // the k-th largest logit, or -inf; log2(min_p), or -inf
  float far;          // what lies as far below the largest has no mass

  BEAGLE_FN Kept(const RowSampling& sampling, float top)
      : top(top), scale(least(1.0f / sampling.temperature * kLog2E, kMax)), kth(-kInf),
        floor(sampling.min_p > 0.0f ? float(log2(double(sampling.min_p))) : -kInf),
        far(-31.0f / scale) {}
  // log2 of its probability over the largest one
  BEAGLE_FN float log_ratio(float z) const { return (z - top) * scale; }
  BEAGLE_FN bool operator()(float z) const { return z >= kth && log_ratio(z) >= floor; }
  // What it adds to the sums of top-p, which takes what top-k left.
  BEAGLE_FN uint32_t mass(float z) const { return exp2_fixed(most(z - top, far), scale) & -uint32_t(z >= kth); }
  // Whether no logit up to z has any mass.
  BEAGLE_FN bool massless(float z) const { return z < kth || log_ratio(z) < -30.5f; }
};

// top_p keeps a logit if the mass strictly above it is below this.
BEAGLE_FN uint64_t nucleus_limit(float top_p, uint64_t total) {
  return most<uint64_t>(uint64_t(ceil(double(top_p) * double(total))), 1);
}

// Scratch of threshold(): 2^kRadix bins, then what the finder tells the team.
constexpr int kRadix = 11;
constexpr int kBins = 1 << kRadix;
struct Scratch { uint64_t bins[kBins + 2]; };

// The largest bin whose sum from the top reaches `need`; `above` gains the sum of the bins over it.
template <class Team>
BEAGLE_FN uint32_t find_from_top(Team& team, uint64_t* bins, int count, uint64_t need, uint64_t& above) {
  const int per = (count + team.size() - 1) / team.size();
  const int first = count - 1 - team.rank() * per, last = first - per < -1 ? -1 : first - per;
  uint64_t own = 0;
  for (int b = first; b > last; --b) own += bins[b];
  uint64_t sum = team.scan(own);
  if (sum < need && need <= sum + own) {
    int b = first;
    while (sum + bins[b] < need) sum += bins[b--];
    bins[count] = uint64_t(b), bins[count + 1] = sum;
  }
  team.sync();
  above += bins[count + 1];
  const uint32_t found = uint32_t(bins[count]);
  team.sync();
  return found;
}

// The least key t such that items with key > t weigh less than limit, by radix descent; limit is 1 to the total weight.
// item.load(i, key) gives the keys of a tile, item.weigh(i, key, weight) their weights, 0 beyond the end.
template <class Team, class Item>
BEAGLE_FN uint32_t threshold(Team& team, int64_t n, const Item& item, uint64_t limit, Scratch& scratch) {
  constexpr int kTile = Team::kTile;
  alignas(64) uint32_t key[kTile], weight[kTile];
  // few items: clearing and searching bins would cost more than passes over them
  const int radix = n < 4096 ? 6 : kRadix;
  uint32_t prefix = 0;
  uint64_t above = 0;
  for (int shift = 32; shift > 0;) {
    const int bits = least(radix, shift), count = 1 << bits;
    // keys of the range found so far: their distance from its first is below its width
    const uint32_t first = shift < 32 ? prefix << shift : 0, width = shift < 32 ? (1u << shift) - 1 : ~0u;
    shift -= bits;
    for (int b = team.rank(); b < count; b += team.size()) scratch.bins[b] = 0;
    team.sync();
    for (int64_t i = team.rank() * kTile; i < n; i += int64_t(team.size()) * kTile) {
      item.load(i, key);
      uint32_t alive = 0;
      for (int j = 0; j < kTile; ++j) alive |= uint32_t(key[j] - first <= width);
      if (!alive) continue;
      item.weigh(i, key, weight);
      for (int j = 0; j < kTile; ++j) {
        if (key[j] - first <= width) team.add(&scratch.bins[(key[j] - first) >> shift], uint64_t(weight[j]));
      }
    }
    team.sync();
    prefix = prefix << bits | find_from_top(team, scratch.bins, count, limit - above, above);
  }
  return prefix;
}

template <class T>
struct CountItem {
  const T* row;
  int64_t count;
  template <int N>
  BEAGLE_FN void load(int64_t i, uint32_t (&key)[N]) const {
    alignas(64) float z[N];
    load_tile(row, i, count, z);
    BEAGLE_UNROLL
    for (int j = 0; j < N; ++j) key[j] = order(z[j]);
  }
  template <int N>
  BEAGLE_FN void weigh(int64_t i, const uint32_t (&)[N], uint32_t (&weight)[N]) const {
    BEAGLE_UNROLL
    for (int j = 0; j < N; ++j) weight[j] = i + j < count;
  }
};

}  // namespace beagle
