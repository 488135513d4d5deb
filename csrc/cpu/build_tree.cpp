#include "../core/tree.h"

#include "executor.h"
#include "pool.h"

namespace beagle::cpu {
namespace {

BEAGLE_CLONES void build_row(const BuildTree& op, int64_t b, Scratch& scratch) {
  Thread team;
  beagle::build_tree(team, op, b, scratch);
}

}  // namespace

void build_tree(const BuildTree& op, int threads) {
  const int64_t grain = 8;
  parallel((op.batch + grain - 1) / grain, threads, [&](int64_t task) {
    Scratch scratch;
    for (int64_t b = task * grain; b < least((task + 1) * grain, op.batch); ++b) build_row(op, b, scratch);
  });
}

}  // namespace beagle::cpu
