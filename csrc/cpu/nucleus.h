// The noisy choice of a row that is filtered, in two reads of its logits: maxima, then the sums of top-p.
#pragma once

#include "search.h"

namespace beagle::cpu {

// The k-th largest of values, which lose their order; and values sorted, the largest first. Not compiled for an
// instruction set.
float kth_largest(float* values, int64_t count, int64_t k);
void sort_down(float* values, int64_t count);

// The logits above `low` and up to `high`, into part.survivors; how many, or -1 if they are more than `room`.
template <class T>
BEAGLE_OWN int64_t survivors(const Part<T>& part, float low, float high, int64_t room) {
  int64_t found = 0;
  alignas(64) float z[kGroup];
  for (int64_t u = 0; u < part.count; ++u) {
    if (!(part.tops[u] > low)) continue;
    load_tile(part.row, part.first(u), part.end, z);
    for_marked(z, [&](const Reals& x) BEAGLE_INLINED { return (x > low) & (x <= high); },
               [&](int j) BEAGLE_INLINED { part.survivors[found++] = z[j]; });
    if (found > room) return -1;
  }
  return found;
}

// The k-th largest maximum of the groups, of at least k: at most the k-th largest logit.
template <class T>
BEAGLE_FN float kth_top(const Part<T>& part, int64_t k) {
  for (int64_t u = 0; u < part.count; ++u) part.bound[u] = part.tops[u];
  return kth_largest(part.bound, part.count, k);
}

// The k-th largest logit of the whole row, from the groups whose maximum reaches the k-th largest maximum.
template <class T>
BEAGLE_OWN float kth_logit(const Part<T>& part, int64_t k) {
  if (k <= part.count) {
    const float below = __builtin_nextafterf(kth_top(part, k), -kInf);
    const int64_t found = survivors(part, below, kInf, kSurvivors - kGroup);
    if (found >= k) return kth_largest(part.survivors, found, k);
  }
  Thread team;
  Scratch scratch;
  return unorder(threshold(team, part.end, CountItem<T>{part.row, part.end}, uint64_t(k), scratch));
}

// What top-k and min-p keep of the row.
template <class T>
BEAGLE_FN Kept kept_of(const Part<T>& part, const RowSampling& sampling) {
  Kept kept(sampling, part.top());
  if (sampling.top_k > 0 && sampling.top_k < part.end && kept.top > -kInf) kept.kth = kth_logit(part, sampling.top_k);
  return kept;
}

using Counts = uint32_t __attribute__((vector_size(4 * kLanes), may_alias));
using Pairs = uint64_t __attribute__((vector_size(4 * kLanes), may_alias));
constexpr int kVectors = kGroup / kLanes;

struct Sums {
  Pairs total = Pairs{}, above = Pairs{};
  static BEAGLE_FN uint64_t of(const Pairs& pairs) {
    uint64_t sum = 0;
    for (int l = 0; l < kLanes / 2; ++l) sum += pairs[l];
    return sum;
  }
  // Adds 64 logits' masses to the total, and to `above` those of logits above `rung`; lanes(v, z) gives the v-th 16.
  template <bool kTopK, bool kAbove, class Load>
  BEAGLE_FN void add(const Kept& kept, float rung, const Load& lanes) {
    // a mass is below 2^30, so four fit in 32 bits; pairs of lanes then become 64
    const auto halves = [](const Counts& x) BEAGLE_INLINED { return (Pairs(x) & 0xffffffffu) + (Pairs(x) >> 32); };
    Counts all = Counts{}, over = Counts{};
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      Reals z;
      lanes(v, z);
      Marks whole;
      const Reals d = at_least(z - kept.top, kept.far), p = exp2_parts(d, Reals{} + kept.scale, 0x1p30f, whole);
      Counts mass = Counts(__builtin_convertvector(p, Marks)) >> Counts(-whole);
      if (kTopK) mass &= Counts(z >= kept.kth);
      all += mass;
      if (kAbove) over += mass & Counts(z > rung);
    }
    total += halves(all), above += halves(over);
  }
  // The same of every group that `takes(its largest)`.
  template <bool kTopK, bool kAbove, class T, class Takes>
  BEAGLE_FN void add_those(const Part<T>& part, const Kept& kept, float rung, const Takes& takes) {
    // an infinite logit has to be tidied
    const int64_t whole = kept.top < kMax ? part.end / kGroup : 0;
    for (int64_t u = 0; u < whole; ++u) {
      if (!takes(part.tops[u])) continue;
      BEAGLE_COUNT(kLogits, kGroup);
      const T* row = part.row + u * kGroup;
      add<kTopK, kAbove>(kept, rung, [&](int v, Reals& z) BEAGLE_INLINED { load_lanes(row + v * kLanes, z); });
    }
    for (int64_t u = whole; u < part.count; ++u) {
      if (!takes(part.tops[u])) continue;
      alignas(64) float tile[kGroup];
      load_tile(part.row, part.first(u), part.end, tile);
      add<kTopK, kAbove>(kept, rung, [&](int v, Reals& z) BEAGLE_INLINED { z = lanes_at(tile + v * kLanes); });
    }
  }
};

// Adds the groups whose largest logit lies in [low, high).
template <class T>
BEAGLE_OWN void add_groups(Sums& sums, const Part<T>& part, const Kept& kept, float rung, float low, float high) {
  const auto takes = [&](float top) BEAGLE_INLINED { return top >= low && top < high; };
  Sums own = sums;
  if (kept.kth > -kInf) own.template add_those<true, true>(part, kept, rung, takes);
  else if (rung < kInf) own.template add_those<false, true>(part, kept, rung, takes);
  else own.template add_those<false, false>(part, kept, rung, takes);
  sums = own;
}

// Key of the best z + T g among what the filters keep of a row, 0 if there is none; part is the whole of it.
//
// Whatever top-p keeps, its choice is on this chain: the best of all, the best of those with a larger logit, the best of
// those with a still larger one, ... The first that top-p keeps is it; to know that it is kept, the mass above it and a part
// of the whole mass may be enough.
template <class T>
BEAGLE_OWN uint64_t choose_filtered(Part<T>& part, const RowSampling& sampling) {
  const Kept kept = kept_of(part, sampling);
  const bool nucleus = sampling.top_p < 1.0f;
  Sums whole;
  float logit = -kInf, seen = kInf;  // whole has the groups from `seen` on
  while (true) {
    const uint64_t key = choose_above(part, logit, kept.kth, kept, logit);
    if (key == 0 || !nucleus) return key;
    Sums sums;
    add_groups(sums, part, kept, logit, logit, kInf);
    const uint64_t above = Sums::of(sums.above);
    if (seen > logit) whole = sums, seen = logit;
    while (above >= nucleus_limit(sampling.top_p, Sums::of(whole.total)) && seen > kept.top + kept.far) {
      const float next = most(seen - 8.0f / kept.scale, kept.top + kept.far);
      // at once where the steps are below the logits' resolution
      const float low = next < seen ? next : kept.top + kept.far;
      add_groups(whole, part, kept, kInf, low, seen), seen = low;
    }
    if (above < nucleus_limit(sampling.top_p, Sums::of(whole.total))) return key;
  }
}

// The mass of the whole row.
template <class T>
BEAGLE_FN uint64_t total_mass(const Part<T>& part, const Kept& kept) {
  Sums sums;
  add_groups(sums, part, kept, kInf, kept.top + kept.far, kInf);
  return Sums::of(sums.total);
}

// The least of `count` logits that have less mass above them than the limit; `above`: what lies above all.
BEAGLE_FN float walk_down(float* logits, int64_t count, const Kept& kept, uint64_t limit, uint64_t above) {
  sort_down(logits, count);
  float cut = kInf;
  uint64_t equal = 0;  // mass of those that are equal to the cut
  for (int64_t i = 0; i < count; ++i) {
    if (logits[i] != cut) above += equal, equal = 0;
    if (above >= limit) break;
    cut = logits[i], equal += kept.mass(cut);
  }
  return cut;
}

// The least logit that top-k and top-p keep of a row: halving the range it may lie in until that holds few logits.
template <class T>
BEAGLE_OWN float nucleus_cut(const Part<T>& part, const Kept& kept, float top_p) {
  if (!(top_p < 1.0f) || kept.top == -kInf) return kept.kth;
  constexpr int kHalvings = 4;
  constexpr int64_t kFew = 512;
  const uint64_t limit = nucleus_limit(top_p, total_mass(part, kept));
  // the cut lies above `low` and up to `high`, over which there is the mass `above`
  float low = kept.top + kept.far, high = kept.top;
  uint64_t above = 0;
  for (int halvings = 0;; ++halvings) {
    const float middle = low + 0.5f * (high - low);
    if (!(middle > low && middle < high)) return high;
    if (halvings >= kHalvings) {
      const int64_t found = survivors(part, low, high, kFew);
      if (found >= 0) return walk_down(part.survivors, found, kept, limit, above);
    }
    Sums sums;
    add_groups(sums, part, kept, middle, middle, kInf);
    const uint64_t over = Sums::of(sums.above);
    if (over < limit) high = middle, above = over;
    else low = middle;
  }
}

}  // namespace beagle::cpu
