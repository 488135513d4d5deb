#include "../core/accept.h"

#include "executor.h"
#include "team.cuh"

namespace beagle::cuda {
namespace {

__global__ void __launch_bounds__(kThreads) accept_rows(const AcceptTree op) {
  __shared__ uint64_t slots[2][kWarps], match[kMaxWords];
  Block team{slots};
  beagle::accept_tree(team, op.tree, blockIdx.x, op.chosen + int64_t(blockIdx.x) * op.tree.nodes, [](int32_t) { return 0; },
                      op.verdict, match);
}

}  // namespace

void accept_tree(const AcceptTree& op, void* stream) {
  launch(accept_rows, op.batch, stream, op);
}

}  // namespace beagle::cuda
