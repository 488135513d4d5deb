#include "../core/tree.h"

#include "executor.h"
#include "team.cuh"

namespace beagle::cuda {
namespace {

__global__ void __launch_bounds__(kThreads) build_rows(const BuildTree op) {
  __shared__ uint64_t slots[2][kWarps];
  __shared__ Scratch scratch;
  Block team{slots};
  beagle::build_tree(team, op, blockIdx.x, scratch);
}

}  // namespace

void build_tree(const BuildTree& op, void* stream) {
  launch(build_rows, op.batch, stream, op);
}

}  // namespace beagle::cuda
