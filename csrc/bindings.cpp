// Python bindings: pointers, sizes, strides and a stream in; nothing is allocated, nothing waits.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "core/chain.h"
#include "cpu/dispatch.h"
#include "cpu/executor.h"
#ifdef BEAGLE_CUDA
#include "cuda/executor.h"
#endif

namespace py = pybind11;
using namespace beagle;

namespace {

// Reads an op's fields, in their order, from what Python gave after the stream or the number of threads.
class Reader {
 public:
  explicit Reader(const py::args& values) : values_(values) {}

  template <class Op>
  Op op() {
    Op op{};
    read(op);
    if (next_ != values_.size()) fail("too many");
    return op;
  }

 private:
  template <class T>
  void read(T*& pointer) {
    pointer = reinterpret_cast<T*>(value<uintptr_t>());
  }
  template <class T>
  std::enable_if_t<std::is_arithmetic_v<T>> read(T& number) {
    number = value<T>();
  }
  template <class T>
  std::enable_if_t<std::is_class_v<T>> read(T& part) {
    part.fields([this](auto&... field) { (read(field), ...); });
  }
  template <class T>
  T value() {
    if (next_ == values_.size()) fail("too few");
    return values_[next_++].cast<T>();
  }
  [[noreturn]] void fail(const char* what) const {
    throw py::type_error(std::string(what) + " arguments: " + std::to_string(values_.size()) +
                         "; allowed: the op's fields in csrc/core/ops.h");
  }

  const py::args values_;
  size_t next_ = 0;
};

// Executors index tables by an op's dtype, where it has one, and hold a tree's nodes in arrays of a fixed size.
template <class Op>
auto check_dtype(const Op& op, int) -> decltype(void(op.dtype)) {
  if (op.dtype < 0 || op.dtype >= kDtypes) {
    throw std::invalid_argument("dtype is " + std::to_string(op.dtype) + "; allowed: the values of _C.dtypes");
  }
}
template <class Op>
void check_dtype(const Op&, ...) {}
template <class Op>
auto check_kind(const Op& op, int) -> decltype(void(op.kind)) {
  if (op.kind < 0 || op.kind >= kKinds) {
    throw std::invalid_argument("kind is " + std::to_string(op.kind) + "; allowed: the values of _C.dtypes, _C.int8, _C.exact");
  }
}
template <class Op>
void check_kind(const Op&, ...) {}
template <class Op>
auto check_tree(const Op& op, int) -> decltype(void(op.tree)) {
  if (op.tree.nodes > kMaxNodes || op.tree.words > kMaxNodes / 64) {
    throw std::invalid_argument(std::to_string(op.tree.nodes) + " nodes in " + std::to_string(op.tree.words) +
                                " words; allowed: up to " + std::to_string(kMaxNodes) + ", in words of 64");
  }
}
template <class Op>
void check_tree(const Op&, ...) {}

// Runs an op without the interpreter lock, and names it in what it throws.
template <class Op, class Executor>
void launch(const char* name, Executor run, const Op& op, int64_t where) {
  const py::gil_scoped_release release;
  try {
    check_dtype(op, 0), check_kind(op, 0), check_tree(op, 0);
    run(op, where);
  } catch (const std::exception& error) {
    throw std::runtime_error(std::string(name) + ": " + error.what());
  }
}

template <class Op, class Executor>
void bind(py::module_ m, const char* name, Executor run) {
  m.def(name, [name, run](int64_t where, const py::args& values) { launch(name, run, Reader(values).op<Op>(), where); });
}

// The ops that both executors have; `where` is the number of threads or the stream.
template <class E>
void bind_all(py::module_ m) {
  bind<ChooseTokens>(m, "choose_tokens", E::choose_tokens);
  bind<PerturbLogits>(m, "perturb_logits", E::perturb_logits);
  bind<AdjustLogits>(m, "adjust_logits", E::adjust_logits);
  bind<TopCandidates>(m, "top_candidates", E::top_candidates);
  bind<BuildTree>(m, "build_tree", E::build_tree);
  bind<JoinBranch>(m, "join_branch", E::join_branch);
  bind<Lookup>(m, "lookup", E::lookup);
  bind<AcceptTree>(m, "accept_tree", E::accept_tree);
  bind<VerifyTree>(m, "verify_tree", E::verify_tree);
  bind<VerifyChain>(m, "verify_chain", E::verify_chain);
  bind<CompactCache>(m, "compact_cache", E::compact_cache);
}

struct Cpu {
#define CPU(name, Op) \
  static void name(const Op& op, int64_t threads) { cpu::name(op, int(threads)); }
  CPU(choose_tokens, ChooseTokens)
  CPU(perturb_logits, PerturbLogits)
  CPU(adjust_logits, AdjustLogits)
  CPU(top_candidates, TopCandidates)
  CPU(build_tree, BuildTree)
  CPU(join_branch, JoinBranch)
  CPU(lookup, Lookup)
  CPU(accept_tree, AcceptTree)
  CPU(verify_tree, VerifyTree)
  CPU(verify_chain, VerifyChain)
  CPU(compact_cache, CompactCache)
  CPU(tree_attention, TreeAttention)
  CPU(skinny_linear, SkinnyLinear)
  CPU(int8_linear, Int8Linear)
};

#ifdef BEAGLE_CUDA
struct Cuda {
#define CUDA(name, Op) \
  static void name(const Op& op, int64_t stream) { cuda::name(op, reinterpret_cast<void*>(stream)); }
  CUDA(choose_tokens, ChooseTokens)
  CUDA(perturb_logits, PerturbLogits)
  CUDA(adjust_logits, AdjustLogits)
  CUDA(top_candidates, TopCandidates)
  CUDA(build_tree, BuildTree)
  CUDA(join_branch, JoinBranch)
  CUDA(lookup, Lookup)
  CUDA(accept_tree, AcceptTree)
  CUDA(verify_tree, VerifyTree)
  CUDA(verify_chain, VerifyChain)
  CUDA(compact_cache, CompactCache)
};

void bind_why_not(py::module_ m) {
  m.def("why_not", [](int device) -> py::object {
    std::string reason;
    {
      const py::gil_scoped_release release;
      reason = cuda::why_not(device, BEAGLE_ARCHS);
    }
    return reason.empty() ? py::none() : py::object(py::str(reason));
  });
}
#endif

// Decoder layers, read once from Python and then called with new tokens and where each layer's keys and values lie.
struct DecoderLayers {
  std::vector<LayerParts> parts;

  explicit DecoderLayers(const py::list& layers) {
    for (const py::handle& layer : layers) {
      parts.push_back(Reader(layer.cast<py::args>()).op<LayerParts>());
      check_dtype(parts.back(), 0);
      const LayerParts& made = parts.back();
      for (const LinearWeight* one : {&made.q, &made.k, &made.v, &made.o, &made.gate, &made.up, &made.down})
        check_kind(*one, 0);
    }
  }

  void run(int threads, const py::list& planes, const py::args& values) const {
    const NewTokens tokens = Reader(values).op<NewTokens>();
    std::vector<DecoderLayer> layers(parts.size());
    for (size_t i = 0; i < parts.size(); ++i) {
      static_cast<LayerParts&>(layers[i]) = parts[i];
      static_cast<NewTokens&>(layers[i]) = tokens;
      layers[i].keys = Reader(planes[2 * i].cast<py::args>()).op<CachePlane>();
      layers[i].values = Reader(planes[2 * i + 1].cast<py::args>()).op<CachePlane>();
    }
    const py::gil_scoped_release release;
    cpu::decoder_layers(layers.data(), int64_t(layers.size()), threads);
  }
};

void bind_layers(py::module_ m) {
  py::class_<DecoderLayers>(m, "DecoderLayers")
      .def(py::init<const py::list&>())
      .def("run", &DecoderLayers::run);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Executors of the verification ops";
  m.attr("law_size") = sizeof(Law);
  m.attr("max_nodes") = kMaxNodes;
  m.attr("chunk") = kChunk;
  m.attr("row_words") = kRowWords;
  m.attr("part_words") = kPartWords;
  m.attr("max_k") = kMaxK;
  m.attr("max_rows") = kMaxRows;
  py::dict dtypes;
  dtypes["float32"] = int(kFloat32), dtypes["float16"] = int(kFloat16), dtypes["bfloat16"] = int(kBFloat16);
  m.attr("dtypes") = dtypes;
  m.attr("exact") = int(kExact), m.attr("int8") = int(kInt8);
  m.attr("no_cuda") = BEAGLE_NO_CUDA;
  m.attr("archs") = BEAGLE_ARCHS;
  m.attr("instruction_set") = cpu::instruction_sets().back();
  m.attr("instruction_sets") = py::tuple(py::cast(cpu::instruction_sets()));
  m.def("use_instruction_set", &cpu::use_instruction_set);
  m.def("row_offset", &row_offset);
  py::module_ cpu = m.def_submodule("cpu");
  bind_all<Cpu>(cpu);
  bind<TreeAttention>(cpu, "tree_attention", Cpu::tree_attention);
  bind<SkinnyLinear>(cpu, "skinny_linear", Cpu::skinny_linear);
  bind_layers(cpu);
  bind<Int8Linear>(cpu, "int8_linear", Cpu::int8_linear);
#ifdef BEAGLE_CUDA
  bind_all<Cuda>(m.def_submodule("cuda"));
  bind_why_not(m.attr("cuda"));
#endif
}
