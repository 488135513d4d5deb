// The noisy choice of a row with or without filters by one block: under top-p one more read of its logits.
#pragma once

#include "search.cuh"

namespace beagle::cuda {

// The row's mass, then the mass strictly above each rung; rungs ascend.
struct Sums {
  uint64_t total = 0, above[kRungs] = {};

  // Four masses fit in 32 bits.
  __device__ __forceinline__ void add(const float* z, const Kept& kept, const float* rung, bool climbs) {
    uint32_t mass[4], sum = 0;
    BEAGLE_UNROLL
    for (int j = 0; j < 4; ++j) sum += mass[j] = kept.mass(z[j]);
    total += sum;
    if (!climbs) return;
    BEAGLE_UNROLL
    for (int r = 0; r < kRungs; ++r) {
      sum = 0;
      BEAGLE_UNROLL
      for (int j = 0; j < 4; ++j) sum += z[j] > rung[r] ? mass[j] : 0;
      above[r] += sum;
    }
  }
};

// Calls body(z, top) for the row's logits, four at a time, of the groups whose largest logit, `top`, `wants` takes.
template <class T, class Wants, class Body>
__device__ __forceinline__ void each_four(const Row<T>& row, const Groups& groups, const Wants& wants,
                                          const Body& body) {
  constexpr int kPer = Row<T>::kPer, kBatch = 4;
  for (int32_t j = int32_t(threadIdx.x); j < row.last; j += kBatch * kRowThreads) {
    float top[kBatch];
    BEAGLE_UNROLL
    for (int n = 0; n < kBatch; ++n) {
      const int32_t at = j + n * kRowThreads;
      top[n] = at >= row.first && at < row.last ? groups.tops[at / Row<T>::kLanes] : -kInf;
    }
    uint4 raw[kBatch];
    row.load(j, kRowThreads, raw, [&](int32_t at) { return wants(top[(at - j) / kRowThreads]); });
    BEAGLE_UNROLL
    for (int n = 0; n < kBatch; ++n) {
      if (!wants(top[n])) continue;
      float z[kPer];
      unpack<T>(raw[n], z);
      BEAGLE_UNROLL
      for (int i = 0; i < kPer; i += 4) body(z + i, top[n]);
    }
  }
  const int32_t odd = row.odd_token(int32_t(threadIdx.x));
  if (odd >= row.vocab) return;
  const float z[4] = {tidy(row.at(odd)), -kInf, -kInf, -kInf};
  if (wants(z[0])) body(z, z[0]);
}

// Into the room: the total, and what is above each of the room's rungs.
template <class T>
__device__ void sum_masses(RowBlock& team, const Row<T>& row, const Groups& groups, const Kept& kept, Room& room) {
  Sums sums;
  each_four(row, groups, [&](float top) { return !kept.massless(top); },
            [&](const float* z, float top) { sums.add(z, kept, room.rungs, top > room.rungs[0]); });
  const uint64_t total = team.sum(sums.total);
  if (team.rank() == 0) room.total = total;
  BEAGLE_UNROLL
  for (int r = 0; r < kRungs; ++r) {
    const uint64_t above = team.sum(sums.above[r]);
    if (team.rank() == 0) room.above[r] = above;
  }
  team.sync();
}

// The least logit that top-k and then top-p keep.
template <class T>
__device__ float nucleus_cut(RowBlock& team, const Row<T>& row, const Kept& kept, float top_p, Room& room) {
  if (!(top_p < 1.0f) || kept.top == -kInf) return kept.kth;
  const MassItem<T> mass(row.logits, row.vocab, kept.kth > -kInf ? order(kept.kth) : 0, kept);
  const uint64_t limit = nucleus_limit(top_p, mass.total(team));
  return most(kept.kth, unorder(threshold(team, row.vocab, mass, limit, room.scratch)));
}

// The row's largest logit and what top-k and min-p keep of it.
template <class T>
__device__ Kept kept_of(RowBlock& team, const Row<T>& row, const Groups& groups, const RowSampling& sampling,
                        Room& room) {
  float top = -kInf;
  for (int32_t u = team.rank(); u < groups.count; u += kRowThreads) top = most(top, groups.tops[u]);
  Kept kept(sampling, unorder(uint32_t(team.max(uint64_t(order(top))))));
  const bool cuts = sampling.top_k > 0 && sampling.top_k < row.vocab && kept.top > -kInf;
  if (cuts) kept.kth = kth_logit(team, row, groups, sampling.top_k, room);
  return kept;
}

// Key of the best z + T g among what the filters keep of a row, 0 if there is none.
template <class T>
__device__ uint64_t choose_noisy(RowBlock& team, const Row<T>& row, const RowSampling& sampling, const Stream& stream,
                                 const Groups& groups, Room& room) {
  const Kept kept = kept_of(team, row, groups, sampling, room);
  float logit = -kInf;
  while (true) {
    int rungs = 0;
    // the chain ends with the largest logit, above which there is no mass
    while (rungs < kRungs && logit < kept.top) {
      const float low = logit;
      const uint64_t key = search(room, groups, [&](float top) { return top > low && kept(top); }, [&](uint32_t group) {
        return look(row, stream, group, [&](uint32_t token, float z, float noise) {
          return z > low && kept(z) ? make_key(z + sampling.temperature * noise, token) : 0;
        });
      });
      if (key == 0 || !(sampling.top_p < 1.0f)) return key;
      logit = tidy(row.at(int32_t(key_index(key))));
      if (team.rank() == 0) room.keys[rungs] = key, room.rungs[rungs] = logit;
      ++rungs;
    }
    if (rungs == 0) return 0;
    if (team.rank() < kRungs && team.rank() >= rungs) room.rungs[team.rank()] = kInf;
    team.sync();
    sum_masses(team, row, groups, kept, room);
    const uint64_t limit = nucleus_limit(sampling.top_p, room.total);
    for (int r = 0; r < rungs; ++r)
      if (room.above[r] < limit) return room.keys[r];
    if (rungs < kRungs) return 0;
  }
}

}  // namespace beagle::cuda
