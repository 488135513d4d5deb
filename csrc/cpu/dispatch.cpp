#include "dispatch.h"

#include <atomic>
#include <stdexcept>

#include "layer_steps.h"
#include "products.h"
#include "rows.h"

namespace beagle::cpu {

// What setup.py has compiled for each instruction set.
#define BEAGLE_ROWS(set) namespace set { extern const Rows kRows; extern const LayerSteps kLayerSteps; }
#define BEAGLE_PRODUCTS(set) namespace set { extern const Product kProducts[kKinds]; }
#define BEAGLE_INT8(set) namespace set { extern const Product kInt8Product; }
#define BEAGLE_ALL(set) BEAGLE_ROWS(set) BEAGLE_PRODUCTS(set) BEAGLE_INT8(set)
BEAGLE_ALL(baseline)
#ifdef BEAGLE_X86
BEAGLE_ALL(avx2)
BEAGLE_INT8(avx2_vnni)
BEAGLE_ALL(avx512)
BEAGLE_INT8(avx512_vnni)
BEAGLE_PRODUCTS(avx512_bf16)
#endif

namespace {

// What serves with an instruction set: what is compiled for it, or else for a lesser one.
struct Set {
  const char* name;
  const Rows* rows;
  const LayerSteps* layer_steps;
  Products products;
  Set(const char* name, const Rows& rows, const LayerSteps& steps, const Product* of, const Product& int8)
      : name(name), rows(&rows), layer_steps(&steps) {
    for (int kind = 0; kind < kKinds; ++kind) products.of[kind] = kind == kInt8 ? int8 : of[kind];
  }
};

#ifdef BEAGLE_X86
#define BEAGLE_HAS(feature) bool(__builtin_cpu_supports(feature))
bool has_avx2() { return BEAGLE_HAS("avx2") && BEAGLE_HAS("fma"); }
bool has_avx512() {
  return has_avx2() && BEAGLE_HAS("avx512f") && BEAGLE_HAS("avx512bw") && BEAGLE_HAS("avx512dq") &&
         BEAGLE_HAS("avx512vl");
}
#endif

// Those that the machine has.
std::vector<Set> sets_here() {
  std::vector<Set> sets;
  sets.emplace_back("baseline", baseline::kRows, baseline::kLayerSteps, baseline::kProducts,
                    baseline::kInt8Product);
#ifdef BEAGLE_X86
  if (has_avx2()) {
    sets.emplace_back("avx2", avx2::kRows, avx2::kLayerSteps, avx2::kProducts,
                      avx2::kInt8Product);
    if (BEAGLE_HAS("avxvnni"))
      sets.emplace_back("avx2_vnni", avx2::kRows, avx2::kLayerSteps, avx2::kProducts,
                        avx2_vnni::kInt8Product);
  }
  if (has_avx512()) {
    sets.emplace_back("avx512", avx512::kRows, avx512::kLayerSteps, avx512::kProducts,
                      avx512::kInt8Product);
    if (BEAGLE_HAS("avx512vnni")) {
      sets.emplace_back("avx512_vnni", avx512::kRows, avx512::kLayerSteps, avx512::kProducts,
                        avx512_vnni::kInt8Product);
      // no processor has it without the former
      if (BEAGLE_HAS("avx512bf16"))
        sets.emplace_back("avx512_bf16", avx512::kRows, avx512::kLayerSteps, avx512_bf16::kProducts,
                          avx512_vnni::kInt8Product);
    }
  }
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

const Products& products() { return serving().load(std::memory_order_relaxed)->products; }

}  // namespace beagle::cpu
