#include "../core/accept.h"

#include "executor.h"
#include "pool.h"

namespace beagle::cpu {

void accept_tree(const AcceptTree& op, int threads) {
  const int64_t grain = 16;
  parallel((op.batch + grain - 1) / grain, threads, [&](int64_t task) {
    Thread team;
    uint64_t match[kMaxWords];
    for (int64_t b = task * grain; b < least((task + 1) * grain, op.batch); ++b) {
      beagle::accept_tree(team, op.tree, b, op.chosen + b * op.tree.nodes, [](int32_t) { return 0; }, op.verdict,
                          match);
    }
  });
}

}  // namespace beagle::cpu
