// Threads of the host executor, and the function multiversioning of its inner loops.
#pragma once

#include <cstdint>
#include <functional>

#if defined(__x86_64__) && defined(__linux__) && defined(__GLIBC__) && !defined(BEAGLE_NO_CLONES)
#define BEAGLE_CLONES __attribute__((target_clones("avx512f", "avx2", "default"), flatten))
#else
#define BEAGLE_CLONES
#endif

namespace beagle::cpu {

// Runs task(0) .. task(count - 1) on up to `threads` threads, the caller among them; returns when all are done.
void parallel(int64_t count, int threads, const std::function<void(int64_t)>& task);

// Scratch of this thread, aligned for any vector, until it asks again.
float* room(int64_t floats);

}  // namespace beagle::cpu
