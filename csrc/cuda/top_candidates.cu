// Two launches: a block for each chunk of each row keeps the chunk's k best keys and its log-sum-exp, then a block for
// each row joins them. A row with filters needs its cut first, so one block takes all its chunks in turn.
#include "../core/candidates.h"
#include "executor.h"
#include "team.cuh"

namespace beagle::cuda {
namespace {

// Keys set aside before they are merged: as many as a step can add, and half a step's to wait for more.
constexpr int kStep = kThreads * 4, kWaiting = kStep / 2, kAside = kStep + kWaiting;

// The k largest of the keys that `each(i)` gives for i below n, merged into the sorted list `best`.
template <class Each>
__device__ void merge_best(Block& team, uint64_t* best, int32_t k, int64_t n, const Each& each) {
  // the list is copied aside; its keys join the new ones in k rounds of taking the largest below the last taken
  __shared__ uint64_t old[kMaxK];
  for (int i = team.rank(); i < k; i += kThreads) old[i] = best[i];
  team.sync();
  uint64_t last = ~uint64_t(0);
  for (int32_t taken = 0; taken < k; ++taken) {
    uint64_t mine = 0;
    for (int64_t i = team.rank(); i < n; i += kThreads) {
      const uint64_t key = each(i);
      mine = key < last ? most(mine, key) : mine;
    }
    for (int i = team.rank(); i < k; i += kThreads) mine = old[i] < last ? most(mine, old[i]) : mine;
    last = team.max(mine);
    if (team.rank() == 0) best[taken] = last;
  }
  team.sync();
}

template <class T>
__global__ void __launch_bounds__(kThreads, 2) rank_chunks(const TopCandidates op) {
  constexpr int kTile = Block::kTile;
  __shared__ uint64_t slots[2][kWarps];
  __shared__ Scratch scratch;
  __shared__ uint64_t best[kMaxK], found[kAside];
  __shared__ int32_t count;
  Block team{slots};
  const int64_t row = blockIdx.y, chunk = blockIdx.x, out = row * op.chunks + chunk;
  const RowSampling sampling = op.sampling.at(row);
  const Stream stream(sampling.seed, op.positions[row], kTarget, 0);
  const T* logits = static_cast<const T*>(op.logits) + row_offset(0, row, 0, op.stride);
  const bool filters = sampling.filters(op.vocab);
  const float cut = !filters || chunk > 0 ? -kInf : penalty_cut(team, logits, op.vocab, sampling, scratch);
  const int64_t spans = filters ? (chunk > 0 ? 0 : op.chunks) : 1;
  for (int i = team.rank(); i < op.k; i += kThreads) best[i] = 0;
  if (team.rank() == 0) count = 0;
  team.sync();

  uint64_t floor = 0;
  const auto merge = [&] {
    const int32_t have = count;
    team.sync();
    if (team.rank() == 0) count = 0;
    merge_best(team, best, op.k, have, [&](int64_t f) { return found[f]; });
    floor = best[op.k - 1];
  };
  LogSum total;
  for (int64_t s = 0; s < spans; ++s) {
    const int64_t begin = (chunk + s) * kChunk, end = least(begin + kChunk, op.vocab);
    for (int64_t i = begin + team.rank() * kTile; i - team.rank() * kTile < end; i += kThreads * kTile) {
      float value[kTile];
      load_tile(logits, i, end, value);
      if (i < end) perturb_tile(value, i, end, sampling, cut, stream, op.token_ids);
      const float top = tile_max(value);
      if (top > -kInf) total.add(top, tile_sum(value, top));
      BEAGLE_UNROLL
      for (int j = 0; j < kTile; ++j) {
        const uint64_t key = value[j] > -kInf ? make_key(value[j], uint32_t(i + j)) : 0;
        if (key > floor) found[atomicAdd(&count, 1)] = key;
        if (j % 4 == 3) {
          team.sync();
          if (count > kWaiting) merge();
          team.sync();
        }
      }
    }
  }
  if (count > 0) merge();
  for (int i = team.rank(); i < op.k; i += kThreads) op.keys[out * op.k + i] = best[i];
  const float top = key_value(team.max(make_key(total.top, 0)));
  const double sum = team.sum(total.top > -kInf ? total.sum * double(exp_of(total.top - top)) : 0.0);
  if (team.rank() == 0) op.sums[out * 2] = top, op.sums[out * 2 + 1] = float(sum);
}

__global__ void __launch_bounds__(kThreads) join_chunks(const TopCandidates op) {
  __shared__ uint64_t slots[2][kWarps];
  __shared__ uint64_t best[kMaxK];
  Block team{slots};
  const int64_t row = blockIdx.x, keys = row * op.chunks * op.k;
  for (int i = team.rank(); i < op.k; i += kThreads) best[i] = 0;
  team.sync();
  merge_best(team, best, op.k, op.chunks * op.k, [&](int64_t i) { return op.keys[keys + i]; });
  LogSum total;
  for (int64_t c = 0; c < op.chunks; ++c) {
    const float* part = op.sums + (row * op.chunks + c) * 2;
    total.add(part[0], double(part[1]));
  }
  for (int i = team.rank(); i < op.k; i += kThreads) {
    const uint64_t key = best[i];
    const int64_t column = key ? int64_t(key_index(key)) : 0;
    op.tokens[row * op.k + i] = !key ? 0 : op.token_ids ? op.token_ids[column] : column;
    op.scores[row * op.k + i] = key ? key_value(key) - total.value() : -kInf;
  }
}

}  // namespace

void top_candidates(const TopCandidates& op, void* stream) {
  by_dtype(op.dtype, [&](auto* type) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
    launch(rank_chunks<T>, dim3(op.chunks, op.rows), stream, op);
  });
  launch(join_chunks, op.rows, stream, op);
}

}  // namespace beagle::cuda
