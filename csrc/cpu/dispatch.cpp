#include "layer_steps.h"
#include "products.h"
#include "rows.h"

namespace beagle::cpu {

#define BEAGLE_SET(set)                \
  namespace set {                      \
  extern const Rows kRows;             \
  extern const Products kProducts;     \
  extern const LayerSteps kLayerSteps; \
  }
BEAGLE_SET(baseline)
#ifdef BEAGLE_X86
BEAGLE_SET(avx2)
BEAGLE_SET(avx512)

namespace {
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma");
}
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
}  // namespace

#define BEAGLE_BEST(name) (has_avx512() ? avx512::name : has_avx2() ? avx2::name : baseline::name)
const char* instruction_set() { return has_avx512() ? "avx512" : has_avx2() ? "avx2" : "baseline"; }
#else
#define BEAGLE_BEST(name) baseline::name
const char* instruction_set() { return "baseline"; }
#endif

const Rows& rows() {
  static const Rows& best = BEAGLE_BEST(kRows);
  return best;
}

const LayerSteps& layer_steps() {
  static const LayerSteps& best = BEAGLE_BEST(kLayerSteps);
  return best;
}

const Products& products() {
  static const Products& best = BEAGLE_BEST(kProducts);
  return best;
}

}  // namespace beagle::cpu
