// Two launches: a block for each chunk of each row, then a thread for each row.
#include "../core/sampling.h"
#include "executor.h"
#include "team.cuh"

namespace beagle::cuda {
namespace {

template <class T>
__global__ void __launch_bounds__(kThreads, 2) choose_chunks(const ChooseTokens op) {
  __shared__ uint64_t slots[2][kWarps];
  __shared__ Scratch scratch;
  Block team{slots};
  const int64_t row = blockIdx.y, chunk = blockIdx.x;
  const RowSampling sampling = op.sampling.at(row);
  const Stream stream(sampling.seed, op.positions[row], op.stream, op.rounds ? op.rounds[row] : 0);
  const T* logits = static_cast<const T*>(op.logits) + row_offset(0, row, 0, op.stride);
  int32_t status = 0;
  const uint64_t key = choose_chunk(team, logits, op.vocab, chunk, op.chunks, sampling, stream, status, scratch);
  if (team.rank() == 0) {
    op.keys[row * op.chunks + chunk] = key;
    op.flags[row * op.chunks + chunk] = status;
  }
}

__global__ void __launch_bounds__(kThreads) finish_rows(const ChooseTokens op) {
  const int64_t row = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (row >= op.rows) return;
  int32_t status = 0;
  op.tokens[row] = finish_choice(op.keys + row * op.chunks, op.flags + row * op.chunks, op.chunks, status);
  op.status[row] = status;
}

}  // namespace

void choose_tokens(const ChooseTokens& op, void* stream) {
  for (int64_t first = 0; first < op.rows; first += kMaxRows) {
    ChooseTokens part = op;
    part.rows = least(op.rows - first, kMaxRows);
    part.logits = static_cast<const char*>(op.logits) + first * op.stride * (op.dtype == kFloat32 ? 4 : 2);
    part.positions += first, part.keys += first * op.chunks, part.flags += first * op.chunks;
    part.rounds = op.rounds ? op.rounds + first : nullptr;
    part.sampling = {op.sampling.seed + first, op.sampling.temperature + first, op.sampling.top_k + first,
                     op.sampling.top_p + first, op.sampling.min_p + first};
    by_dtype(op.dtype, [&](auto* type) {
      using T = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
      launch(choose_chunks<T>, dim3(op.chunks, part.rows), stream, part);
    });
  }
  launch(finish_rows, (op.rows + kThreads - 1) / kThreads, stream, op);
}

}  // namespace beagle::cuda
