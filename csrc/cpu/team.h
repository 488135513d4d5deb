// Several steps on the same threads: each waits for the work of the one before, never for a thread.
#pragma once

#include <atomic>
#include <memory>
#include <thread>

#include "pool.h"

namespace beagle::cpu {

// One thread's view of a team. All members call `each` in the same order with the same counts.
class Team {
 public:
  struct Step {
    alignas(64) std::atomic<int64_t> next{0};
    alignas(64) std::atomic<int64_t> done{0};
  };

  Team(Step* steps, int member) : member(member), step_(steps) {}

  // Runs task(0) .. task(count - 1), shared out among those who are here; returns when all are done. A member that comes
  // late finds its tasks taken and goes on.
  template <class Task>
  void each(int64_t count, const Task& task) {
    Step& step = *step_++;
    int64_t mine = 0;
    for (int64_t i; (i = step.next.fetch_add(1, std::memory_order_relaxed)) < count; ++mine) task(i);
    if (mine) step.done.fetch_add(mine, std::memory_order_release);
    for (int spins = 0; step.done.load(std::memory_order_acquire) < count; ++spins)
      if (spins > kSpins) std::this_thread::yield();
  }

  const int member;  // from 0 on: whose scratch this thread uses

 private:
  // A step takes microseconds; a member that has lost its core takes longer.
  static constexpr int kSpins = 2000;
  Step* step_;
};

// Runs body(team) on up to `threads` threads, with at most `steps` calls of each in it.
template <class Body>
void together(int threads, int64_t steps, const Body& body) {
  const std::unique_ptr<Team::Step[]> memory(new Team::Step[steps]);
  parallel(threads, threads, [&](int64_t member) {
    Team team(memory.get(), int(member));
    body(team);
  });
}

}  // namespace beagle::cpu
