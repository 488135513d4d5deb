#include "../core/lookup.h"

#include "executor.h"
#include "pool.h"

namespace beagle::cpu {
namespace {

BEAGLE_CLONES void look_up_row(const Lookup& op, int64_t b) {
  Thread team;
  beagle::lookup(team, op, b);
}

}  // namespace

void lookup(const Lookup& op, int threads) {
  // waking a thread takes as long as reading some ten thousands of tokens
  const int64_t enough = 131072, grain = most<int64_t>(1, enough / most<int64_t>(1, op.size));
  parallel((op.batch + grain - 1) / grain, threads, [&](int64_t task) {
    for (int64_t b = task * grain; b < least((task + 1) * grain, op.batch); ++b) look_up_row(op, b);
  });
}

}  // namespace beagle::cpu
