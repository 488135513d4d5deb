// Drives every op of the host executor on exactly sized buffers, for the sanitizers, and now and then the CUDA executor
// in the emulator, which must give the same; sanitize.sh builds and runs it.
#include "sanitize.h"
#include "sanitize_adjust.h"
#include "sanitize_drafts.h"
#include "sanitize_layers.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <stdexcept>
#include <thread>

#include "core/chain.h"
#include "cpu/executor.h"
#include "cpu/pool.h"
#include "cuda/executor.h"

using namespace beagle;

namespace {

constexpr int64_t group_room(int64_t chunks) { return chunks * (kChunk / 32) + 2 * kRowWords; }

// Rows of logits that start at z, which is aligned as its dtype is.
struct Rows {
  const void* z;
  int32_t dtype;
  int64_t rows, vocab, stride;
};

void choose(const Rows& in, const SamplingData& sampling, int32_t k, int64_t chunks, int threads, bool blocks) {
  const int64_t rows = in.rows;
  std::vector<int64_t> tokens[2], best[2];
  std::vector<int32_t> status[2];
  std::vector<float> scores[2], values[2];
  std::vector<int32_t> met[2];
  std::vector<int64_t> ids;
  for (int64_t c = 0; c < in.vocab; ++c) ids.push_back((ids.empty() ? below(9) : ids.back() + 1) + (below(4) ? 0 : below(200)));
  const int64_t* reduced = below(2) ? ids.data() : nullptr;
  for (const bool block : {false, true}) {
    if (block && !blocks) continue;
    std::vector<uint64_t> keys(size_t(rows * chunks)), kept(size_t(block ? 0 : rows * k));
    std::vector<int32_t> flags(size_t(rows * chunks));
    std::vector<float> sums(size_t(rows * chunks * 2)), groups(size_t(rows * group_room(chunks)));
    tokens[block].assign(size_t(rows), 0), status[block].assign(size_t(rows), 0);
    best[block].assign(size_t(rows * k), 0), scores[block].assign(size_t(rows * k), 0);
    const ChooseTokens one{in.z, in.dtype, rows, in.vocab, in.stride, sampling.positions.data(), sampling.pointers(), 0,
                           nullptr, keys.data(), flags.data(), groups.data(), chunks, tokens[block].data(),
                           status[block].data()};
    const TopCandidates many{in.z, in.dtype, rows, in.vocab, in.stride, k, sampling.positions.data(),
                             sampling.pointers(), reduced, kept.data(), sums.data(), groups.data(), block ? chunks : 1,
                             best[block].data(), scores[block].data()};
    std::vector<float> bounds(size_t(2 * rows));
    values[block].assign(size_t(rows * in.vocab), 0), met[block].assign(size_t(rows), 0);
    const PerturbLogits all{in.z, in.dtype, rows, in.vocab, in.stride, sampling.positions.data(), sampling.pointers(),
                            keys.data(), flags.data(), groups.data(), bounds.data(), chunks, values[block].data(),
                            met[block].data()};
    if (block) cuda::choose_tokens(one, nullptr), cuda::top_candidates(many, nullptr), cuda::perturb_logits(all, nullptr);
    else cpu::choose_tokens(one, threads), cpu::top_candidates(many, threads), cpu::perturb_logits(all, threads);
  }
  if (!blocks) return;
  same("choose_tokens", tokens[0], tokens[1]), same("choose_tokens status", status[0], status[1]);
  same("perturb_logits", values[0], values[1]), same("perturb_logits status", met[0], met[1]);
  same("top_candidates", best[0], best[1]), same("top_candidates scores", scores[0], scores[1], 1e-4f);
}

void choices(int threads, bool blocks) {
  for (int dtype = 0; dtype < 3; ++dtype) {
    const int64_t rows = 1 + below(4), vocab = 1 + below(blocks ? 20000 : 3000);
    const int64_t chunks = blocks ? vocab / (kChunk >> below(3)) + 1 : 1 + below(4);
    const auto z = logits(rows * vocab, dtype);
    const SamplingData sampling(rows);
    choose({z.data(), dtype, rows, vocab, vocab}, sampling, 1 + below(int(vocab < 40 ? vocab : 40)), chunks, threads,
           blocks);
  }
}

void verify(const Rows& in, const Tree& tree, int64_t batch, const SamplingData& sampling, int64_t chunks, int threads,
            bool blocks) {
  Outcome host(batch, tree.max_depth + 1), block = host;
  std::vector<uint64_t> keys(size_t(batch * tree.nodes * chunks));
  std::vector<int32_t> flags(keys.size());
  std::vector<float> groups(size_t(batch * tree.nodes * group_room(chunks)));
  VerifyTree op{in.z, in.dtype, batch, in.vocab, tree.nodes * in.stride, in.stride, tree, sampling.positions.data(),
                sampling.pointers(), keys.data(), flags.data(), groups.data(), chunks, host.verdict()};
  cpu::verify_tree(op, threads);
  op.verdict = block.verdict();
  if (blocks) cuda::verify_tree(op, nullptr), host.check("verify_tree", block);
}

// Rows as long as a real vocabulary's that start at any element: greedy, with noise, and with noise and filters.
void large(int64_t vocab, int64_t gap, int64_t offset) {
  const int64_t batch = 3, nodes = 2, rows = batch * nodes, stride = vocab + gap;
  const int64_t chunks = (vocab + kChunk - 1) / kChunk;
  SamplingData sampling(rows);
  for (size_t i = 0; i < size_t(rows); ++i) {
    sampling.temperature[i] = i % 3 ? 0.7f : 0.0f, sampling.top_k[i] = i % 3 == 2 ? 50 : 0;
    sampling.top_p[i] = i % 3 == 2 ? 0.9f : 1.0f, sampling.min_p[i] = 0.0f;
  }
  const std::vector<int64_t> tokens(size_t(rows), vocab / 2), mask{1, 3, 1, 3, 1, 3};
  const std::vector<int32_t> parents{-1, 0, -1, 0, -1, 0}, depth{0, 1, 0, 1, 0, 1}, size{2, 2, 1};
  const Tree tree{tokens.data(), parents.data(), depth.data(), mask.data(), size.data(), nodes, 1, 1};
  for (int dtype = 0; dtype < 3; ++dtype) {
    const auto z = logits(offset + rows * stride - gap, dtype);
    const Rows in{z.data() + offset * (dtype == 0 ? 2 : 1), dtype, rows, vocab, stride};
    choose({in.z, dtype, 3, vocab, stride}, sampling, 8, chunks, 1, true);
    verify(in, tree, batch, sampling, chunks, 1, true);
  }
}

void trees(int threads, bool blocks, bool many) {
  const int64_t batch = 1 + below(blocks ? 8 : 20);
  const int32_t count = many ? 2000 + below(2000) : below(300), nodes = 1 + below(blocks ? 70 : 140), words = (nodes + 63) / 64;
  const int32_t max_depth = 1 + below(30);
  std::vector<int64_t> root(size_t(batch), 3), tokens, out_tokens[2], mask[2];
  std::vector<float> scores;
  std::vector<int32_t> parents, label(size_t(batch * count)), out_parents[2], size[2], depth[2];
  for (int64_t b = 0; b < batch; ++b) {
    const bool rotten = below(3) == 0, tied = below(2);
    for (int32_t i = 0; i < count; ++i) {
      const int32_t parent = !rotten || below(50) ? below(below(3) ? i + 1 : least(i + 1, 9)) - 1 : below(400) - 100;
      const bool sound = parent >= 0 && parent < i;
      tokens.push_back(below(4)), parents.push_back(parent);
      scores.push_back((sound ? scores[size_t(b * count + parent)] : 0.0f) -
                       (tied ? float(below(4)) : float(below(1 << 20)) * 1e-6f));
    }
  }
  for (const bool block : {false, true}) {
    if (block && !blocks) continue;
    const size_t all = size_t(batch * nodes);
    out_tokens[block].resize(all), out_parents[block].resize(all), depth[block].resize(all);
    mask[block].resize(all * size_t(words)), size[block].resize(size_t(batch));
    const BuildTree op{root.data(), tokens.data(), scores.data(), parents.data(), batch, count, nodes, words, max_depth,
                       label.data(), out_tokens[block].data(), out_parents[block].data(), depth[block].data(),
                       mask[block].data(), size[block].data()};
    if (block) cuda::build_tree(op, nullptr);
    else cpu::build_tree(op, threads);
  }
  if (blocks) {
    same("build_tree tokens", out_tokens[0], out_tokens[1]), same("build_tree parents", out_parents[0], out_parents[1]);
    same("build_tree depth", depth[0], depth[1]), same("build_tree mask", mask[0], mask[1]);
    same("build_tree size", size[0], size[1]);
  }
  for (int damage = 0; damage < 3; ++damage) {
    if (damage == 1) out_parents[0][size_t(below(int(batch * nodes)))] = below(2000) - 1000;
    if (damage == 2) size[0][size_t(below(int(batch)))] = below(1000) - 500, depth[0][0] = -7;
    const Tree tree{out_tokens[0].data(), out_parents[0].data(), depth[0].data(), mask[0].data(), size[0].data(), nodes,
                    words, max_depth};
    std::vector<int64_t> chosen(size_t(batch * nodes));
    for (auto& token : chosen) token = below(4);
    Outcome host(batch, max_depth + 1), block = host;
    cpu::accept_tree({tree, batch, chosen.data(), host.verdict()}, threads);
    if (blocks) cuda::accept_tree({tree, batch, chosen.data(), block.verdict()}, nullptr), host.check("accept", block);
    const int64_t vocab = 70, chunks = 2;
    const auto z = logits(batch * nodes * vocab, 2);
    const SamplingData sampling(batch);
    verify({z.data(), 2, batch * nodes, vocab, vocab}, tree, batch, sampling, chunks, threads, blocks);
  }
}

void chains(int threads, bool blocks, bool many) {
  const int32_t dtype = below(3);
  const int64_t batch = 1 + below(4), steps = many ? 64 + below(9) : below(5);
  const int64_t vocab = 5 + below(blocks && !many ? 20000 : 600), chunks = (vocab + kChunk / 4 - 1) / (kChunk / 4);
  const bool all = below(2);
  const int64_t reduced = all ? vocab : 1 + below(int(vocab));
  auto target = logits(batch * (steps + 1) * vocab, dtype), draft = logits(batch * steps * reduced, dtype);
  // a chain's rows alike enough for some tokens to be accepted
  if (all && below(2)) for (int64_t b = 0; b < batch; ++b) {
    const size_t item = target.size() / size_t(batch * (steps + 1) * vocab), row = size_t(steps * vocab) * item;
    std::copy_n(target.begin() + b * (steps + 1) * vocab * int64_t(item), row, draft.begin() + size_t(b) * row);
  }
  std::vector<int64_t> ids, drafted;
  for (int64_t i = 0, id = vocab - reduced ? below(int(vocab - reduced)) : 0; i < reduced; ++i) ids.push_back(id + i);
  for (int64_t i = 0; i < batch * steps; ++i) {
    drafted.push_back(below(90) ? ids[size_t(below(int(reduced)))] : below(2000) - 1000);
  }
  const SamplingData sampling(batch);
  std::vector<Law> laws(size_t(batch * (2 * steps + 1)));
  std::vector<float> groups(laws.size() * size_t(group_room(chunks)));
  std::vector<int64_t> parts(laws.size() * size_t(chunks * kPartWords));
  Outcome host(batch, steps + 1), block = host;
  for (const bool by_block : {false, true}) {
    VerifyChain op{target.data(), draft.data(), dtype, batch, steps, vocab, reduced, (steps + 1) * vocab, vocab,
                   steps * reduced, reduced, drafted.data(), sampling.positions.data(), sampling.pointers(), by_block,
                   all ? nullptr : ids.data(), laws.data(), groups.data(), parts.data(), chunks, host.verdict()};
    cpu::verify_chain(op, threads);
    op.verdict = block.verdict();
    if (blocks) cuda::verify_chain(op, nullptr), host.check("verify_chain", block);
  }
}

void caches(int threads, bool blocks, bool many) {
  const int64_t layers = 1 + below(many ? 3 : 40), planes = 1 + below(3), batch = 1 + below(3), heads = 1 + below(3);
  const int64_t slots = many ? 600 : 1 + below(60), length = many ? 300 + below(200) : 1 + below(12);
  const int64_t width = below(2) ? 1 + below(200) : 16 * (1 + below(12));
  std::vector<char> cache(size_t(layers * planes * batch * heads * slots * width));
  for (auto& byte : cache) byte = char(rng());
  std::vector<int32_t> path, accepted, lengths, table;
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t i = 0; i < length; ++i) path.push_back(int32_t(i) + below(9) - 1);
    accepted.push_back(below(many ? 900 : 20) - 1), lengths.push_back(below(70) - 5);
    // a page of its own somewhere, since rows that share one would race in any engine; the other ids are no page's
    for (int i = 0, own = below(3); i < 3; ++i) table.push_back(int32_t(i == own ? b : below(2) ? -1 : batch + below(9)));
  }
  const int64_t slot = width, head = slots * slot, row = heads * head, plane = batch * row;
  for (const int32_t* pages : {static_cast<const int32_t*>(nullptr), static_cast<const int32_t*>(table.data())}) {
    auto copy = cache;
    CompactCache op{cache.data(), layers, planes, batch, heads, slots, width, planes * plane, plane, row, head, slot,
                    batch, pages ? 3 : 0, path.data(), length, accepted.data(), lengths.data(), pages};
    cpu::compact_cache(op, threads);
    op.cache = copy.data();
    if (blocks) cuda::compact_cache(op, nullptr), same("compact_cache", cache, copy);
  }
}

// Dense and paged, with lengths, masks, page numbers and starts of any value; odd strides, buffers that end where they
// may.
void attention(int threads) {
  const int32_t dtype = below(3);
  const int64_t batch = 1 + below(3), nodes = 1 + below(70), kv_heads = 1 + below(2), heads = kv_heads * (1 + below(4));
  const int64_t width = 1 + below(70), slots = 1 + below(200), words = 1 + below(5), pages = 1 + below(4);
  const int64_t value_width = below(2) ? width : 1 + below(70), table_width = 1 + below(4);
  const int64_t gap = below(3), row = width + gap, value_row = value_width + gap;
  const auto wild = [](int most) { return below(3) ? int32_t(below(most)) : below(2) ? INT32_MIN + below(2) : INT32_MAX; };
  for (const bool paged : {false, true}) {
    const int64_t planes = paged ? pages : batch;
    const auto q = logits(batch * nodes * heads * row - gap, dtype);
    const auto k = logits(planes * kv_heads * slots * row - gap, dtype);
    const auto v = logits(planes * kv_heads * slots * value_row - gap, dtype);
    std::vector<uint16_t> out(size_t(batch * nodes * heads * value_width * (dtype == 0 ? 2 : 1)));
    std::vector<int32_t> lengths, table, starts;
    const std::vector<float> sinks(size_t(heads), 0.5f);
    std::vector<int64_t> mask;
    for (int64_t b = 0; b < batch; ++b) lengths.push_back(wild(int(slots) + 2));
    for (int64_t i = 0; i < batch * table_width; ++i) table.push_back(wild(int(pages)));
    for (int64_t i = 0; i < batch * nodes * words; ++i) mask.push_back(int64_t(uint64_t(rng()) << 32 | rng()));
    for (int64_t i = 0; i < batch * nodes; ++i) starts.push_back(wild(int(slots) + 70));
    cpu::tree_attention({q.data(), k.data(), v.data(), out.data(), dtype, batch, nodes, heads, kv_heads, width,
                         value_width, slots, words, nodes * heads * row, heads * row, row, kv_heads * slots * row,
                         slots * row, row, kv_heads * slots * value_row, slots * value_row, value_row, lengths.data(),
                         mask.data(), paged ? table.data() : nullptr, paged ? table_width : 0, planes, 0.3f,
                         below(2) ? starts.data() : nullptr, below(2) ? sinks.data() : nullptr,
                         below(2) ? 2.0f : 0.0f}, threads);
  }
}

void linears(int threads) {
  for (int dtype = 0; dtype < 3; ++dtype) {
    const int64_t rows = below(14), outputs = below(400), width = below(3) ? below(200) : 16 * below(80);
    const auto x = logits(rows * width, dtype), weight = logits(outputs * width, dtype);
    std::vector<uint16_t> out(size_t(rows * outputs * (dtype == 0 ? 2 : 1)));
    cpu::skinny_linear({x.data(), weight.data(), out.data(), dtype, dtype, rows, outputs, width, width, width}, threads);
    const auto narrow = logits(outputs * width, 2);
    if (!dtype) cpu::skinny_linear({x.data(), narrow.data(), out.data(), 0, kExact, rows, outputs, width, width, width}, threads);
    const int64_t group = 32 * (1 + below(3)), groups = below(5), columns = group * groups;
    const auto x8 = logits(rows * columns, dtype);
    std::vector<int8_t> weight8(size_t(outputs * columns));
    for (int8_t& one : weight8) one = int8_t(below(256) - 128);
    const std::vector<float> scales(size_t(outputs * groups), 0.01f);
    cpu::int8_linear({x8.data(), weight8.data(), scales.data(), out.data(), dtype, rows, outputs, columns, group, columns,
                      columns}, threads);
  }
}

// What a task throws comes to the caller when all threads have left; the pool goes on.
void exceptions(int threads) {
  std::atomic<int> ran{0}, caught{0};
  for (int64_t bad = 0; bad < 9; ++bad) {
    try {
      cpu::parallel(40, threads, [&](int64_t i) {
        if (i >= bad) throw std::runtime_error("task");
        ++ran;
      });
    } catch (const std::runtime_error&) {
      ++caught;
    }
  }
  if (caught != 9 || ran != 36) emulator::fail("exceptions of tasks");
}

}  // namespace

int main(int, char** arguments) {
  if (arguments[1]) emulator::seed(std::strtoull(arguments[1], nullptr, 10));
  for (int round = 0; round < 25; ++round) {
    for (const int threads : {1, 3}) {
      // many: more candidates and steps than a block takes at once
      const bool blocks = threads == 1 && round % 5 == 0, many = round % 10 == 5;
      choices(threads, blocks), trees(threads, blocks, many), chains(threads, blocks, many), caches(threads, blocks, many);
      for (int i = 0; i < 4; ++i) lookups(threads, blocks, many && !i), joins(threads, blocks, many && !i);
      for (int i = 0; i < (blocks ? 8 : 3); ++i) adjustments(threads, blocks);
    }
    for (int i = 0; i < 4; ++i) attention(1), attention(3);
    linears(1), linears(3);
    decoder_layers(1), decoder_layers(3), exceptions(1), exceptions(3);
  }
  large(128256, 0, 0), large(128256, 7, 1), large(50257, 1, 3);
  std::vector<std::thread> callers;
  const auto z = logits(4 * 500, 2);
  const SamplingData sampling(4);
  for (int t = 0; t < 4; ++t) {
    callers.emplace_back([&] {
      uint64_t keys[8];
      int32_t flags[8], status[4];
      int64_t tokens[4];
      for (int i = 0; i < 200; ++i) {
        cpu::choose_tokens({z.data(), 2, 4, 500, 500, sampling.positions.data(), sampling.pointers(), 0, nullptr, keys, flags,
                            nullptr, 2, tokens, status}, 3);
      }
    });
  }
  for (auto& caller : callers) caller.join();
  std::puts("every op ran");
}
