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

// Calls body(z, top) for the row's logits, four at a time, of the groups whose largest logit, `top`, `wants` takes; for
// those of one of `splits` blocks.
template <class T, class Wants, class Body>
__device__ __forceinline__ void each_four(const Row<T>& row, const Groups& groups, int32_t split, int32_t splits,
                                          const Wants& wants, const Body& body) {
  constexpr int kPer = Row<T>::kPer, kBatch = 4;
  constexpr int32_t kStep = kBatch * kRowThreads;
  for (int32_t j = split * kStep + int32_t(threadIdx.x); j < row.last; j += splits * kStep) {
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
  if (odd >= row.vocab || split > 0) return;
  const float z[4] = {tidy(row.at(odd)), -kInf, -kInf, -kInf};
  if (wants(z[0])) body(z, z[0]);
}

// Into the room: what is above each of its rungs, and the total. The blocks of a row add up theirs; false for all but
// the last to come.
template <class T>
__device__ bool sum_masses(RowBlock& team, const Row<T>& row, const Groups& groups, const Kept& kept, int32_t splits,
                           Room& room) {
  Sums sums;
  each_four(row, groups, splits > 1 ? int32_t(blockIdx.x) : 0, splits, [&](float top) { return !kept.massless(top); },
            [&](const float* z, float top) { sums.add(z, kept, room.rungs, top > room.rungs[0]); });
  const uint64_t total = team.sum(sums.total);
  if (team.rank() == 0) room.sums[kRungs] = total;
  BEAGLE_UNROLL
  for (int r = 0; r < kRungs; ++r) {
    const uint64_t above = team.sum(sums.above[r]);
    if (team.rank() == 0) room.sums[r] = above;
  }
  team.sync();
  if (splits == 1) return true;
  if (team.rank() <= kRungs) {
    atomicAdd(&groups.words[team.rank()], static_cast<unsigned long long>(room.sums[team.rank()]));
    fence();
  }
  team.sync();
  bool last = false;
  if (team.rank() == 0) last = int32_t(atomicAdd(&groups.words[kRungs + 1], 1ull)) + 1 == splits;
  if (!team.any(last)) return false;
  fence();
  if (team.rank() <= kRungs) room.sums[team.rank()] = atomicAdd(&groups.words[team.rank()], 0ull);
  team.sync();
  return true;
}

// A row's masses, for a threshold over all its tokens.
template <class T>
struct MassItem : CountItem<T> {
  Kept kept;
  BEAGLE_FN MassItem(const T* row, int64_t count, const Kept& kept) : CountItem<T>{row, count}, kept(kept) {}
  template <int N>
  BEAGLE_FN void weigh(int64_t i, const uint32_t (&key)[N], uint32_t (&weight)[N]) const {
    const int32_t room = int32_t(least<int64_t>(this->count - i, N));
    BEAGLE_UNROLL
    for (int j = 0; j < N; ++j) weight[j] = kept.mass(unorder(key[j])) & -uint32_t(j < room);
  }
  template <class Team>
  BEAGLE_FN uint64_t total(Team& team) const {
    constexpr int kTile = Team::kTile;
    alignas(64) uint32_t key[kTile], weight[kTile];
    uint64_t sum = 0;
    for (int64_t i = team.rank() * kTile; i < this->count; i += int64_t(team.size()) * kTile) {
      this->load(i, key);
      weigh(i, key, weight);
      BEAGLE_UNROLL
      for (int j = 0; j < kTile; ++j) sum += weight[j];
    }
    return team.sum(sum);
  }
};

// The least logit that top-k and then top-p keep.
template <class T>
__device__ float nucleus_cut(RowBlock& team, const Row<T>& row, const Kept& kept, float top_p, Room& room) {
  if (!(top_p < 1.0f) || kept.top == -kInf) return kept.kth;
  const MassItem<T> mass(row.logits, row.vocab, kept);
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

// Key of the best z + T g among what the filters keep of a row, 0 if there is none. By one or more blocks, which choose
// alike and share the sums of top-p; false for all but one of them.
template <class T>
__device__ bool choose_noisy(RowBlock& team, const Row<T>& row, const RowSampling& sampling, const Stream& stream,
                             const Groups& groups, Room& room, uint64_t& key) {
  const bool nucleus = sampling.top_p < 1.0f;
  bool mine = blockIdx.x == 0;  // whether this block is the one that answers
  key = 0;
  if (!nucleus && !mine) return false;
  const Kept kept = kept_of(team, row, groups, sampling, room);
  float logit = -kInf;
  for (int32_t splits = int32_t(gridDim.x);; splits = 1) {
    int rungs = 0;
    // the chain ends with the largest logit, above which there is no mass
    while (rungs < kRungs && logit < kept.top) {
      const float low = logit;
      const float t = sampling.temperature;
      key = search(room, groups, t, [&](float top) { return top > low && kept(top); }, [&](uint32_t group) {
        return look(row, stream, group, [&](uint32_t token, float z, float noise) {
          return z > low && kept(z) ? make_key(z + t * noise, token) : 0;
        });
      });
      if (key == 0 || !nucleus) return mine;
      const bool began = logit > -kInf;
      logit = tidy(row.at(int32_t(key_index(key))));
      if (!began && logit == kept.top) return mine;
      if (team.rank() == 0) room.keys[rungs] = key, room.rungs[rungs] = logit;
      ++rungs;
    }
    if (rungs == 0) return mine;
    if (team.rank() < kRungs && team.rank() >= rungs) room.rungs[team.rank()] = kInf;
    team.sync();
    if (!sum_masses(team, row, groups, kept, splits, room)) return false;
    mine = true;
    const uint64_t limit = nucleus_limit(sampling.top_p, room.sums[kRungs]);
    for (int r = 0; r < rungs; ++r) {
      key = room.keys[r];
      if (room.sums[r] < limit) return true;
    }
    if (rungs < kRungs) return true;
  }
}

// Blocks for each of so many rows, for few of which the sums of top-p are long.
inline unsigned row_splits(int64_t rows) {
  constexpr int64_t kEnough = 256, kMost = 16;
  return unsigned(most<int64_t>(least(kEnough / most<int64_t>(rows, 1), kMost), 1));
}

}  // namespace beagle::cuda
