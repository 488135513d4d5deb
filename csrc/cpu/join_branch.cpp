#include "../core/join.h"

#include "executor.h"
#include "pool.h"

namespace beagle::cpu {

void join_branch(const JoinBranch& op, int threads) {
  const int64_t grain = 16;
  parallel((op.batch + grain - 1) / grain, threads, [&](int64_t task) {
    Thread team;
    for (int64_t b = task * grain; b < least((task + 1) * grain, op.batch); ++b) beagle::join_branch(team, op, b);
  });
}

}  // namespace beagle::cpu
