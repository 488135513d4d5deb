// Two launches: a block for each chunk of each row notes what its groups may reach and its log-sum-exp; then a block for
// each row lists the best.
#include "candidates.cuh"
#include "executor.h"
#include "nucleus.cuh"

namespace beagle::cuda {
namespace {

__device__ __forceinline__ Stream stream_of(const TopCandidates& op, int64_t row) {
  return {uint64_t(op.sampling.seed[row]), op.positions[row], kTarget, 0};
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
  // at T = 0 there is no noise, and a group reaches its largest logit
  if (rank < threads / 4) store_groups(groups, begin, tops, temperature, noise);
  const float top = chunk_top(tops), base = most(top, -kMax);
  const double sum = sum_chunk(row, begin, raw, [&](float z) { return exp_of(z - base); });
  float* part = op.sums + (at * op.chunks + blockIdx.x) * 2;
  if (rank == 0) part[0] = top, part[1] = float(sum);
}

// Log of the sum of exp(value) over the kept and of exp(z), without noise, over the others.
template <class T>
__device__ float log_sum(RowBlock& team, const Row<T>& row, const float* parts, int64_t chunks, int32_t k, bool noisy,
                         const List& list) {
  float roof = list.count > 0 ? key_value(list.keys[0]) : -kInf;
  for (int64_t c = 0; c < chunks; ++c) roof = most(roof, parts[2 * c]);
  double others = 0.0, kept = 0.0;
  for (int64_t c = team.rank(); c < chunks; c += kRowThreads)
    if (parts[2 * c] > -kInf) others += double(exp_of(parts[2 * c] - roof)) * double(parts[2 * c + 1]);
  for (int32_t i = team.rank(); noisy && i < least(k, list.count); i += kRowThreads) {
    others -= double(exp_of(tidy(row.at(int32_t(key_index(list.keys[i])))) - roof));
    kept += double(exp_of(key_value(list.keys[i]) - roof));
  }
  others = team.sum(others), kept = team.sum(kept);
  const double sum = most(others, 0.0) + kept;
  return sum > 0.0 ? roof + log_of(float(sum)) : 0.0f;
}

template <class T>
__global__ void __launch_bounds__(kRowThreads, 2) rank_rows(const TopCandidates op) {
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
    kept.kth = nucleus_cut(team, row, kept, sampling.top_p, room);
  }
  const auto keeps = [&](float z) { return !filters || kept(z); };
  list_best(team, groups, op.k, sampling.temperature, room, list, [&](int32_t u, float (&value)[2]) {
    perturbed(row, columns, stream, sampling.temperature, keeps, u, value);
  });
  const float* parts = op.sums + at * op.chunks * 2;
  const float total = log_sum(team, row, parts, op.chunks, op.k, sampling.noisy(), list);
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
