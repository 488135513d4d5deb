// Python bindings: pointers, sizes, strides and a stream in; nothing is allocated, nothing waits.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "core/chain.h"
#include "cpu/executor.h"
#ifdef BEAGLE_CUDA
#include "cuda/executor.h"
#endif

namespace py = pybind11;
using namespace beagle;
using Pointer = uintptr_t;

namespace {

template <class T>
T* as(Pointer address) {
  return reinterpret_cast<T*>(address);
}

Settings settings(const py::tuple& p) {
  return {as<int64_t>(p[0].cast<Pointer>()), as<float>(p[1].cast<Pointer>()), as<int32_t>(p[2].cast<Pointer>()),
          as<float>(p[3].cast<Pointer>()), as<float>(p[4].cast<Pointer>())};
}

Tree tree(const py::tuple& p) {
  return {as<int64_t>(p[0].cast<Pointer>()), as<int32_t>(p[1].cast<Pointer>()), as<int32_t>(p[2].cast<Pointer>()),
          as<int64_t>(p[3].cast<Pointer>()), as<int32_t>(p[4].cast<Pointer>()), p[5].cast<int32_t>(),
          p[6].cast<int32_t>(), p[7].cast<int32_t>()};
}

Verdict verdict(const py::tuple& p) {
  return {as<int32_t>(p[0].cast<Pointer>()), as<int32_t>(p[1].cast<Pointer>()), as<int64_t>(p[2].cast<Pointer>()),
          as<int32_t>(p[3].cast<Pointer>())};
}

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
    check_dtype(op, 0), check_tree(op, 0);
    run(op, where);
  } catch (const std::exception& error) {
    throw std::runtime_error(std::string(name) + ": " + error.what());
  }
}

// Binds every op of executor E; `where` is its number of threads or its stream.
#define OP(name) launch(#name, E::name, op, where)
template <class E>
void bind(py::module_ m) {
  m.def("choose_tokens", [](int64_t where, Pointer logits, int dtype, int64_t rows, int64_t vocab, int64_t stride,
                            Pointer positions, py::tuple knobs, uint32_t stream, Pointer rounds, Pointer keys,
                            Pointer flags, int64_t chunks, Pointer tokens, Pointer status) {
    const ChooseTokens op{as<void>(logits), dtype, rows, vocab, stride, as<int64_t>(positions), settings(knobs),
                          stream, as<int64_t>(rounds), as<uint64_t>(keys), as<int32_t>(flags), chunks,
                          as<int64_t>(tokens), as<int32_t>(status)};
    OP(choose_tokens);
  });
  m.def("top_candidates", [](int64_t where, Pointer logits, int dtype, int64_t rows, int64_t vocab, int64_t stride,
                             int32_t k, Pointer positions, py::tuple knobs, Pointer token_ids, Pointer keys,
                             Pointer sums, int64_t chunks, Pointer tokens, Pointer scores) {
    const TopCandidates op{as<void>(logits), dtype, rows, vocab, stride, k, as<int64_t>(positions), settings(knobs),
                           as<int64_t>(token_ids), as<uint64_t>(keys), as<float>(sums), chunks, as<int64_t>(tokens),
                           as<float>(scores)};
    OP(top_candidates);
  });
  m.def("build_tree", [](int64_t where, Pointer root, Pointer tokens, Pointer scores, Pointer parents, int64_t batch,
                         int32_t candidates, int32_t nodes, int32_t words, int32_t max_depth, Pointer label,
                         Pointer out_tokens, Pointer out_parents, Pointer out_depth, Pointer out_mask,
                         Pointer out_size) {
    const BuildTree op{as<int64_t>(root), as<int64_t>(tokens), as<float>(scores), as<int32_t>(parents), batch,
                       candidates, nodes, words, max_depth, as<int32_t>(label), as<int64_t>(out_tokens),
                       as<int32_t>(out_parents), as<int32_t>(out_depth), as<int64_t>(out_mask),
                       as<int32_t>(out_size)};
    OP(build_tree);
  });
  m.def("accept_tree", [](int64_t where, py::tuple in, int64_t batch, Pointer chosen, py::tuple out) {
    const AcceptTree op{tree(in), batch, as<int64_t>(chosen), verdict(out)};
    OP(accept_tree);
  });
  m.def("verify_tree", [](int64_t where, Pointer logits, int dtype, int64_t batch, int64_t vocab, int64_t stride_b,
                          int64_t stride_n, py::tuple in, Pointer positions, py::tuple knobs, Pointer keys,
                          Pointer flags, int64_t chunks, py::tuple out) {
    const VerifyTree op{as<void>(logits), dtype, batch, vocab, stride_b, stride_n, tree(in), as<int64_t>(positions),
                        settings(knobs), as<uint64_t>(keys), as<int32_t>(flags), chunks, verdict(out)};
    OP(verify_tree);
  });
  m.def("verify_chain", [](int64_t where, Pointer target, Pointer draft, int dtype, int64_t batch, int64_t steps, int64_t vocab, int64_t draft_vocab, py::tuple strides,
                           Pointer draft_tokens, Pointer positions, py::tuple knobs, bool block, Pointer token_ids,
                           Pointer laws, py::tuple out) {
    const VerifyChain op{as<void>(target), as<void>(draft), dtype, batch, steps, vocab, draft_vocab, strides[0].cast<int64_t>(), strides[1].cast<int64_t>(),
                         strides[2].cast<int64_t>(), strides[3].cast<int64_t>(), as<int64_t>(draft_tokens),
                         as<int64_t>(positions), settings(knobs), block, as<int64_t>(token_ids), as<void>(laws),
                         verdict(out)};
    OP(verify_chain);
  });
  m.def("compact_cache", [](int64_t where, Pointer cache, int64_t layers, int64_t batch, int64_t heads, int64_t slots,
                            int64_t width, py::tuple strides, int64_t pages, int64_t table_width, Pointer path,
                            int64_t path_length, Pointer num_accepted, Pointer lengths, Pointer table) {
    const CompactCache op{as<char>(cache), layers, batch, heads, slots, width, strides[0].cast<int64_t>(),
                          strides[1].cast<int64_t>(), strides[2].cast<int64_t>(), strides[3].cast<int64_t>(),
                          strides[4].cast<int64_t>(), pages, table_width, as<int32_t>(path), path_length,
                          as<int32_t>(num_accepted), as<int32_t>(lengths), as<int32_t>(table)};
    OP(compact_cache);
  });
}

void bind_tree_attention(py::module_ m) {
  m.def("tree_attention", [](int64_t where, py::tuple addresses, int dtype, py::tuple sizes, py::tuple strides,
                             Pointer lengths, Pointer mask, Pointer table, int64_t table_width, int64_t pages,
                             float scale) {
    const auto size = [&](int i) { return sizes[i].cast<int64_t>(); };
    const auto stride = [&](int i) { return strides[i].cast<int64_t>(); };
    const auto at = [&](int i) { return as<void>(addresses[i].cast<Pointer>()); };
    const TreeAttention op{at(0), at(1), at(2), at(3), dtype, size(0), size(1), size(2), size(3), size(4), size(5),
                           size(6), stride(0), stride(1), stride(2), stride(3), stride(4), stride(5), stride(6),
                           stride(7), stride(8), as<int32_t>(lengths), as<int64_t>(mask), as<int32_t>(table),
                           table_width, pages, scale};
    launch("tree_attention", [](const TreeAttention& o, int64_t threads) { cpu::tree_attention(o, int(threads)); },
           op, where);
  });
}

void bind_skinny_linear(py::module_ m) {
  m.def("skinny_linear", [](int64_t where, Pointer x, Pointer weight, Pointer out, int dtype, int64_t rows,
                            int64_t outputs, int64_t width, int64_t x_stride, int64_t stride) {
    const SkinnyLinear op{as<void>(x), as<void>(weight), as<void>(out), dtype, rows, outputs, width, x_stride, stride};
    launch("skinny_linear", [](const SkinnyLinear& o, int64_t threads) { cpu::skinny_linear(o, int(threads)); }, op,
           where);
  });
}

struct Cpu {
#define CPU(name, Op) \
  static void name(const Op& op, int64_t threads) { cpu::name(op, int(threads)); }
  CPU(choose_tokens, ChooseTokens)
  CPU(top_candidates, TopCandidates)
  CPU(build_tree, BuildTree)
  CPU(accept_tree, AcceptTree)
  CPU(verify_tree, VerifyTree)
  CPU(verify_chain, VerifyChain)
  CPU(compact_cache, CompactCache)
};

#ifdef BEAGLE_CUDA
struct Cuda {
#define CUDA(name, Op) \
  static void name(const Op& op, int64_t stream) { cuda::name(op, as<void>(Pointer(stream))); }
  CUDA(choose_tokens, ChooseTokens)
  CUDA(top_candidates, TopCandidates)
  CUDA(build_tree, BuildTree)
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

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Executors of the verification ops";
  m.attr("law_size") = sizeof(Law);
  m.attr("max_nodes") = kMaxNodes;
  m.attr("chunk") = kChunk;
  m.attr("max_k") = kMaxK;
  m.attr("max_rows") = kMaxRows;
  py::dict dtypes;
  dtypes["float32"] = int(kFloat32), dtypes["float16"] = int(kFloat16), dtypes["bfloat16"] = int(kBFloat16);
  m.attr("dtypes") = dtypes;
  m.attr("no_cuda") = BEAGLE_NO_CUDA;
  m.def("row_offset", &row_offset);
  bind<Cpu>(m.def_submodule("cpu"));
  bind_tree_attention(m.attr("cpu"));
  bind_skinny_linear(m.attr("cpu"));
#ifdef BEAGLE_CUDA
  bind<Cuda>(m.def_submodule("cuda"));
  bind_why_not(m.attr("cuda"));
#endif
}
