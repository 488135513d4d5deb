// Three launches: a block for each chunk of each row, a block for each row, which finds what its filters keep, and blocks
// that write z + T g, eight tokens a thread.
#include "executor.h"
#include "nucleus.cuh"

namespace beagle::cuda {
namespace {

__device__ __forceinline__ Stream stream_of(const PerturbLogits& op, int64_t row) {
  return {uint64_t(op.sampling.seed[row]), op.positions[row], kTarget, 0};
}

template <class T>
__global__ void __launch_bounds__(kThreads) scan_chunks(const PerturbLogits op) {
  const int64_t row = blockIdx.y, at = row * op.chunks + blockIdx.x;
  let_next_start();
  scan_chunk(logits_of<T>(op, row), op.vocab, op.sampling.temperature[row], [&] { return stream_of(op, row); },
             Groups(op.groups, row, op.chunks, blockDim.x), op.keys + at, op.flags + at);
}

template <class T>
__global__ void __launch_bounds__(kRowThreads, 2) bound_rows(const PerturbLogits op) {
  __shared__ uint64_t slots[2][kRowWarps];
  __shared__ Room room;
  RowBlock team{slots};
  const int64_t row = blockIdx.x;
  const RowSampling sampling = op.sampling.at(row);
  let_next_start();
  wait_for_previous();
  float top = -kInf, kth = -kInf;
  if (sampling.noisy()) {
    const Groups groups(op.groups, row, op.chunks, chunk_threads(op.vocab, op.chunks));
    const Row<T> logits(logits_of<T>(op, row), op.vocab);
    const Kept kept = kept_of(team, logits, groups, sampling, room);
    top = kept.top, kth = nucleus_cut(team, logits, kept, sampling.top_p, room);
  }
  if (team.rank() != 0) return;
  int32_t status = 0;
  for (int64_t c = row * op.chunks; c < (row + 1) * op.chunks; ++c) {
    status |= op.flags[c];
    if (!sampling.noisy() && op.keys[c]) top = most(top, key_value(op.keys[c]));
  }
  op.bounds[2 * row] = top, op.bounds[2 * row + 1] = kth;
  op.status[row] = top == -kInf ? status | kStatusNoFinite : status;
}

constexpr int kTile = 8;

// The values of tokens that lie in one group.
__device__ __forceinline__ void perturb(float (&z)[kTile], const Kept& kept, float temperature, const Stream& stream,
                                        uint32_t token) {
  bool keeps[kTile], any = false;
  BEAGLE_UNROLL
  for (int j = 0; j < kTile; ++j) any |= keeps[j] = z[j] > -kInf && kept(z[j]);
  if (any) {
    const Group drawn(stream, token / kGroup);
    BEAGLE_UNROLL
    for (int q = 0; q < kTile; q += 4) {
      const Words words = philox(stream, (token + q) / 4);
      BEAGLE_UNROLL
      for (int w = 0; w < 4; ++w) z[q + w] += temperature * drawn.noise(token + q + w, words.x[w]);
    }
  }
  BEAGLE_UNROLL
  for (int j = 0; j < kTile; ++j) z[j] = keeps[j] ? z[j] : -kInf;
}

template <class T>
__global__ void __launch_bounds__(kThreads) write_values(const PerturbLogits op) {
  const int64_t row = blockIdx.y, token = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * kTile;
  const RowSampling sampling = op.sampling.at(row);
  float z[kTile];
  if (token < op.vocab) load_tile(logits_of<T>(op, row), token, op.vocab, z);
  wait_for_previous();
  if (token >= op.vocab) return;
  const float top = op.bounds[2 * row];
  if (top == -kInf && token == 0) z[0] = 0.0f;
  if (sampling.noisy()) {
    Kept kept(sampling, top == -kInf ? 0.0f : top);
    kept.kth = op.bounds[2 * row + 1];
    perturb(z, kept, sampling.temperature, stream_of(op, row), uint32_t(token));
  }
  float* values = op.values + row * op.vocab + token;
  if (token + kTile <= op.vocab && reinterpret_cast<uintptr_t>(values) % 16 == 0) {
    BEAGLE_UNROLL
    for (int j = 0; j < kTile; j += 4) {
      reinterpret_cast<uint4*>(values)[j / 4] = {bit_cast<uint32_t>(z[j]), bit_cast<uint32_t>(z[j + 1]),
                                                 bit_cast<uint32_t>(z[j + 2]), bit_cast<uint32_t>(z[j + 3])};
    }
    return;
  }
  BEAGLE_UNROLL
  for (int j = 0; j < kTile; ++j)
    if (token + j < op.vocab) values[j] = z[j];
}

}  // namespace

void perturb_logits(const PerturbLogits& op, void* stream) {
  constexpr int64_t kBlock = kThreads * kTile;
  for (int64_t first = 0; first < op.rows; first += kMaxRows) {
    PerturbLogits part = op;
    part.rows = least(op.rows - first, kMaxRows);
    part.logits = static_cast<const char*>(op.logits) + first * op.stride * (op.dtype == kFloat32 ? 4 : 2);
    part.positions += first, part.keys += first * op.chunks, part.flags += first * op.chunks;
    part.groups += first * (op.chunks * kThreads + 2 * kRowWords), part.bounds += 2 * first, part.status += first;
    part.values += first * op.vocab;
    part.sampling = op.sampling.from(first);
    by_dtype(op.dtype, [&](auto* type) {
      using T = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
      launch(scan_chunks<T>, dim3(op.chunks, part.rows), stream, part, chunk_threads(op.vocab, op.chunks));
      launch_dependent(bound_rows<T>, dim3(part.rows), stream, part, kRowThreads);
      launch_dependent(write_values<T>, dim3((op.vocab + kBlock - 1) / kBlock, part.rows), stream, part, kThreads);
    });
  }
}

}  // namespace beagle::cuda
