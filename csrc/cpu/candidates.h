// A draft's best tokens of one row: k keys, and the log-sum-exp that their scores are measured from.
#pragma once

#include "nucleus.h"

namespace beagle::cpu {

// The k largest keys offered so far, as a heap with the least of them first.
struct Best {
  uint64_t* keys;
  int32_t k, count;
  BEAGLE_FN float least_value() const { return count < k ? -kInf : key_value(keys[0]); }
  BEAGLE_FN void offer(uint64_t key) {
    int32_t at = count;
    if (count < k) {
      for (++count; at > 0 && keys[(at - 1) / 2] > key; at = (at - 1) / 2) keys[at] = keys[(at - 1) / 2];
    } else {
      if (key <= keys[0]) return;
      at = 0;
      for (int32_t child = 1; child < k; child = 2 * at + 1) {
        child += child + 1 < k && keys[child + 1] < keys[child];
        if (keys[child] >= key) break;
        keys[at] = keys[child], at = child;
      }
    }
    keys[at] = key;
  }
};

// Offers the values of group u, of the columns first on, that may be kept.
BEAGLE_FN void offer_all(const float (&value)[kGroup], int64_t first, Best& best) {
  for_lanes(value, best.least_value(), [&](int j) BEAGLE_INLINED { best.offer(make_key(value[j], uint32_t(first + j))); });
}

// Sum of exp(z - top) over a row whose largest logit is `top`.
template <class T>
BEAGLE_OWN double sum_of_exps(const Part<T>& part, float top) {
  // beyond e^-40 of the largest even a million logits change no bit
  constexpr float kFar = 40.0f;
  LaneSum sum;
  alignas(64) float z[kGroup];
  for (int64_t u = 0; u < part.count; ++u) {
    if (part.tops[u] < top - kFar) continue;
    load_finite(part.row, part.first(u), part.end, top, z);
    for (int v = 0; v < kGroup; v += kLanes) sum.add(exp2_of(at_least(lanes_at(z + v) - top, -86.0f), kLog2E));
  }
  return sum.total();
}

// The k best of a row at T = 0; returns its log-sum-exp.
template <class T>
BEAGLE_OWN float rank_greedy(const T* row, int64_t vocab, const Stream& stream, Best& best, float* room) {
  Part<T> part(row, 0, vocab, stream, 0.0f, room);
  part.read();
  const float top = part.top(), low = best.k < part.count ? kth_top(part, best.k) : -kInf;
  alignas(64) float z[kGroup];
  for (int64_t u = 0; u < part.count; ++u) {
    if (part.tops[u] < low || part.tops[u] == -kInf) continue;
    load_tile(row, part.first(u), vocab, z);
    offer_all(z, part.first(u), best);
  }
  return top == -kInf ? -kInf : top + log_of(float(sum_of_exps(part, top)));
}

// Columns of a row of a reduced vocabulary: noise belongs to the full ids, which ascend.
struct Columns {
  const int64_t* ids;
  int64_t count, groups;  // of columns; of full ids, 0 where they do not ascend from 0 to below 2^28
  BEAGLE_FN Columns(const int64_t* ids, int64_t count) : ids(ids), count(count), groups(groups_of(ids, count)) {}
  BEAGLE_FN static int64_t groups_of(const int64_t* ids, int64_t count) {
    const int64_t last = ids ? ids[count - 1] : -1;
    return last >= 0 && last < 1 << 28 ? last / kGroup + 1 : 0;
  }
  // A bound of the noise of columns [begin, begin + 64), from those of the groups they have a part in.
  BEAGLE_FN float bound_of(const float* noise, int64_t begin) const {
    constexpr float kAtMost = 28.0f;
    const int64_t first = ids[begin], last = ids[least(begin + kGroup, count) - 1];
    if (first < 0 || last < first || last / kGroup >= groups) return kAtMost;
    float largest = -kInf;
    for (int64_t u = first / kGroup; u <= last / kGroup; ++u) largest = most(largest, noise[u]);
    return largest;
  }
  // Calls offer(j, noise) for the columns of [begin, begin + 64) whose `value` may reach `least()`.
  template <class Least, class Offer>
  BEAGLE_FN void look_into(const float (&value)[kGroup], float scale, const Stream& stream, int64_t begin, const Least& least,
                           const Offer& offer) const {
    alignas(64) uint32_t quad[kGroup], x[4][kGroup], word[kGroup];
    alignas(64) float reach[kGroup];
    const int have = int(beagle::least<int64_t>(kGroup, count - begin));
    for (int j = 0; j < kGroup; ++j) quad[j] = uint32_t(ids[begin + beagle::least(j, have - 1)]) / 4;
    philox(stream, quad, x);
    for (int j = 0; j < kGroup; ++j) word[j] = j < have ? x[uint32_t(ids[begin + j]) % 4][j] : 0;
    for (int j = 0; j < kGroup; ++j) reach[j] = value[j] + token_bound(word[j]) * scale;
    for (int j = 0; j < have;) {
      const int64_t group = ids[begin + j] / kGroup;
      const Group drawn(stream, uint32_t(group));
      for (; j < have && ids[begin + j] / kGroup == group; ++j) {
        const bool holds = uint32_t(ids[begin + j]) == drawn.holder;
        if (holds || reach[j] >= least()) offer(j, drawn.noise(uint32_t(ids[begin + j]), word[j]));
      }
    }
  }
};

// Log of the sum of exp(value) over the kept and of exp(z), without noise, over the others.
template <class T>
BEAGLE_OWN float log_sum_of(const T* row, const Best& best, float top, double exps) {
  float roof = top;
  for (int32_t i = 0; i < best.count; ++i) roof = most(roof, key_value(best.keys[i]));
  double kept = 0.0;
  for (int32_t i = 0; i < best.count; ++i) {
    kept += double(exp_of(key_value(best.keys[i]) - roof));
    exps -= double(exp_of(tidy(to_float(row[key_index(best.keys[i])])) - top));
  }
  return roof + log_of(float(kept + most(exps, 0.0) * double(exp_of(top - roof))));
}

// The k best z + T g of a row, less 2 T where the filters would drop; returns their log-sum-exp and that of the others
// without noise.
template <class T>
BEAGLE_OWN float rank_noisy(const TopCandidates& op, const T* row, const RowSampling& sampling, const Stream& stream, Best& best,
                          float* room) {
  const float t = sampling.temperature;
  Part<T> part(row, 0, op.vocab, stream, t, room);
  if (op.token_ids) part.read();
  else part.read_and_draw();
  Kept kept(sampling, part.top());
  if (sampling.filters(op.vocab)) {
    kept = kept_of(part, sampling);
    kept.kth = nucleus_cut(part, kept, sampling.top_p);
  }
  const Columns columns(op.token_ids, op.vocab);
  if (op.token_ids) {
    float* noise = room + room_for(op.vocab);
    noise_bounds(stream, 0, columns.groups, noise);
    for (int64_t u = 0; u < part.count; ++u) part.noise[u] = columns.bound_of(noise, part.first(u));
    for (int64_t u = part.count; u < part.padded; ++u) part.noise[u] = 0.0f;
  }
  part.set_bounds(-kInf, -kInf);
  const auto least = [&]() BEAGLE_INLINED { return reach_of(best.least_value(), t); };
  search(part.frontier(), least, [&](int64_t u) BEAGLE_INLINED {
    alignas(64) float z[kGroup];
    load_group(row, part.first(u), part.end, z);
    const auto offer = [&](int j, float noise) BEAGLE_INLINED {
      const float x = tidy(z[j]), noisy = x + t * noise;
      if (x > -kInf) best.offer(make_key(kept(x) ? noisy : noisy - 2.0f * t, uint32_t(part.first(u) + j)));
    };
    if (op.token_ids) columns.look_into(z, t, stream, part.first(u), least, offer);
    else look_into(z, t, stream, uint32_t(u), part.noise[u], least, offer);
  });
  if (best.count == 0) return -kInf;
  const float top = part.top();
  return log_sum_of(row, best, top, sum_of_exps(part, top));
}

}  // namespace beagle::cpu
