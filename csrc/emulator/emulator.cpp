// The emulator's scheduler: a block's threads are fibers of one host thread, each running until it must wait for the
// others. The thread sanitizer is told of the fibers and of what orders them, so it sees the races of the device.
// Compiled without sanitizers.
#include "emulator.h"

#include <ucontext.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>

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

void wait(Gate& gate) {
  const unsigned turn = gate.turn, mine = at;
  idle = 0;
  if (++gate.arrived == gate.size) {
    gate.arrived = 0, ++gate.turn;
    return;
  }
  while (gate.turn == turn) {
    if (++idle > 4 * team) {
      std::printf("a barrier or shuffle was not reached by all its threads\n");
      std::abort();
    }
    at = (mine + 1) % team;
    go(members[mine], members[at]);
  }
}

void wait_in_order(Gate& gate) {
  char& place = gate.order[gate.turn % 2];
  release(place);
  wait(gate);
  acquire(place);
}

void live() {
  acquire(started);
  for (block.z = 0; block.z < grid.z;) {
    body(argument);
    wait_in_order(end_gate);
    // the first to come back moves the block on for all
    if (at == 0) {
      if (++block.x == grid.x) block.x = 0, ++block.y;
      if (block.y == grid.y) block.y = 0, ++block.z;
    }
    wait(end_gate);
  }
  release(ended);
  const unsigned mine = at;
  if (++finished == team) go(members[mine], home);
  at = (mine + 1) % team;
  go(members[mine], members[at]);
}

}  // namespace

void count(Counter what, uint64_t n) { counts[what].fetch_add(n, std::memory_order_relaxed); }
uint64_t counted(Counter what) { return counts[what].load(std::memory_order_relaxed); }
void reset_counts() {
  for (auto& counter : counts) counter.store(0, std::memory_order_relaxed);
}

unsigned thread_index() { return at; }
Index block_index() { return block; }
Index grid_size() { return grid; }

void sync() { wait_in_order(block_gate); }

bool any(bool x) {
  // the slot after the next is cleared: nobody can be there yet, nor still here
  const unsigned turn = vote_turn[at]++ % 3;
  votes[turn] |= x;
  sync();
  votes[(turn + 2) % 3] = false;
  return votes[turn];
}

// Orders no memory, as on the device.
uint64_t shuffle(uint64_t x, unsigned from) {
  const unsigned warp = at / kWarp, lane = at % kWarp, turn = warp_turn[at]++ % 2;
  lanes[warp][turn][lane] = x;
  wait(warp_gates[warp]);
  return lanes[warp][turn][from];
}

void run(Index blocks, unsigned threads, void (*kernel)(const void*), const void* op) {
  grid = blocks, block = {0, 0, 0}, team = threads, body = kernel, argument = op, at = finished = idle = 0;
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
  go(home, members[0]);
  acquire(ended);
  for (unsigned i = 0; i < team && __tsan_destroy_fiber; ++i) __tsan_destroy_fiber(members[i].fiber);
}

}  // namespace emulator
