#include "../core/lookup.h"

#include "executor.h"
#include "team.cuh"

namespace beagle::cuda {
namespace {

// As many threads as a block may have: a row has one block, and the time is that of reading its text.
constexpr int kRowThreads = 1024;

__global__ void __launch_bounds__(kRowThreads) look_up_rows(const Lookup op) {
  __shared__ uint64_t slots[2][BlockOf<kRowThreads>::kWarps];
  BlockOf<kRowThreads> team{slots};
  beagle::lookup(team, op, blockIdx.x);
}

}  // namespace

void lookup(const Lookup& op, void* stream) {
  launch(look_up_rows, op.batch, stream, op, kRowThreads);
}

}  // namespace beagle::cuda
