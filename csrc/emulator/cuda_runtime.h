// Stands in for CUDA's header so that a host compiler builds csrc/cuda/*.cu as they are. `__shared__` is static memory
// that keeps what the block before left. A barrier or shuffle that not all threads reach ends the program.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "emulator.h"

// the device's own branches of the code, from here on
#define __CUDACC__ 1
#define __CUDA_ARCH__ 900
#define __host__
#define __device__
#define __global__
#define __shared__ static
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define threadIdx emulator::Index({emulator::thread_index(), 0, 0})
#define blockIdx emulator::block_index()
#define blockDim emulator::block_size()
#define gridDim emulator::grid_size()

// as nvcc has them, they may be read through pointers to anything
struct __attribute__((may_alias, aligned(16))) uint4 { uint32_t x, y, z, w; };
struct dim3 : emulator::Index {
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : Index{x, y, z} {}
};
using cudaStream_t = void*;
enum cudaError_t { cudaSuccess };
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return ""; }

inline void __syncthreads() { emulator::sync(); }
inline int __syncthreads_or(int x) { return emulator::any(x != 0); }
inline void cudaGridDependencySynchronize() {}
inline void cudaTriggerProgrammaticLaunchCompletion() {}

namespace emulator {
inline void check_mask(unsigned mask) {
  if (mask != ~0u) fail("a warp's function has a mask that leaves lanes out");
}
template <class T>
const uint64_t* of_warp(unsigned mask, T x) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  check_mask(mask);
  uint64_t bits = 0;
  __builtin_memcpy(&bits, &x, sizeof(T));
  return exchange(bits);
}
}  // namespace emulator

template <class T>
T __shfl_sync(unsigned mask, T x, unsigned from) {
  __builtin_memcpy(&x, &emulator::of_warp(mask, x)[from % 32], sizeof(T));
  return x;
}
template <class T>
T __shfl_xor_sync(unsigned mask, T x, unsigned lanes) { return __shfl_sync(mask, x, threadIdx.x ^ lanes); }
template <class T>
T __shfl_up_sync(unsigned mask, T x, unsigned by) {
  const unsigned lane = threadIdx.x % 32;
  return __shfl_sync(mask, x, lane < by ? lane : lane - by);
}
inline unsigned __ballot_sync(unsigned mask, int vote) {
  const uint64_t* votes = emulator::of_warp(mask, vote);
  unsigned all = 0;
  for (unsigned i = 0; i < 32; ++i) all |= unsigned(votes[i] != 0) << i;
  return all;
}
inline int __any_sync(unsigned mask, int vote) { return __ballot_sync(mask, vote) != 0; }
inline unsigned __reduce_max_sync(unsigned mask, unsigned x) {
  const uint64_t* all = emulator::of_warp(mask, x);
  return unsigned(*std::max_element(all, all + 32));
}
inline void __syncwarp(unsigned mask = ~0u) {
  emulator::check_mask(mask);
  emulator::sync_warp();
}

template <class T, class U>
T atomicAdd(T* p, U x) { return __atomic_fetch_add(p, T(x), __ATOMIC_RELAXED); }
template <class T, class U>
T atomicOr(T* p, U x) { return __atomic_fetch_or(p, T(x), __ATOMIC_RELAXED); }
template <class T, class U>
T atomicMax(T* p, U x) {
  T old = __atomic_load_n(p, __ATOMIC_RELAXED);
  while (old < T(x) && !__atomic_compare_exchange_n(p, &old, T(x), false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {}
  return old;
}
inline float atomicExch(float* p, float x) {
  __atomic_exchange(p, &x, &x, __ATOMIC_RELAXED);
  return x;
}
inline int __ffs(int x) { return __builtin_ffs(x); }
inline long long __double_as_longlong(double x) {
  long long bits;
  __builtin_memcpy(&bits, &x, 8);
  return bits;
}

namespace emulator {

// At most 65535 blocks along y and z, as on the device.
template <class Op>
void launch(void (*kernel)(Op), dim3 grid, unsigned threads, cudaStream_t, const Op& op) {
  if (grid.y > 65535 || grid.z > 65535) throw std::runtime_error("invalid configuration argument");
  struct Call {
    void (*kernel)(Op);
    const Op& op;
  } const call{kernel, op};
  run(grid, threads, [](const void* p) { static_cast<const Call*>(p)->kernel(static_cast<const Call*>(p)->op); }, &call);
}

}  // namespace emulator
