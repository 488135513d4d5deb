// The k best perturbed logits of a row by one block, from what its groups of 64 columns may reach.
#pragma once

#include "search.cuh"

namespace beagle::cuda {

// Full ids of a row's columns, where its vocabulary is a reduced one.
struct Columns {
  const int64_t* ids;  // ascending, or null
  int32_t count;

  __device__ __forceinline__ uint32_t id(int32_t column) const { return uint32_t(ids ? ids[column] : column); }
  // At least the largest noise of the columns of a group.
  __device__ __forceinline__ float largest_noise(const Stream& stream, int32_t group) const {
    constexpr float kAtMost = 28.0f;
    constexpr int64_t kMostGroups = 1024;
    const int32_t begin = group * kGroup, end = least(begin + kGroup, count);
    if (begin >= end) return 0.0f;
    const int64_t first = ids[begin] / kGroup, last = ids[end - 1] / kGroup;
    if (first < 0 || last < first || last - first > kMostGroups) return kAtMost;
    float largest = -kInf;
    for (int64_t pair = first / 2; pair <= last / 2; ++pair) {
      float noise[2];
      pair_noise(stream, uint32_t(pair), noise);
      if (2 * pair >= first) largest = most(largest, noise[0]);
      if (2 * pair + 1 <= last) largest = most(largest, noise[1]);
    }
    return largest;
  }
};

constexpr int kListed = 2048;
static_assert(kListed >= kMaxK + kRowWarps * kGroup);

// The best keys so far, in no order but after sort().
struct List {
  uint64_t keys[kListed];
  int32_t count;

  // The largest first; all threads call it.
  __device__ void sort() {
    int32_t padded = 2;
    while (padded < count) padded *= 2;
    for (int32_t i = count + int32_t(threadIdx.x); i < padded; i += kRowThreads) keys[i] = 0;
    for (int32_t size = 2; size <= padded; size *= 2) {
      for (int32_t stride = size / 2; stride > 0; stride /= 2) {
        __syncthreads();
        for (int32_t i = int32_t(threadIdx.x); i < padded / 2; i += kRowThreads) {
          const int32_t a = 2 * i - (i & (stride - 1)), b = a + stride;
          const uint64_t x = keys[a], y = keys[b];
          if ((x < y) == ((a & size) == 0)) keys[a] = y, keys[b] = x;
        }
      }
    }
    __syncthreads();
  }
};

// The values z + T g of a group's columns 2 lane and 2 lane + 1, less 2 T where `kept` does not take z; by a warp.
template <class T, class Keeps>
__device__ __forceinline__ void perturbed(const Row<T>& row, const Columns& columns, const Stream& stream,
                                          float temperature, const Keeps& keeps, int32_t group, float (&value)[2]) {
  const int32_t column = group * kGroup + 2 * int32_t(threadIdx.x % 32);
  BEAGLE_UNROLL
  for (int i = 0; i < 2; ++i) {
    const float z = tidy(row.at(column + i));
    value[i] = z;
    if (!(temperature > 0.0f) || z == -kInf) continue;
    const float spread = temperature * token_noise(stream, columns.id(column + i));
    value[i] = z + spread;
    if (!keeps(z)) value[i] -= 2.0f * temperature;
  }
}

// Lists the k best keys of the row, and some others, sorted. values(u, value): of group u, two a lane.
template <class Values>
__device__ void list_best(RowBlock& team, const Groups& groups, int32_t k, float temperature, Room& room, List& list,
                          const Values& values) {
  float low = -kInf;
  if (k <= groups.count) {
    const CountItem<float> bounds{groups.bounds, groups.count};
    low = unorder(threshold(team, groups.count, bounds, uint64_t(k), room.scratch));
  }
  if (team.rank() == 0) list.count = 0, room.best = 0;
  team.sync();
  if (temperature > 0.0f && low > -kInf) {
    // the least of k groups' best values is at most the k-th best value
    const float highest = low;
    each_group(groups.count, [&](int32_t u) { return groups.bounds[u] >= highest; }, [&](int32_t u) {
      float value[2];
      values(u, value);
      const uint32_t best = __reduce_max_sync(~0u, most(order(value[0]), order(value[1])));
      if (threadIdx.x % 32 == 0) atomicMax(&room.best, static_cast<unsigned long long>(~best));
    });
    team.sync();
    low = unorder(~uint32_t(room.best));
  }
  float reach = reach_of(low, most(temperature, 0.0f));
  int32_t base = team.rank() / 32 * 32 - kRowThreads;
  uint32_t left = 0;
  while (true) {
    while (left == 0 && base + kRowThreads < groups.count) {
      base += kRowThreads;
      const int32_t u = base + team.rank() % 32;
      left = __ballot_sync(~0u, u < groups.count && groups.bounds[u] > -kInf && !(groups.bounds[u] < reach));
    }
    if (!team.any(left != 0)) break;
    if (left) {
      const int32_t u = base + __ffs(int(left)) - 1;
      left &= left - 1;
      BEAGLE_COUNT(kLooks, threadIdx.x % 32 == 0);
      float value[2];
      values(u, value);
      const bool takes[2] = {value[0] > -kInf && value[0] >= low, value[1] > -kInf && value[1] >= low};
      int32_t at = reserve(&list.count, int32_t(takes[0]) + int32_t(takes[1]));
      for (int i = 0; i < 2; ++i)
        if (takes[i]) list.keys[at++] = make_key(value[i], uint32_t(u * kGroup + 2 * (team.rank() % 32) + i));
    }
    team.sync();
    const bool full = list.count > kListed - kRowWarps * kGroup;
    team.sync();
    if (!full) continue;
    list.sort();
    if (team.rank() == 0) list.count = k;
    low = key_value(list.keys[k - 1]), reach = reach_of(low, most(temperature, 0.0f));
    team.sync();
  }
  list.sort();
}

}  // namespace beagle::cuda
