#include "rows.h"

namespace beagle::cpu {

namespace baseline { extern const Rows kRows; }
#ifdef BEAGLE_X86
namespace avx2 { extern const Rows kRows; }
namespace avx512 { extern const Rows kRows; }
#endif

const Rows& rows() {
#ifdef BEAGLE_X86
  static const Rows& best = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") ? avx512::kRows
                            : __builtin_cpu_supports("avx2")                                       ? avx2::kRows
                                                                                                   : baseline::kRows;
  return best;
#else
  return baseline::kRows;
#endif
}

}  // namespace beagle::cpu
