// Perturbed choices of a row by one block, from what its groups may reach: the groups with the highest bounds first, so
// that nearly all tokens need no noise.
#pragma once

#include "../core/filters.h"
#include "scan.cuh"

namespace beagle::cuda {

// Logits whose mass above one pass sums: the noisy choice under top-p is sought among the rising logits z_1 < z_2 < ...
// of the best token, the best above z_1, the best above z_2, ...: whatever top-p keeps, its choice is one of them.
constexpr int kRungs = 4;

// of two blocks so large each thread has the 96 registers that the sums of top-p take
constexpr int kRowThreads = 320, kRowWarps = kRowThreads / 32;
using RowBlock = BlockOf<kRowThreads>;

constexpr int kSurvivors = 2048;

// What the block of a row shares.
struct Room {
  Scratch scratch;
  float survivors[kSurvivors];
  unsigned long long best;
  int32_t count;
  // of the choice under top-p
  uint64_t keys[kRungs], sums[kRungs + 1];
  float rungs[kRungs];
};

// The best key that `score(token, z, noise)` gives a token of a group, by a warp; 0 if there is none.
template <class T, class Score>
__device__ __forceinline__ uint64_t look(const Row<T>& row, const Stream& stream, uint32_t group, const Score& score) {
  const uint32_t lane = threadIdx.x % 32, token = group * kGroup + 2 * lane;
  const float z[2] = {tidy(row.at(int32_t(token))), tidy(row.at(int32_t(token + 1)))};
  const Words words = philox(stream, token / 4);
  const Group drawn(stream, group);
  uint64_t best = 0;
  BEAGLE_UNROLL
  for (uint32_t i = 0; i < 2; ++i) {
    const uint32_t word = lane & 1 ? words.x[2 + i] : words.x[i];
    if (z[i] > -kInf) best = most(best, score(token + i, z[i], drawn.noise(token + i, word)));
  }
  return warp_max(best);
}

// The thread's group with the highest bound below `last`, of those that count: a key.
template <class Counts>
__device__ __forceinline__ uint64_t next_group(const Groups& groups, uint64_t last, const Counts& counts) {
  uint64_t next = 0;
  for (int32_t u = int32_t(threadIdx.x); u < groups.count; u += kRowThreads) {
    const float bound = groups.bounds[u];
    const uint64_t key = bound > -kInf && counts(groups.tops[u]) ? make_key(bound, uint32_t(u)) : 0;
    if (key < last) next = most(next, key);
  }
  return next;
}

// The best of what `look(group)` finds in the groups that count, by their largest logit. Every warp searches groups of
// its own until their bounds cannot reach the best of all.
template <class Counts, class Look>
__device__ uint64_t search(Room& room, const Groups& groups, float temperature, const Counts& counts,
                           const Look& look) {
  __syncthreads();
  if (threadIdx.x == 0) room.best = 0;
  __syncthreads();
  uint64_t mine = next_group(groups, ~uint64_t(0), counts), found = 0;
  while (true) {
    const uint64_t next = warp_max(mine);
    uint64_t leader = 0;
    if (threadIdx.x % 32 == 0) leader = atomicMax(&room.best, static_cast<unsigned long long>(found));
    leader = most(__shfl_sync(~0u, leader, 0), found);
    if (next == 0 || (leader != 0 && key_value(next) < reach_of(key_value(leader), temperature))) break;
    BEAGLE_COUNT(kLooks, threadIdx.x % 32 == 0);
    found = look(key_index(next));
    if (mine == next) mine = next_group(groups, next, counts);
  }
  __syncthreads();
  return room.best;
}

// Calls body(u) by a warp for every group that `wants` takes, of the block's.
template <class Wants, class Body>
__device__ __forceinline__ void each_group(int32_t count, const Wants& wants, const Body& body) {
  for (int32_t base = int32_t(threadIdx.x / 32 * 32); base < count; base += kRowThreads) {
    const int32_t u = base + int32_t(threadIdx.x % 32);
    uint32_t left = __ballot_sync(~0u, u < count && wants(u));
    for (; left; left &= left - 1) body(base + __ffs(int(left)) - 1);
  }
}

// Places for each lane's `wanted` in a list that grows by `count`: the first of the lane's.
__device__ __forceinline__ int32_t reserve(int32_t* count, int32_t wanted) {
  int32_t before = wanted, base = 0;
  for (int s = 1; s < 32; s *= 2) {
    const int32_t left = __shfl_up_sync(~0u, before, s);
    if (int(threadIdx.x % 32) >= s) before += left;
  }
  if (threadIdx.x % 32 == 31) base = atomicAdd(count, before);
  return __shfl_sync(~0u, base, 31) + before - wanted;
}

// The k-th largest logit of a row, from the groups whose maximum reaches the k-th largest maximum.
template <class T>
__device__ float kth_logit(RowBlock& team, const Row<T>& row, const Groups& groups, int32_t k, Room& room) {
  float low = -kInf;
  if (k <= groups.count) {
    const CountItem<float> tops{groups.tops, groups.count};
    low = unorder(threshold(team, groups.count, tops, uint64_t(k), room.scratch));
  }
  if (low > -kInf) {
    if (team.rank() == 0) room.count = 0;
    team.sync();
    each_group(groups.count, [&](int32_t u) { return groups.tops[u] >= low; }, [&](int32_t u) {
      const int32_t token = u * kGroup + int32_t(threadIdx.x % 32);
      const float z[2] = {tidy(row.at(token)), tidy(row.at(token + 32))};
      int32_t at = reserve(&room.count, int32_t(z[0] >= low) + int32_t(z[1] >= low));
      for (const float x : z)
        if (x >= low && at < kSurvivors) room.survivors[at++] = x;
    });
    team.sync();
    const int32_t found = room.count;
    if (found >= k && found <= kSurvivors) {
      return unorder(threshold(team, found, CountItem<float>{room.survivors, found}, uint64_t(k), room.scratch));
    }
  }
  return unorder(threshold(team, row.vocab, CountItem<T>{row.logits, row.vocab}, uint64_t(k), room.scratch));
}

}  // namespace beagle::cuda
