// What a CUDA block's threads ask of each other, on the host; one block at a time, from one thread at a time.
#pragma once

#include <cstdint>

namespace emulator {

constexpr unsigned kWarp = 32;
struct Index { unsigned x, y, z; };

unsigned thread_index();
Index block_index();
Index block_size();
Index grid_size();
void sync();
void sync_warp();
bool any(bool x);
// x of every lane of the warp, until the exchange after the next.
const uint64_t* exchange(uint64_t x);
// The order in which blocks run, and threads after each barrier: random by the seed, by their index for 0.
void seed(uint64_t number);
// Ends the program, with the seed.
[[noreturn]] void fail(const char* why);
// Runs kernel(op) in every thread of every block, the blocks one after the other; whole warps.
void run(Index blocks, unsigned threads, void (*kernel)(const void*), const void* op);

// What the algorithms count of their work, by any host thread: logits loaded, calls of Philox (four words each), groups
// of logits looked into one by one.
enum Counter { kLogits, kPhilox, kLooks, kCounters };
void count(Counter what, uint64_t n);
uint64_t counted(Counter what);
void reset_counts();

}  // namespace emulator
