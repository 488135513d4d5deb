#include "dispatch.h"

#include <atomic>
#include <stdexcept>

#include "layer_steps.h"
#include "products.h"
#include "rows.h"

namespace beagle::cpu {

#define BEAGLE_ROWS(set) namespace set { extern const Rows kRows; extern const LayerSteps kLayerSteps; }
#define BEAGLE_PRODUCTS(set) namespace set { extern const Products kProducts; }
BEAGLE_ROWS(baseline)
BEAGLE_PRODUCTS(baseline)
#ifdef BEAGLE_X86
BEAGLE_ROWS(avx2)
BEAGLE_PRODUCTS(avx2)
BEAGLE_ROWS(avx512)
BEAGLE_PRODUCTS(avx512)
BEAGLE_PRODUCTS(avx512_bf16)
#endif

namespace {

// What serves with an instruction set: what is compiled for it, or else for a lesser one.
struct Set {
  const char* name;
  const Rows* rows;
  const LayerSteps* layer_steps;
  const Products* products;
};

#ifdef BEAGLE_X86
#define BEAGLE_HAS(feature) bool(__builtin_cpu_supports(feature))
#endif

// Those that the machine has.
std::vector<Set> sets_here() {
  std::vector<Set> sets{{"baseline", &baseline::kRows, &baseline::kLayerSteps, &baseline::kProducts}};
#ifdef BEAGLE_X86
  if (!BEAGLE_HAS("avx2") || !BEAGLE_HAS("fma")) return sets;
  sets.push_back({"avx2", &avx2::kRows, &avx2::kLayerSteps, &avx2::kProducts});
  if (!BEAGLE_HAS("avx512f") || !BEAGLE_HAS("avx512bw") || !BEAGLE_HAS("avx512dq") || !BEAGLE_HAS("avx512vl")) return sets;
  sets.push_back({"avx512", &avx512::kRows, &avx512::kLayerSteps, &avx512::kProducts});
  if (BEAGLE_HAS("avx512bf16")) sets.push_back({"avx512_bf16", &avx512::kRows, &avx512::kLayerSteps, &avx512_bf16::kProducts});
#endif
  return sets;
}

const std::vector<Set>& sets() {
  static const std::vector<Set> here = sets_here();
  return here;
}

std::atomic<const Set*>& serving() {
  static std::atomic<const Set*> one{&sets().back()};
  return one;
}

}  // namespace

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const Set& set : sets()) names.push_back(set.name);
  return names;
}

void use_instruction_set(const std::string& name) {
  std::string allowed;
  for (const Set& set : sets()) {
    if (name == set.name) return serving().store(&set);
    allowed += (allowed.empty() ? "" : ", ") + std::string(set.name);
  }
  throw std::invalid_argument("instruction set is '" + name + "'; allowed here: " + allowed);
}

const Rows& rows() { return *serving().load(std::memory_order_relaxed)->rows; }

const LayerSteps& layer_steps() { return *serving().load(std::memory_order_relaxed)->layer_steps; }

const Products& products() { return *serving().load(std::memory_order_relaxed)->products; }

}  // namespace beagle::cpu
