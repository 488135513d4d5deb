// The emulator's scheduler: a block's threads are fibers of one host thread, each running until it must wait for the
// others. The thread sanitizer is told of the fibers and of what orders them, so it sees the races of the device.
// Compiled without sanitizers.
#include "emulator.h"

#include <ucontext.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <numeric>
#include <utility>

extern "C" {
#define WEAK __attribute__((weak))
WEAK void* __tsan_get_current_fiber();
WEAK void* __tsan_create_fiber(unsigned);
WEAK void __tsan_destroy_fiber(void*);
WEAK void __tsan_switch_to_fiber(void*, unsigned);
WEAK void __tsan_acquire(void*);
WEAK void __tsan_release(void*);
}

namespace emulator {
namespace {

constexpr unsigned kMost = 1024, kStack = 256 << 10, kNoOrder = 1;

struct Member {
  ucontext_t context;
  char* stack;
  void* fiber;
};
// A place where `size` members wait for each other. What one wrote before it is seen after it, in turns of two places:
// in one place a member that is ahead would order what it did since.
struct Gate {
  unsigned size, arrived, turn;
  char order[2];
};

Member members[kMost], home;
Gate block_gate, end_gate, warp_gates[kMost / kWarp];
uint64_t lanes[kMost / kWarp][2][kWarp];
unsigned warp_turn[kMost], vote_turn[kMost];
bool votes[3];
unsigned team, at, finished, idle;
unsigned following[kMost];  // who runs when one waits: a cycle through the block
uint64_t seeded, state;
uint64_t blocks_left, linear, stride;
Index grid, block;
void (*body)(const void*);
const void* argument;
char started, ended;
std::atomic<uint64_t> counts[kCounters];

void acquire(char& place) { if (__tsan_acquire) __tsan_acquire(&place); }
void release(char& place) { if (__tsan_release) __tsan_release(&place); }

void go(Member& from, Member& to) {
  if (__tsan_switch_to_fiber) __tsan_switch_to_fiber(to.fiber, kNoOrder);
  swapcontext(&from.context, &to.context);
}

// splitmix64
uint64_t below(uint64_t n) {
  uint64_t x = state += 0x9E3779B97F4A7C15u;
  x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9u;
  x = (x ^ x >> 27) * 0x94D049BB133111EBu;
  return (x ^ x >> 31) % n;
}

void shuffle_threads() {
  static unsigned order[kMost];
  for (unsigned i = 0; i < team; ++i) order[i] = i;
  for (unsigned i = team; seeded && i > 1; --i) std::swap(order[i - 1], order[below(i)]);
  for (unsigned i = 0; i < team; ++i) following[order[i]] = order[(i + 1) % team];
}

void pass() {
  const unsigned mine = at;
  at = following[mine];
  go(members[mine], members[at]);
}

void wait(Gate& gate) {
  const unsigned turn = gate.turn;
  idle = 0;
  if (++gate.arrived == gate.size) {
    gate.arrived = 0, ++gate.turn;
    if (gate.size < team || !seeded) return;
    shuffle_threads();
    pass();
    return;
  }
  while (gate.turn == turn) {
    if (++idle > 4 * team) fail("a barrier or shuffle was not reached by all its threads");
    pass();
  }
}

void wait_in_order(Gate& gate) {
  char& place = gate.order[gate.turn % 2];
  release(place);
  wait(gate);
  acquire(place);
}

void place_block() {
  block = {unsigned(linear % grid.x), unsigned(linear / grid.x % grid.y), unsigned(linear / grid.x / grid.y)};
}

void live() {
  acquire(started);
  while (blocks_left) {
    body(argument);
    wait_in_order(end_gate);
    vote_turn[at] = warp_turn[at] = 0;
    if (at == 0) {
      const uint64_t total = uint64_t(grid.x) * grid.y * grid.z;
      --blocks_left, linear = (linear + stride) % total;
      for (bool& vote : votes) vote = false;
      place_block();
    }
    wait(end_gate);
  }
  release(ended);
  if (++finished == team) go(members[at], home);
  pass();
}

// A stride without a common divisor meets every block once.
void place_blocks(Index blocks) {
  const uint64_t total = uint64_t(blocks.x) * blocks.y * blocks.z;
  grid = blocks, blocks_left = total, linear = 0, stride = 1;
  if (seeded) {
    linear = below(total);
    do stride = 1 + below(total); while (std::gcd(stride, total) != 1);
  }
  place_block();
}

}  // namespace

void count(Counter what, uint64_t n) { counts[what].fetch_add(n, std::memory_order_relaxed); }
uint64_t counted(Counter what) { return counts[what].load(std::memory_order_relaxed); }
void reset_counts() {
  for (auto& counter : counts) counter.store(0, std::memory_order_relaxed);
}

unsigned thread_index() { return at; }
Index block_index() { return block; }
Index block_size() { return {team, 1, 1}; }
Index grid_size() { return grid; }

void seed(uint64_t number) { seeded = state = number; }

void fail(const char* why) {
  std::printf("%s (seed %llu)\n", why, static_cast<unsigned long long>(seeded));
  std::fflush(stdout);
  std::abort();
}

void sync() { wait_in_order(block_gate); }
void sync_warp() { wait_in_order(warp_gates[at / kWarp]); }

bool any(bool x) {
  // the slot after the next is cleared: nobody can be there yet, nor still here
  const unsigned turn = vote_turn[at]++ % 3;
  votes[turn] |= x;
  sync();
  votes[(turn + 2) % 3] = false;
  return votes[turn];
}

// Orders no memory, as on the device.
const uint64_t* exchange(uint64_t x) {
  const unsigned warp = at / kWarp, lane = at % kWarp, turn = warp_turn[at]++ % 2;
  lanes[warp][turn][lane] = x;
  wait(warp_gates[warp]);
  return lanes[warp][turn];
}

void run(Index blocks, unsigned threads, void (*kernel)(const void*), const void* op) {
  if (threads == 0 || threads > kMost || threads % kWarp) fail("a block is not of whole warps, or too large");
  team = threads, body = kernel, argument = op, finished = idle = 0;
  place_blocks(blocks);
  shuffle_threads();
  at = seeded ? unsigned(below(team)) : 0;
  block_gate = end_gate = {threads, 0, 0, {}};
  for (Gate& gate : warp_gates) gate = {kWarp, 0, 0, {}};
  if (__tsan_get_current_fiber) home.fiber = __tsan_get_current_fiber();
  release(started);
  for (unsigned i = 0; i < team; ++i) {
    Member& member = members[i];
    if (!member.stack) member.stack = static_cast<char*>(std::malloc(kStack));
    if (__tsan_create_fiber) member.fiber = __tsan_create_fiber(0);
    getcontext(&member.context);
    member.context.uc_stack.ss_sp = member.stack, member.context.uc_stack.ss_size = kStack;
    member.context.uc_link = nullptr;
    makecontext(&member.context, live, 0);
  }
  go(home, members[at]);
  acquire(ended);
  for (unsigned i = 0; i < team && __tsan_destroy_fiber; ++i) __tsan_destroy_fiber(members[i].fiber);
}

}  // namespace emulator
