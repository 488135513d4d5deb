// Two launches: a block for each chunk of each row notes what its groups may reach, and at T = 0 its log-sum-exp; then a
// block for each row lists the best.
#include "candidates.cuh"
#include "executor.h"
#include "nucleus.cuh"

namespace beagle::cuda {
namespace {

__device__ __forceinline__ Stream stream_of(const TopCandidates& op, int64_t row) {
  return {uint64_t(op.sampling.seed[row]), op.positions[row], kTarget, 0};
}

template <class T>
__device__ __forceinline__ const T* logits_of(const TopCandidates& op, int64_t row) {
  return static_cast<const T*>(op.logits) + row_offset(0, row, 0, op.stride);
}

// The sum of exp(z - top) over the block's chunk.
template <class T>
__device__ float sum_chunk(const Row<T>& row, int32_t begin, const uint4 (&raw)[Row<T>::kVectors], float top) {
  __shared__ float sums[kWarps];
  float sum = 0.0f;
  BEAGLE_UNROLL
  for (int n = 0; n < Row<T>::kVectors; ++n) {
    float z[Row<T>::kPer];
    unpack<T>(raw[n], z);
    BEAGLE_UNROLL
    for (int j = 0; j < Row<T>::kPer; ++j) z[j] = exp_of(z[j] - top);
    sum += lane_sum(z);
  }
  const int32_t odd = row.odd_token(int32_t(threadIdx.x));
  if (odd >= begin && odd < begin + int32_t(blockDim.x) * 32) sum += exp_of(tidy(row.at(odd)) - top);
  for (int s = 16; s > 0; s /= 2) sum += __shfl_xor_sync(~0u, sum, s);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
  __syncthreads();
  float all = 0.0f;
  for (unsigned w = 0; w < blockDim.x / 32; ++w) all += sums[w];
  return all;
}

template <class T>
__global__ void __launch_bounds__(kThreads) scan_columns(const TopCandidates op) {
  __shared__ float tops[kChunkGroups];
  let_next_start();
  const int64_t at = blockIdx.y;
  const Row<T> row(logits_of<T>(op, at), op.vocab);
  const int32_t threads = int32_t(blockDim.x), begin = int32_t(blockIdx.x) * threads * 32, rank = int32_t(threadIdx.x);
  const float temperature = op.sampling.temperature[at];
  const bool noisy = temperature > 0.0f;
  uint4 raw[Row<T>::kVectors];
  load_chunk(row, begin, raw);
  float noise[2] = {};
  if (noisy && rank < threads / 4) {
    const Stream stream = stream_of(op, at);
    const Columns columns{op.token_ids, row.vocab};
    const int32_t group = begin / kGroup + 2 * rank;
    if (!op.token_ids) pair_noise(stream, uint32_t(group / 2), noise);
    else for (int i = 0; i < 2; ++i) noise[i] = columns.largest_noise(stream, group + i);
  }
  store_tops(row, begin, raw, tops);
  __syncthreads();
  const Groups groups(op.groups, at, op.chunks, blockDim.x);
  if (rank < threads / 4) {
    BEAGLE_UNROLL
    for (int i = 0; i < 2; ++i) {
      const float top = tops[2 * rank + i];
      groups.tops[begin / kGroup + 2 * rank + i] = top;
      groups.bounds[begin / kGroup + 2 * rank + i] = noisy ? group_bound(top, temperature, noise[i]) : top;
    }
  }
  if (noisy) return;
  float top = -kInf;
  for (int u = rank % 32; u < threads / 2; u += 32) top = most(top, tops[u]);
  top = unorder(__reduce_max_sync(~0u, order(top)));
  const float sum = sum_chunk(row, begin, raw, most(top, -kMax));
  if (rank == 0) op.sums[(at * op.chunks + blockIdx.x) * 2] = top, op.sums[(at * op.chunks + blockIdx.x) * 2 + 1] = sum;
}

// Log-sum-exp of the whole row at T = 0, of what was kept of it otherwise.
__device__ float log_sum(RowBlock& team, const TopCandidates& op, int64_t row, bool noisy, const List& list) {
  const int32_t n = noisy ? least(op.k, list.count) : int32_t(op.chunks);
  const float* part = op.sums + row * op.chunks * 2;
  float top = noisy && n > 0 ? key_value(list.keys[0]) : -kInf;
  if (!noisy)
    for (int32_t c = 0; c < n; ++c) top = most(top, part[2 * c]);
  double sum = 0.0;
  for (int32_t i = team.rank(); i < n; i += kRowThreads) {
    const float value = noisy ? key_value(list.keys[i]) : part[2 * i];
    if (value > -kInf) sum += double(exp_of(value - top)) * (noisy ? 1.0 : double(part[2 * i + 1]));
  }
  sum = team.sum(sum);
  return sum > 0.0 ? top + log_of(float(sum)) : 0.0f;
}

template <class T>
__global__ void __launch_bounds__(kRowThreads) rank_rows(const TopCandidates op) {
  __shared__ uint64_t slots[2][kRowWarps];
  __shared__ Room room;
  __shared__ List list;
  RowBlock team{slots};
  const int64_t at = blockIdx.x;
  const RowSampling sampling = op.sampling.at(at);
  const Row<T> row(logits_of<T>(op, at), op.vocab);
  const Columns columns{op.token_ids, row.vocab};
  const Groups groups(op.groups, at, op.chunks, chunk_threads(op.vocab, op.chunks));
  const Stream stream = stream_of(op, at);
  wait_for_previous();
  const bool filters = sampling.filters(op.vocab);
  Kept kept(sampling, 0.0f);
  if (filters) {
    kept = kept_of(team, row, groups, sampling, room);
    if (sampling.top_p < 1.0f && kept.top > -kInf) {
      const MassItem<T> mass(row.logits, row.vocab, kept.kth > -kInf ? order(kept.kth) : 0, kept);
      const uint64_t limit = nucleus_limit(sampling.top_p, mass.total(team));
      kept.kth = most(kept.kth, unorder(threshold(team, row.vocab, mass, limit, room.scratch)));
    }
  }
  const auto keeps = [&](float z) { return !filters || kept(z); };
  list_best(team, groups, op.k, !sampling.noisy(), room, list, [&](int32_t u, float (&value)[2]) {
    perturbed(row, columns, stream, sampling.temperature, keeps, u, value);
  });
  const float total = log_sum(team, op, at, sampling.noisy(), list);
  for (int32_t i = team.rank(); i < op.k; i += kRowThreads) {
    const uint64_t key = i < list.count ? list.keys[i] : 0;
    const int64_t column = key ? int64_t(key_index(key)) : 0;
    op.tokens[at * op.k + i] = !key ? 0 : op.token_ids ? op.token_ids[column] : column;
    op.scores[at * op.k + i] = key ? key_value(key) - total : -kInf;
  }
}

}  // namespace

void top_candidates(const TopCandidates& op, void* stream) {
  by_dtype(op.dtype, [&](auto* type) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
    launch(scan_columns<T>, dim3(op.chunks, op.rows), stream, op, chunk_threads(op.vocab, op.chunks));
    launch_dependent(rank_rows<T>, op.rows, stream, op, kRowThreads);
  });
}

}  // namespace beagle::cuda
