// A CUDA block as a Team, and what every launch shares.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "../core/ops.h"

namespace beagle::cuda {

constexpr int kThreads = 256, kWarps = kThreads / 32;

// A block of so many threads; shared holds one value a warp, twice: consecutive reductions need one barrier each.
template <int kMembers>
struct BlockOf {
  static constexpr int kTile = 8, kWarps = kMembers / 32;
  uint64_t (*shared)[kWarps];
  int turn = 0;

  __device__ int rank() const { return threadIdx.x; }
  __device__ int size() const { return kMembers; }
  __device__ void sync() const { __syncthreads(); }

  template <class T, class Join>
  __device__ __forceinline__ T reduce(T x, Join join) {
    for (int s = 16; s > 0; s /= 2) x = join(x, __shfl_xor_sync(~0u, x, s));
    uint64_t* slots = shared[turn ^= 1];
    if (threadIdx.x % 32 == 0) slots[threadIdx.x / 32] = bits_of(x);
    __syncthreads();
    T all = value_of<T>(slots[0]);
    for (int w = 1; w < kWarps; ++w) all = join(all, value_of<T>(slots[w]));
    return all;
  }
  template <class T>
  __device__ __forceinline__ T max(T x) { return reduce(x, [](T a, T b) { return a < b ? b : a; }); }
  template <class T>
  __device__ __forceinline__ T sum(T x) { return reduce(x, [](T a, T b) { return a + b; }); }
  __device__ __forceinline__ bool any(bool x) { return __syncthreads_or(x); }

  __device__ __forceinline__ uint64_t scan(uint64_t x) {
    uint64_t inclusive = x;
    for (int s = 1; s < 32; s *= 2) {
      const uint64_t left = __shfl_up_sync(~0u, inclusive, s);
      if (int(threadIdx.x % 32) >= s) inclusive += left;
    }
    uint64_t* slots = shared[turn ^= 1];
    if (threadIdx.x % 32 == 31) slots[threadIdx.x / 32] = inclusive;
    __syncthreads();
    uint64_t before = inclusive - x;
    for (int w = 0; w < rank() / 32; ++w) before += slots[w];
    return before;
  }
  // In halves: an atomic of 64 bits on shared memory is a loop that spins where threads meet, one of 32 bits is not.
  __device__ __forceinline__ void add(uint64_t* p, uint64_t x) {
    uint32_t* half = reinterpret_cast<uint32_t*>(p);
    const uint32_t low = uint32_t(x), old = atomicAdd(half, low);
    const uint32_t high = uint32_t(x >> 32) + uint32_t(old + low < old);
    if (high) atomicAdd(half + 1, high);
  }
  __device__ __forceinline__ void set(uint64_t* p, uint64_t bits) {
    uint32_t* half = reinterpret_cast<uint32_t*>(p);
    if (uint32_t(bits)) atomicOr(half, uint32_t(bits));
    if (bits >> 32) atomicOr(half + 1, uint32_t(bits >> 32));
  }
  __device__ __forceinline__ void put(float* p, float x) { atomicExch(p, x); }

 private:
  static __device__ __forceinline__ uint64_t bits_of(uint64_t x) { return x; }
  static __device__ __forceinline__ uint64_t bits_of(double x) { return uint64_t(__double_as_longlong(x)); }
  template <class T>
  static __device__ __forceinline__ T value_of(uint64_t bits) { return bit_cast<T>(bits); }
};

using Block = BlockOf<kThreads>;

// Launches blocks of so many threads on the stream; an empty grid launches nothing.
template <class Op>
void launch(void (*kernel)(Op), dim3 grid, void* stream, const Op& op, unsigned threads = kThreads) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
#if defined(BEAGLE_EMULATED)
  emulator::launch(kernel, grid, threads, stream, op);
#else
  kernel<<<grid, threads, 0, static_cast<cudaStream_t>(stream)>>>(op);
#endif
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
}

// For kernels launched by launch_dependent(), which may start before the one ahead of them in the stream ends: every
// thread calls it before it reads what that one wrote, writes what that one may read, or ends.
__device__ __forceinline__ void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
  cudaGridDependencySynchronize();
#endif
}

// Called by the kernel ahead: the next may start once all blocks of this one have called it or ended. It orders no
// memory.
__device__ __forceinline__ void let_next_start() {
#if __CUDA_ARCH__ >= 900
  cudaTriggerProgrammaticLaunchCompletion();
#endif
}

// launch() of a kernel that calls wait_for_previous(). Code made for older devices does not wait, wherever it runs.
template <class Op>
void launch_dependent(void (*kernel)(Op), dim3 grid, void* stream, const Op& op, unsigned threads = kThreads) {
#if !defined(BEAGLE_EMULATED)
  cudaFuncAttributes made;
  const bool waits = cudaFuncGetAttributes(&made, kernel) == cudaSuccess && made.ptxVersion >= 90;
  if (waits && grid.x && grid.y && grid.z) {
    cudaLaunchAttribute early;
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = grid, config.blockDim = threads, config.stream = static_cast<cudaStream_t>(stream);
    config.attrs = &early, config.numAttrs = 1;
    const cudaError_t error = cudaLaunchKernelEx(&config, kernel, op);
    if (error == cudaSuccess) return;
    cudaGetLastError();
    throw std::runtime_error(cudaGetErrorString(error));
  }
#endif
  launch(kernel, grid, stream, op, threads);
}

// What this thread wrote to global memory before is seen before what it writes after.
__device__ __forceinline__ void fence() {
#if !defined(BEAGLE_EMULATED)
  __threadfence();
#endif
}

// Calls body with a null pointer of the logits' type.
template <class Body>
void by_dtype(int32_t dtype, const Body& body) {
  if (dtype == kFloat32) body(static_cast<const float*>(nullptr));
  if (dtype == kFloat16) body(static_cast<const Half*>(nullptr));
  if (dtype == kBFloat16) body(static_cast<const BFloat*>(nullptr));
}

}  // namespace beagle::cuda
