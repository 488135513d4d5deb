// Three launches: a block for each chunk of each node's row, one or more for each node, which do the sampled ones, a
// block for each tree.
#include "../core/accept.h"
#include "../core/sampling.h"
#include "executor.h"
#include "nucleus.cuh"

namespace beagle::cuda {
namespace {

__device__ __forceinline__ bool in_use(const VerifyTree& op, int64_t b, int64_t n) {
  return n == 0 || n < op.tree.size[b];
}

__device__ __forceinline__ Stream stream_of(const VerifyTree& op, int64_t b, int64_t n) {
  const int32_t depth = n > 0 ? op.tree.depth[b * op.tree.nodes + n] : 0;
  return {uint64_t(op.sampling.seed[b]), op.positions[b] + depth, kTarget, 0};
}

template <class T>
__device__ __forceinline__ const T* logits_of(const VerifyTree& op, int64_t b, int64_t n) {
  return static_cast<const T*>(op.logits) + row_offset(b, n, op.stride_b, op.stride_n);
}

template <class T>
__global__ void __launch_bounds__(kThreads) scan_nodes(const VerifyTree op) {
  const int64_t b = blockIdx.z, n = blockIdx.y, row = b * op.tree.nodes + n, at = row * op.chunks + blockIdx.x;
  let_next_start();
  if (!in_use(op, b, n)) return;
  scan_chunk(logits_of<T>(op, b, n), op.vocab, op.sampling.temperature[b], [&] { return stream_of(op, b, n); },
             Groups(op.groups, row, op.chunks, blockDim.x), op.keys + at, op.flags + at);
}

template <class T>
__global__ void __launch_bounds__(kRowThreads, 2) choose_nodes(const VerifyTree op) {
  __shared__ uint64_t slots[2][kRowWarps];
  __shared__ Room room;
  const int64_t b = blockIdx.z, n = blockIdx.y, row = b * op.tree.nodes + n;
  const RowSampling sampling = op.sampling.at(b);
  let_next_start();
  // also where there is nothing to do: the next kernel waits for this one alone
  wait_for_previous();
  if (!sampling.noisy() || !in_use(op, b, n)) return;
  RowBlock team{slots};
  const Groups groups(op.groups, row, op.chunks, chunk_threads(op.vocab, op.chunks));
  const Row<T> logits(logits_of<T>(op, b, n), op.vocab);
  uint64_t key;
  const bool decides = choose_noisy(team, logits, sampling, stream_of(op, b, n), groups, room, key);
  if (decides && team.rank() == 0) op.keys[row * op.chunks] = key;
}

__global__ void __launch_bounds__(kThreads) accept_chosen(const VerifyTree op) {
  __shared__ uint64_t slots[2][kWarps], match[kMaxWords];
  __shared__ int64_t chosen[kMaxNodes];
  Block team{slots};
  const int64_t b = blockIdx.x;
  const int32_t size = least(most(op.tree.size[b], 1), op.tree.nodes);
  wait_for_previous();
  const auto finish = [&](int32_t n, int32_t& status) {
    const int64_t at = (b * op.tree.nodes + n) * op.chunks;
    return finish_choice(op.keys + at, op.flags + at, op.chunks, status);
  };
  int32_t unused = 0;
  for (int32_t n = team.rank(); n < size; n += team.size()) chosen[n] = finish(n, unused);
  const auto status_of = [&](int32_t n) {
    int32_t status = 0;
    finish(n, status);
    return status;
  };
  beagle::accept_tree(team, op.tree, b, chosen, status_of, op.verdict, match);
}

}  // namespace

void verify_tree(const VerifyTree& op, void* stream) {
  by_dtype(op.dtype, [&](auto* type) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
    launch(scan_nodes<T>, dim3(op.chunks, op.tree.nodes, op.batch), stream, op, chunk_threads(op.vocab, op.chunks));
    const unsigned splits = row_splits(op.tree.nodes * op.batch);
    launch_dependent(choose_nodes<T>, dim3(splits, op.tree.nodes, op.batch), stream, op, kRowThreads);
  });
  launch_dependent(accept_chosen, op.batch, stream, op);
}

}  // namespace beagle::cuda
