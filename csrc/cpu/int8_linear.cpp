#include <stdexcept>
#include <string>

#include "executor.h"
#include "linear.h"

namespace beagle::cpu {

void int8_linear(const Int8Linear& op, int threads) {
  if (op.group < kLeastGroup || op.group % kLeastGroup || op.width % op.group) {
    throw std::invalid_argument("groups of " + std::to_string(op.group) + " elements of " + std::to_string(op.width) +
                                "; allowed: multiples of " + std::to_string(kLeastGroup) + " that divide them");
  }
  const Weight weight{op.weight, op.outputs, op.width, op.stride, op.scales, op.group};
  linear({op.x, op.out, op.dtype, op.rows, op.x_stride, kInt8, weight}, threads);
}

}  // namespace beagle::cpu
