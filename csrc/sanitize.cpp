// Drives every op of the host executor on exactly sized buffers, for the sanitizers, and now and then the CUDA executor
// in the emulator, which must give the same; sanitize.sh builds and runs it.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <thread>
#include <vector>

#include "core/chain.h"
#include "cpu/executor.h"
#include "cuda/executor.h"

using namespace beagle;

namespace {

std::mt19937 rng(1);
int below(int n) { return int(rng() % uint32_t(n)); }

template <class T>
void same(const char* what, const std::vector<T>& host, const std::vector<T>& block, T slack = T(0)) {
  for (size_t i = 0; i < host.size(); ++i) {
    if (host[i] == block[i] || std::fabs(double(host[i]) - double(block[i])) <= double(slack)) continue;
    std::printf("%s[%zu]: %g on the host, %g in a block\n", what, i, double(host[i]), double(block[i]));
    emulator::fail("the executors differ");
  }
}

struct Outcome {
  std::vector<int32_t> path, accepted, status;
  std::vector<int64_t> next;
  Outcome(int64_t batch, int64_t length)
      : path(size_t(batch * length)), accepted(size_t(batch)), status(size_t(batch)), next(size_t(batch)) {}
  Verdict verdict() { return {path.data(), accepted.data(), next.data(), status.data()}; }
  void check(const char* op, const Outcome& block) const {
    same(op, path, block.path), same(op, accepted, block.accepted), same(op, status, block.status);
    same(op, next, block.next);
  }
};

struct SamplingData {
  std::vector<int64_t> seed, positions;
  std::vector<float> temperature, top_p, min_p;
  std::vector<int32_t> top_k;
  explicit SamplingData(int64_t rows) {
    for (int64_t i = 0; i < rows; ++i) {
      seed.push_back(int64_t(rng()) << 20), positions.push_back(below(1000));
      temperature.push_back(float(below(3)) * 0.6f), top_k.push_back(below(3) * 7);
      top_p.push_back(below(2) ? 1.0f : 0.8f), min_p.push_back(below(2) ? 0.0f : 0.05f);
    }
  }
  Sampling pointers() const {
    return {seed.data(), temperature.data(), top_k.data(), top_p.data(), min_p.data()};
  }
};

// Logits of any dtype as raw bits: normal numbers, with a few infinities and NaNs.
std::vector<uint16_t> logits(int64_t count, int dtype) {
  std::vector<uint16_t> bits(size_t(count * (dtype == 0 ? 2 : 1)));
  std::normal_distribution<float> normal(0, 3);
  for (int64_t i = 0; i < count; ++i) {
    const float z = below(500) ? normal(rng) : below(2) ? -kInf : kInf - kInf;
    if (dtype == 0) __builtin_memcpy(&bits[size_t(2 * i)], &z, 4);
    if (dtype == 1) bits[size_t(i)] = uint16_t(rng());
    if (dtype == 2) bits[size_t(i)] = uint16_t(bit_cast<uint32_t>(z) >> 16);
  }
  return bits;
}

void choose(int threads, bool blocks) {
  for (int dtype = 0; dtype < 3; ++dtype) {
    const int64_t rows = 1 + below(4), vocab = 1 + below(blocks ? 20000 : 3000);
    const int64_t chunks = blocks ? vocab / (kChunk >> below(3)) + 1 : 1 + below(4);
    const auto z = logits(rows * vocab, dtype);
    const SamplingData sampling(rows);
    const int32_t k = 1 + below(int(vocab < 40 ? vocab : 40));
    std::vector<int64_t> tokens[2], best[2];
    std::vector<int32_t> status[2];
    std::vector<float> scores[2];
    for (const bool block : {false, true}) {
      if (block && !blocks) continue;
      std::vector<uint64_t> keys(size_t(rows * chunks)), kept(size_t(rows * k * 2));
      std::vector<int32_t> flags(size_t(rows * chunks));
      std::vector<float> sums(size_t(rows * chunks * 2)), groups(size_t(rows * chunks * 256));
      tokens[block].assign(size_t(rows), 0), status[block].assign(size_t(rows), 0);
      best[block].assign(size_t(rows * k), 0), scores[block].assign(size_t(rows * k), 0);
      const ChooseTokens one{z.data(), dtype, rows, vocab, vocab, sampling.positions.data(), sampling.pointers(), 0, nullptr,
                             keys.data(), flags.data(), groups.data(), chunks, tokens[block].data(), status[block].data()};
      const TopCandidates many{z.data(), dtype, rows, vocab, vocab, k, sampling.positions.data(), sampling.pointers(),
                               nullptr, kept.data(), sums.data(), groups.data(), block ? chunks : 1, best[block].data(), scores[block].data()};
      if (block) cuda::choose_tokens(one, nullptr), cuda::top_candidates(many, nullptr);
      else cpu::choose_tokens(one, threads), cpu::top_candidates(many, threads);
    }
    if (!blocks) continue;
    same("choose_tokens", tokens[0], tokens[1]), same("choose_tokens status", status[0], status[1]);
    same("top_candidates", best[0], best[1]), same("top_candidates scores", scores[0], scores[1], 1e-4f);
  }
}

void trees(int threads, bool blocks) {
  const int64_t batch = 1 + below(blocks ? 3 : 20);
  const int32_t count = below(300), nodes = 1 + below(140), words = (nodes + 63) / 64, max_depth = 1 + below(30);
  std::vector<int64_t> root(size_t(batch), 3), tokens, out_tokens[2], mask[2];
  std::vector<float> scores;
  std::vector<int32_t> parents, label(size_t(batch * count)), out_parents[2], size[2], depth[2];
  for (int64_t b = 0; b < batch; ++b) {
    const bool rotten = below(3) == 0;
    for (int32_t i = 0; i < count; ++i) {
      const int32_t parent = !rotten || below(50) ? below(below(3) ? i + 1 : least(i + 1, 9)) - 1 : below(400) - 100;
      const bool sound = parent >= 0 && parent < i;
      tokens.push_back(below(4)), parents.push_back(parent);
      scores.push_back((sound ? scores[size_t(b * count + parent)] : 0.0f) - float(below(4)));
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
    std::vector<uint64_t> keys(size_t(batch * nodes * chunks));
    std::vector<int32_t> flags(size_t(batch * nodes * chunks));
    std::vector<float> groups(size_t(batch * nodes * chunks * 256));
    VerifyTree op{z.data(), 2, batch, vocab, nodes * vocab, vocab, tree, sampling.positions.data(), sampling.pointers(),
                  keys.data(), flags.data(), groups.data(), chunks, host.verdict()};
    cpu::verify_tree(op, threads);
    op.verdict = block.verdict();
    if (blocks) cuda::verify_tree(op, nullptr), host.check("verify_tree", block);
  }
}

void chains(int threads, bool blocks) {
  const int64_t batch = 1 + below(4), steps = below(5), vocab = 5 + below(600), reduced = 1 + below(int(vocab));
  const auto target = logits(batch * (steps + 1) * vocab, 0), draft = logits(batch * steps * reduced, 0);
  std::vector<int64_t> ids, drafted;
  for (int64_t i = 0; i < reduced; ++i) ids.push_back(i);
  for (int64_t i = 0; i < batch * steps; ++i) drafted.push_back(below(30) ? below(int(reduced)) : below(2000) - 1000);
  const SamplingData sampling(batch);
  std::vector<Law> laws(size_t(batch * (2 * steps + 1)));
  Outcome host(batch, steps + 1), block = host;
  for (const bool by_block : {false, true}) {
    VerifyChain op{target.data(), draft.data(), 0, batch, steps, vocab, reduced, (steps + 1) * vocab, vocab,
                   steps * reduced, reduced, drafted.data(), sampling.positions.data(), sampling.pointers(), by_block,
                   ids.data(), laws.data(), host.verdict()};
    cpu::verify_chain(op, threads);
    op.verdict = block.verdict();
    if (blocks) cuda::verify_chain(op, nullptr), host.check("verify_chain", block);
  }
}

void caches(int threads, bool blocks) {
  const int64_t layers = 1 + below(40), batch = 1 + below(3), heads = 1 + below(3), slots = 1 + below(60);
  const int64_t width = below(2) ? 1 + below(200) : 16 * (1 + below(12)), length = 1 + below(12);
  std::vector<char> cache(size_t(layers * 2 * batch * heads * slots * width));
  for (auto& byte : cache) byte = char(rng());
  std::vector<int32_t> path, accepted, lengths, table;
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t i = 0; i < length; ++i) path.push_back(int32_t(i) + below(9) - 1);
    accepted.push_back(below(20) - 1), lengths.push_back(below(70) - 5);
    // a page of its own somewhere, since rows that share one would race in any engine; the other ids are no page's
    for (int i = 0, own = below(3); i < 3; ++i) table.push_back(int32_t(i == own ? b : below(2) ? -1 : batch + below(9)));
  }
  const int64_t slot = width, head = slots * slot, row = heads * head, half = batch * row;
  for (const int32_t* pages : {static_cast<const int32_t*>(nullptr), static_cast<const int32_t*>(table.data())}) {
    auto copy = cache;
    CompactCache op{cache.data(), layers, batch, heads, slots, width, 2 * half, half, row, head, slot, batch,
                    pages ? 3 : 0, path.data(), length, accepted.data(), lengths.data(), pages};
    cpu::compact_cache(op, threads);
    op.cache = copy.data();
    if (blocks) cuda::compact_cache(op, nullptr), same("compact_cache", cache, copy);
  }
}

// Dense and paged, with lengths, masks and page numbers of any value; odd strides, buffers that end where they may.
void attention(int threads) {
  const int32_t dtype = below(3);
  const int64_t batch = 1 + below(3), nodes = 1 + below(70), kv_heads = 1 + below(2), heads = kv_heads * (1 + below(4));
  const int64_t width = 1 + below(70), slots = 1 + below(200), words = 1 + below(5), pages = 1 + below(4);
  const int64_t gap = below(3), row = width + gap, table_width = 1 + below(4);
  const auto wild = [](int most) { return below(3) ? int32_t(below(most)) : below(2) ? INT32_MIN + below(2) : INT32_MAX; };
  for (const bool paged : {false, true}) {
    const int64_t planes = paged ? pages : batch;
    const auto q = logits(batch * nodes * heads * row - gap, dtype);
    const auto k = logits(planes * kv_heads * slots * row - gap, dtype);
    const auto v = logits(planes * kv_heads * slots * row - gap, dtype);
    std::vector<uint16_t> out(size_t(batch * nodes * heads * width * (dtype == 0 ? 2 : 1)));
    std::vector<int32_t> lengths, table;
    std::vector<int64_t> mask;
    for (int64_t b = 0; b < batch; ++b) lengths.push_back(wild(int(slots) + 2));
    for (int64_t i = 0; i < batch * table_width; ++i) table.push_back(wild(int(pages)));
    for (int64_t i = 0; i < batch * nodes * words; ++i) mask.push_back(int64_t(uint64_t(rng()) << 32 | rng()));
    cpu::tree_attention({q.data(), k.data(), v.data(), out.data(), dtype, batch, nodes, heads, kv_heads, width, slots,
                         words, nodes * heads * row, heads * row, row, kv_heads * slots * row, slots * row, row,
                         kv_heads * slots * row, slots * row, row, lengths.data(), mask.data(),
                         paged ? table.data() : nullptr, paged ? table_width : 0, planes, 0.3f}, threads);
  }
}

void linears(int threads) {
  for (int dtype = 0; dtype < 3; ++dtype) {
    const int64_t rows = below(14), outputs = below(400), width = below(3) ? below(200) : 16 * below(80);
    const auto x = logits(rows * width, dtype), weight = logits(outputs * width, dtype);
    std::vector<uint16_t> out(size_t(rows * outputs * (dtype == 0 ? 2 : 1)));
    cpu::skinny_linear({x.data(), weight.data(), out.data(), dtype, rows, outputs, width, width, width}, threads);
  }
}

}  // namespace

int main(int, char** arguments) {
  if (arguments[1]) emulator::seed(std::strtoull(arguments[1], nullptr, 10));
  for (int round = 0; round < 25; ++round) {
    for (const int threads : {1, 3}) {
      const bool blocks = threads == 1 && round % 5 == 0;
      choose(threads, blocks), trees(threads, blocks), chains(threads, blocks), caches(threads, blocks);
    }
    for (int i = 0; i < 4; ++i) attention(1), attention(3);
    linears(1), linears(3);
  }
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
