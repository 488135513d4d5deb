// Two launches: a block for each row of logits measures it, then a block for each chain verifies it.
#include "../core/chain.h"

#include "executor.h"
#include "team.cuh"

namespace beagle::cuda {
namespace {

template <class T>
__global__ void __launch_bounds__(kThreads, 2) measure_rows(const VerifyChain op) {
  __shared__ uint64_t slots[2][kWarps];
  __shared__ Scratch scratch;
  Block team{slots};
  const int64_t b = blockIdx.y, i = blockIdx.x, d = i - op.steps - 1;
  const RowSampling sampling = op.sampling.at(b);
  const T* row = d < 0 ? static_cast<const T*>(op.target) + row_offset(b, i, op.target_b, op.target_n)
                       : static_cast<const T*>(op.draft) + row_offset(b, d, op.draft_b, op.draft_n);
  const Law law = measure(team, row, d < 0 ? op.vocab : op.draft_vocab, sampling, scratch);
  if (team.rank() == 0) static_cast<Law*>(op.laws)[b * (2 * op.steps + 1) + i] = law;
}

template <class T>
__global__ void __launch_bounds__(kThreads, 2) verify_rows(const VerifyChain op) {
  __shared__ uint64_t slots[2][kWarps];
  Block team{slots};
  const int64_t b = blockIdx.x;
  const Law* laws = static_cast<const Law*>(op.laws) + b * (2 * op.steps + 1);
  Chain<T>{op, b, op.sampling.at(b), laws}.run(team);
}

}  // namespace

void verify_chain(const VerifyChain& op, void* stream) {
  by_dtype(op.dtype, [&](auto* type) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
    launch(measure_rows<T>, dim3(2 * op.steps + 1, op.batch), stream, op);
    launch(verify_rows<T>, op.batch, stream, op);
  });
}

}  // namespace beagle::cuda
