// The first read of rows: a block takes a chunk, 32 tokens a thread, and leaves the chunk's best key where the row is
// greedy, else what its groups may reach.
#pragma once

#include "vectors.cuh"

namespace beagle::cuda {

constexpr int kChunkGroups = kChunk / kGroup;

// A row of the logits of an op that has them row by row.
template <class T, class Op>
__device__ __forceinline__ const T* logits_of(const Op& op, int64_t row) {
  return static_cast<const T*>(op.logits) + row_offset(0, row, 0, op.stride);
}

// Threads of a block so that `chunks` of them take a row of so many tokens.
__host__ __device__ inline unsigned chunk_threads(int64_t vocab, int64_t chunks) {
  unsigned threads = 64;
  while (threads < kThreads && chunks * threads * 32 < vocab) threads *= 2;
  return threads;
}

// For each group of a row the bound of z + T g and its largest logit, both padded to whole chunks; and words in which
// the blocks of a row add up, 0 after the first read.
struct Groups {
  unsigned long long* words;
  float *bounds, *tops;
  int32_t count;
  __device__ Groups(float* groups, int64_t row, int64_t chunks, unsigned threads)
      : words(reinterpret_cast<unsigned long long*>(groups + row * (chunks * threads + 2 * kRowWords))),
        bounds(reinterpret_cast<float*>(words + kRowWords)), tops(bounds + chunks * (threads / 2)),
        count(int32_t(chunks * (threads / 2))) {}
};

// What no noise of groups 2 pair and 2 pair + 1 exceeds.
__device__ __forceinline__ void pair_noise(const Stream& stream, uint32_t pair, float (&noise)[2]) {
  const Words w = philox(stream.of_groups(), pair);
  noise[0] = noise_bound(w.x[0]), noise[1] = noise_bound(w.x[2]);
}

// Key of the largest logit of a chunk, from the maxima of its groups; by one warp.
template <class T>
__device__ __forceinline__ uint64_t greedy_key(const Row<T>& row, int32_t begin, const float* tops, int32_t count) {
  const int32_t lane = int32_t(threadIdx.x % 32);
  uint64_t best = 0;
  for (int32_t u = lane; u < count; u += 32) best = most(best, make_key(tops[u], uint32_t(u)));
  best = warp_max(best);
  const float top = key_value(best);
  if (top == -kInf) return 0;
  const int32_t token = begin + int32_t(key_index(best)) * kGroup + lane;
  const uint32_t low = __ballot_sync(~0u, tidy(row.at(token)) == top);
  const uint32_t high = __ballot_sync(~0u, tidy(row.at(token + 32)) == top);
  return make_key(top, uint32_t(token - lane + (low ? __ffs(int(low)) - 1 : 31 + __ffs(int(high)))));
}

// The block's chunk of a row, from token `begin` on.
template <class T>
__device__ __forceinline__ void load_chunk(const Row<T>& row, int32_t begin, uint4 (&raw)[Row<T>::kVectors]) {
  const int32_t threads = int32_t(blockDim.x), from = begin / Row<T>::kPer, rank = int32_t(threadIdx.x);
  if (from >= row.first && from + threads * Row<T>::kVectors <= row.last) row.load_whole(from + rank, threads, raw);
  else row.load(from + rank, threads, raw, [](int32_t) { return true; });
}

// The block's sum of f(z) over its chunk.
template <class T, class F>
__device__ __forceinline__ double sum_chunk(const Row<T>& row, int32_t begin, const uint4 (&raw)[Row<T>::kVectors],
                                            const F& f) {
  __shared__ double sums[kWarps];
  double sum = 0.0;
  BEAGLE_UNROLL
  for (int n = 0; n < Row<T>::kVectors; ++n) {
    float z[Row<T>::kPer];
    unpack<T>(raw[n], z);
    BEAGLE_UNROLL
    for (int j = 0; j < Row<T>::kPer; ++j) z[j] = f(z[j]);
    sum += double(lane_sum(z));
  }
  const int32_t odd = row.odd_token(int32_t(threadIdx.x));
  if (odd >= begin && odd < begin + int32_t(blockDim.x) * 32) sum += double(f(tidy(row.at(odd))));
  for (int s = 16; s > 0; s /= 2) sum += __shfl_xor_sync(~0u, sum, s);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
  __syncthreads();
  sum = 0.0;
  for (unsigned w = 0; w < blockDim.x / 32; ++w) sum += sums[w];
  return sum;
}

// The largest of a chunk, from the maxima of its groups, to all threads.
__device__ __forceinline__ float chunk_top(const float* tops) {
  float top = -kInf;
  for (unsigned u = threadIdx.x % 32; u < blockDim.x / 2; u += 32) top = most(top, tops[u]);
  return unorder(__reduce_max_sync(~0u, order(top)));
}

// What groups 2 rank and 2 rank + 1 of a chunk hold and may reach, by its first quarter of threads.
__device__ __forceinline__ void store_groups(const Groups& groups, int32_t begin, const float* tops, float temperature,
                                             const float (&noise)[2]) {
  BEAGLE_UNROLL
  for (int i = 0; i < 2; ++i) {
    const int32_t u = 2 * int32_t(threadIdx.x) + i;
    groups.tops[begin / kGroup + u] = tops[u];
    groups.bounds[begin / kGroup + u] = tops[u] + temperature * noise[i];
  }
}

// key and flag: of the chunk. stream(): the row's, which the greedy need not make.
template <class T, class MakeStream>
__device__ __forceinline__ void scan_chunk(const T* logits, int64_t vocab, float temperature, const MakeStream& stream,
                                           const Groups& groups, uint64_t* key, int32_t* flag) {
  __shared__ float tops[kChunkGroups];
  const Row<T> row(logits, vocab);
  const int32_t threads = int32_t(blockDim.x), begin = int32_t(blockIdx.x) * threads * 32, rank = int32_t(threadIdx.x);
  uint4 raw[Row<T>::kVectors];
  load_chunk(row, begin, raw);
  const bool noisy = temperature > 0.0f, draws = noisy && threadIdx.x < blockDim.x / 4;
  float noise[2] = {};
  // drawn while the logits are on their way
  if (draws) pair_noise(stream(), uint32_t(begin / (2 * kGroup) + rank), noise);
  const bool nan = __syncthreads_or(store_tops(row, begin, raw, tops));
  if (rank < 32) {
    const uint64_t best = noisy ? 0 : greedy_key(row, begin, tops, threads / 2);
    if (rank == 0) *key = best, *flag = nan ? kStatusNan : 0;
  }
  if (!draws) return;
  if (begin == 0 && rank < kRowWords) groups.words[rank] = 0;
  store_groups(groups, begin, tops, temperature, noise);
}

}  // namespace beagle::cuda
