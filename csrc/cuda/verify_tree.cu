// Two launches: a block for each chunk of each node's row, then a block for each tree.
#include "../core/accept.h"
#include "../core/sampling.h"
#include "executor.h"
#include "team.cuh"

namespace beagle::cuda {
namespace {

template <class T>
__global__ void __launch_bounds__(kThreads, 2) choose_nodes(const VerifyTree op) {
  __shared__ uint64_t slots[2][kWarps];
  __shared__ Scratch scratch;
  const int64_t b = blockIdx.z, n = blockIdx.y, chunk = blockIdx.x, row = b * op.tree.nodes + n;
  if (n > 0 && n >= op.tree.size[b]) return;
  Block team{slots};
  const RowSampling sampling = op.sampling.at(b);
  const Stream stream(sampling.seed, op.positions[b] + (n > 0 ? op.tree.depth[row] : 0), kTarget, 0);
  const T* logits = static_cast<const T*>(op.logits) + row_offset(b, n, op.stride_b, op.stride_n);
  int32_t status = 0;
  const uint64_t key = choose_chunk(team, logits, op.vocab, chunk, op.chunks, sampling, stream, status, scratch);
  if (team.rank() == 0) {
    op.keys[row * op.chunks + chunk] = key;
    op.flags[row * op.chunks + chunk] = status;
  }
}

__global__ void __launch_bounds__(kThreads) accept_chosen(const VerifyTree op) {
  __shared__ uint64_t slots[2][kWarps], match[kMaxWords];
  __shared__ int64_t chosen[kMaxNodes];
  Block team{slots};
  const int64_t b = blockIdx.x;
  const int32_t size = least(most(op.tree.size[b], 1), op.tree.nodes);
  int32_t status = 0;
  for (int32_t n = team.rank(); n < size; n += team.size()) {
    const int64_t at = (b * op.tree.nodes + n) * op.chunks;
    chosen[n] = finish_choice(op.keys + at, op.flags + at, op.chunks, status);
  }
  const bool nan = team.any(status & kStatusNan), none = team.any(status & kStatusNoFinite);
  status = (nan ? kStatusNan : 0) | (none ? kStatusNoFinite : 0);
  beagle::accept_tree(team, op.tree, b, chosen, status, op.verdict, match);
}

}  // namespace

void verify_tree(const VerifyTree& op, void* stream) {
  by_dtype(op.dtype, [&](auto* type) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
    launch(choose_nodes<T>, dim3(op.chunks, op.tree.nodes, op.batch), stream, op);
  });
  launch(accept_chosen, op.batch, stream, op);
}

}  // namespace beagle::cuda
