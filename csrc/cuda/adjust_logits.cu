// Three launches: blocks that count a row's text, a position a thread; a block for each part of each node, which writes its
// columns, eight a thread; a block for each node, for what the text and the path do to a few of them.
#include "../core/adjust.h"
#include "../core/logits.h"
#include "executor.h"
#include "team.cuh"

namespace beagle::cuda {
namespace {

struct Atomic {
  template <class T>
  __device__ __forceinline__ T add(T* p, T x) const { return atomicAdd(p, x); }
  __device__ __forceinline__ uint32_t set(uint32_t* p, uint32_t bits) const { return atomicOr(p, bits); }
};

__device__ __forceinline__ AdjustedRow row_of(const AdjustLogits& op, int64_t b) {
  return {op, b, op.counts + b * op.width};
}

__global__ void __launch_bounds__(kThreads) count_texts(const AdjustLogits op) {
  const AdjustedRow row = row_of(op, blockIdx.y);
  let_next_start();
  if (!row.penalises()) return;
  const int64_t positions = op.slots + op.nodes * op.path_length;
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < positions; i += int64_t(gridDim.x) * kThreads)
    note_token(row, i, Atomic{});
}

constexpr int kEach = 8;

// Columns [i, i + kEach), all of them the row's, whose tables, if there are any, are by column.
template <class T>
__device__ __forceinline__ void plain_values(const AdjustedNode& node, int64_t i, float (&z)[kEach]) {
  const AdjustLogits& op = node.row.op;
  const int64_t table = node.row.b * op.vocab + i;
  alignas(16) T raw[kEach];
  load_full(node.logits<T>() + i, raw);
  BEAGLE_UNROLL
  for (int j = 0; j < kEach; ++j) z[j] = to_float(raw[j]);
  if (op.added) {
    alignas(16) float added[kEach];
    load_full(op.added + table, added);
    BEAGLE_UNROLL
    for (int j = 0; j < kEach; ++j) z[j] = z[j] + added[j];
  }
  if (op.first) {
    alignas(16) int32_t first[kEach];
    load_full(op.first + table, first);
    BEAGLE_UNROLL
    for (int j = 0; j < kEach; ++j) z[j] = node.number() < first[j] ? -kInf : z[j];
  }
  const uint32_t bits = op.allowed ? uint32_t(node.words()[i / 32]) >> i % 32 : ~0u;
  BEAGLE_UNROLL
  for (int j = 0; j < kEach; ++j) z[j] = bits >> j & 1 ? z[j] : -kInf;
}

template <class T>
__device__ __forceinline__ void write_columns(const AdjustedNode& node, int64_t i, int64_t end) {
  float* out = node.out() + i;
  if (node.row.gathers() || i + kEach > end) {
    for (int64_t j = i; j < least(i + kEach, end); ++j) node.out()[j] = node.plain<T>(j);
    return;
  }
  float z[kEach];
  plain_values<T>(node, i, z);
  if (reinterpret_cast<uintptr_t>(out) % 16 == 0) {
    BEAGLE_UNROLL
    for (int j = 0; j < kEach; j += 4) {
      reinterpret_cast<uint4*>(out)[j / 4] = {bit_cast<uint32_t>(z[j]), bit_cast<uint32_t>(z[j + 1]),
                                              bit_cast<uint32_t>(z[j + 2]), bit_cast<uint32_t>(z[j + 3])};
    }
    return;
  }
  BEAGLE_UNROLL
  for (int j = 0; j < kEach; ++j) out[j] = z[j];
}

template <class T>
__global__ void __launch_bounds__(kThreads) write_nodes(const AdjustLogits op) {
  __shared__ uint64_t slots[2][kWarps];
  Block team{slots};
  const AdjustedRow row = row_of(op, blockIdx.y);
  const AdjustedNode node(team, row, blockIdx.x / op.chunks);
  const int64_t columns = part_columns(op), begin = blockIdx.x % op.chunks * columns;
  const int64_t end = least(begin + columns, op.width);
  let_next_start();
  for (int64_t i = begin + int64_t(threadIdx.x) * kEach; i < end; i += kThreads * kEach) write_columns<T>(node, i, end);
  // the last kernel waits for this one alone
  wait_for_previous();
}

// Two blocks on a processor will do: aiming at more, ptxas spills around the division.
template <class T>
__global__ void __launch_bounds__(kThreads, 2) adjust_nodes(const AdjustLogits op) {
  __shared__ uint64_t slots[2][kWarps];
  Block team{slots};
  const AdjustedRow row = row_of(op, blockIdx.y);
  const AdjustedNode node(team, row, blockIdx.x);
  wait_for_previous();
  adjust_tokens<T>(team, node, 0, op.width);
}

}  // namespace

void adjust_logits(const AdjustLogits& op, void* stream) {
  const int64_t positions = op.slots + op.nodes * op.path_length;
  launch(count_texts, dim3(least<int64_t>((positions + kThreads - 1) / kThreads + 1, 64), op.batch), stream, op);
  by_dtype(op.dtype, [&](auto* type) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
    launch_dependent(write_nodes<T>, dim3(op.chunks * op.nodes, op.batch), stream, op);
    launch_dependent(adjust_nodes<T>, dim3(op.nodes, op.batch), stream, op);
  });
}

}  // namespace beagle::cuda
