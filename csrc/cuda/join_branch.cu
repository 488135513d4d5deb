#include "../core/join.h"

#include "executor.h"
#include "team.cuh"

namespace beagle::cuda {
namespace {

__global__ void __launch_bounds__(kThreads) join_rows(const JoinBranch op) {
  __shared__ uint64_t slots[2][kWarps];
  Block team{slots};
  beagle::join_branch(team, op, blockIdx.x);
}

}  // namespace

void join_branch(const JoinBranch& op, void* stream) {
  launch(join_rows, op.batch, stream, op);
}

}  // namespace beagle::cuda
