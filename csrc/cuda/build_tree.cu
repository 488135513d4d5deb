#include "../core/tree.h"

#include "executor.h"
#include "team.cuh"

namespace beagle::cuda {

// The order of the limit-th largest of few scores, which stay in registers, or a lower one that no more scores reach:
// digits of eight bits are found by counting, a bin a thread. build_tree takes it in place of the radix descent.
__device__ static uint32_t rank_cut(Block& team, const float* scores, int32_t count, uint64_t limit, Scratch& scratch) {
  constexpr int kBits = 8, kEach = 8;
  static_assert(1 << kBits == kThreads);
  if (count > kThreads * kEach) return threshold(team, count, CountItem<float>{scores, count}, limit, scratch);
  __shared__ uint32_t bins[kThreads], found, over, within;
  uint32_t key[kEach], prefix = 0, above = 0;
  BEAGLE_UNROLL
  for (int j = 0; j < kEach; ++j) {
    const int i = team.rank() + j * kThreads;
    key[j] = i < count ? order(tidy(scores[i])) : 0;
  }
  for (int shift = 32 - kBits; shift >= 0; shift -= kBits) {
    bins[team.rank()] = 0;
    team.sync();
    BEAGLE_UNROLL
    for (int j = 0; j < kEach; ++j) {
      if (key[j] && key[j] >> shift >> kBits == prefix) atomicAdd(&bins[key[j] >> shift & (kThreads - 1)], 1u);
    }
    team.sync();
    const uint32_t bin = kThreads - 1 - team.rank(), own = bins[bin], higher = above + uint32_t(team.scan(own));
    if (higher < limit && limit <= higher + own) found = bin, over = higher, within = own;
    team.sync();
    prefix = prefix << kBits | found, above = over;
    if (over + within == limit) return prefix << shift;
  }
  return prefix;
}

namespace {

__global__ void __launch_bounds__(kThreads) build_rows(const BuildTree op) {
  __shared__ uint64_t slots[2][kWarps];
  __shared__ Scratch scratch;
  Block team{slots};
  beagle::build_tree(team, op, blockIdx.x, scratch);
}

}  // namespace

void build_tree(const BuildTree& op, void* stream) {
  launch(build_rows, op.batch, stream, op);
}

}  // namespace beagle::cuda
