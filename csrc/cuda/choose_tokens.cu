// Two launches: a block for each chunk of each row, then a block for each row, or some where there are few rows.
#include "../core/sampling.h"
#include "executor.h"
#include "nucleus.cuh"

namespace beagle::cuda {
namespace {

__device__ __forceinline__ Stream stream_of(const ChooseTokens& op, int64_t row) {
  return {uint64_t(op.sampling.seed[row]), op.positions[row], op.stream, op.rounds ? op.rounds[row] : 0};
}

template <class T>
__global__ void __launch_bounds__(kThreads) scan_chunks(const ChooseTokens op) {
  const int64_t row = blockIdx.y, at = row * op.chunks + blockIdx.x;
  let_next_start();
  scan_chunk(logits_of<T>(op, row), op.vocab, op.sampling.temperature[row], [&] { return stream_of(op, row); },
             Groups(op.groups, row, op.chunks, blockDim.x), op.keys + at, op.flags + at);
}

template <class T>
__global__ void __launch_bounds__(kRowThreads, 2) choose_rows(const ChooseTokens op) {
  __shared__ uint64_t slots[2][kRowWarps];
  __shared__ Room room;
  RowBlock team{slots};
  const int64_t row = blockIdx.y;
  const RowSampling sampling = op.sampling.at(row);
  wait_for_previous();
  uint64_t key = 0;
  if (sampling.noisy()) {
    const Groups groups(op.groups, row, op.chunks, chunk_threads(op.vocab, op.chunks));
    const Row<T> logits(logits_of<T>(op, row), op.vocab);
    if (!choose_noisy(team, logits, sampling, stream_of(op, row), groups, room, key)) return;
  } else if (blockIdx.x > 0) {
    return;
  }
  if (team.rank() != 0) return;
  int32_t status = 0;
  if (key) op.keys[row * op.chunks] = key;
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
    part.groups += first * (op.chunks * kThreads + 2 * kRowWords), part.tokens += first, part.status += first;
    part.rounds = op.rounds ? op.rounds + first : nullptr;
    part.sampling = op.sampling.from(first);
    by_dtype(op.dtype, [&](auto* type) {
      using T = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
      launch(scan_chunks<T>, dim3(op.chunks, part.rows), stream, part, chunk_threads(op.vocab, op.chunks));
      launch_dependent(choose_rows<T>, dim3(row_splits(part.rows), part.rows), stream, part, kRowThreads);
    });
  }
}

}  // namespace beagle::cuda
