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
#define gridDim emulator::grid_size()

struct alignas(16) uint4 { uint32_t x, y, z, w; };
struct dim3 : emulator::Index {
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : Index{x, y, z} {}
};
using cudaStream_t = void*;
enum cudaError_t { cudaSuccess };
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return ""; }

inline void __syncthreads() { emulator::sync(); }
inline int __syncthreads_or(int x) { return emulator::any(x != 0); }
template <class T>
T shuffle(T x, unsigned from) {
  static_assert(sizeof(T) == 8);
  uint64_t bits;
  __builtin_memcpy(&bits, &x, 8);
  bits = emulator::shuffle(bits, from);
  __builtin_memcpy(&x, &bits, 8);
  return x;
}
template <class T>
T __shfl_xor_sync(unsigned, T x, unsigned lanes) { return shuffle(x, threadIdx.x % 32 ^ lanes); }
template <class T>
T __shfl_up_sync(unsigned, T x, unsigned by) { return shuffle(x, threadIdx.x % 32 - (threadIdx.x % 32 < by ? 0 : by)); }
template <class T, class U>
T atomicAdd(T* p, U x) { return __atomic_fetch_add(p, T(x), __ATOMIC_RELAXED); }
template <class T, class U>
T atomicOr(T* p, U x) { return __atomic_fetch_or(p, T(x), __ATOMIC_RELAXED); }
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
