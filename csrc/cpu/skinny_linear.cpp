#include "executor.h"
#include "linear.h"

namespace beagle::cpu {

void skinny_linear(const SkinnyLinear& op, int threads) {
  const Weight weight{op.weight, op.outputs, op.width, op.stride};
  linear({op.x, op.out, op.dtype, op.rows, op.x_stride, op.kind, weight}, threads);
}

}  // namespace beagle::cpu
