// A block for each chunk of each row of logits, a block for each row, which makes its law, under the block rule a block
// for each chunk of each step, then a block for each chain.
#include "../core/chain.h"

#include "executor.h"
#include "nucleus.cuh"

namespace beagle::cuda {
namespace {

// What the launches tell each other of a chunk: a row's best key, whether a logit was NaN, and the sum of
// exp((z - the chunk's largest) / T); a step's surplus.
struct Part {
  uint64_t key;
  double sum, surplus;
  int64_t flag;
};
static_assert(sizeof(Part) == 8 * kPartWords);

// Row i of chain b: the target's steps + 1, then the draft's; its type is that of the logits.
template <class T>
struct Place {
  const VerifyChain& op;
  int64_t b, i;
  unsigned threads;
  __device__ Place(const VerifyChain& op, int64_t b, int64_t i)
      : op(op), b(b), i(i), threads(chunk_threads(most(op.vocab, op.draft_vocab), op.chunks)) {}
  __device__ int64_t index() const { return b * (2 * op.steps + 1) + i; }
  __device__ Row<T> row() const {
    const int64_t d = i - op.steps - 1;
    if (d < 0) return {static_cast<const T*>(op.target) + row_offset(b, i, op.target_b, op.target_n), op.vocab};
    return {static_cast<const T*>(op.draft) + row_offset(b, d, op.draft_b, op.draft_n), op.draft_vocab};
  }
  __device__ Groups groups() const { return {op.groups, index(), op.chunks, threads}; }
  __device__ Part* parts() const { return static_cast<Part*>(op.parts) + index() * op.chunks; }
  __device__ Law& law() const { return static_cast<Law*>(op.laws)[index()]; }
};

template <class T>
__device__ ChainRow<T> chain_of(const VerifyChain& op, int64_t b) {
  return {op, b, op.sampling.at(b), static_cast<const Law*>(op.laws) + b * (2 * op.steps + 1)};
}

__device__ __forceinline__ float ratio_of(float z, float top, float scale2) {
  return exp2_of(most(z - top, -125.0f / scale2), scale2);
}

template <class T>
__global__ void __launch_bounds__(kThreads) scan_rows(const VerifyChain op) {
  __shared__ float tops[kChunkGroups];
  let_next_start();
  const Place<T> place(op, blockIdx.z, blockIdx.y);
  const Row<T> row = place.row();
  const RowSampling sampling = op.sampling.at(place.b);
  const int32_t threads = int32_t(blockDim.x), begin = int32_t(blockIdx.x) * threads * 32, rank = int32_t(threadIdx.x);
  uint4 raw[Row<T>::kVectors];
  load_chunk(row, begin, raw);
  const bool nan = __syncthreads_or(store_tops(row, begin, raw, tops));
  if (rank < threads / 2) place.groups().tops[begin / kGroup + rank] = tops[rank];
  Part& part = place.parts()[blockIdx.x];
  const float top = chunk_top(tops);
  double sum = 0.0;
  if (sampling.noisy() && !sampling.filters(row.vocab) && top > -kInf) {
    const float scale2 = Kept(sampling, top).scale;
    sum = sum_chunk(row, begin, raw, [&](float z) { return ratio_of(z, top, scale2); });
  }
  if (rank >= 32) return;
  const uint64_t key = greedy_key(row, begin, tops, threads / 2);
  if (rank == 0) part.key = key, part.sum = sum, part.flag = nan;
}

template <class T>
__global__ void __launch_bounds__(kRowThreads, 2) make_laws(const VerifyChain op) {
  __shared__ uint64_t slots[2][kRowWarps];
  __shared__ Room room;
  RowBlock team{slots};
  let_next_start();
  wait_for_previous();
  const Place<T> place(op, blockIdx.y, blockIdx.x);
  const Row<T> row = place.row();
  const RowSampling sampling = op.sampling.at(place.b);
  const Part* parts = place.parts();
  Law law{};
  law.scale2 = 1.0f, law.cut = law.floor = -kInf;
  uint64_t key = 0;
  for (int64_t c = 0; c < op.chunks; ++c) {
    key = most(key, parts[c].key);
    if (parts[c].flag) law.status = kStatusNan;
  }
  if (key == 0) law.status |= kStatusNoFinite;
  else law.best = key_index(key), law.top = key_value(key);
  if (key != 0 && sampling.noisy()) {
    const Groups groups = place.groups();
    law.scale2 = Kept(sampling, law.top).scale, law.far = -125.0f / law.scale2;
    double sum = 0.0;
    if (sampling.filters(row.vocab)) {
      const Kept kept = kept_of(team, row, groups, sampling, room);
      law.floor = kept.floor, law.cut = nucleus_cut(team, row, kept, sampling.top_p, room);
      law.scale = 1.0f;
      // what lies further below the largest changes no bit of the sum
      constexpr float kFar = -58.0f;
      each_four(row, groups, 0, 1, [&](float top) { return top >= law.cut && law.log_ratio(top) >= kFar; },
                [&](const float* z, float) {
                  sum += double(law.at(z[0]) + law.at(z[1]) + (law.at(z[2]) + law.at(z[3])));
                });
      sum = team.sum(sum);
    } else {
      for (int64_t c = 0; c < op.chunks; ++c) {
        if (parts[c].key) sum += parts[c].sum * double(ratio_of(key_value(parts[c].key), law.top, law.scale2));
      }
    }
    law.scale = float(1.0 / sum);
  }
  if (team.rank() == 0) place.law() = law;
}

// A drafted token, as the rules see it; more: the surplus after it.
struct Drafted {
  float p, q;
  double coin, more;
};
constexpr int kDrafted = 64;

// Calls next(i, drafted) for the steps below `steps` in order, by all threads of a block.
template <class T, class Next>
__device__ void each_drafted(const ChainRow<T>& chain, const Part* parts, int64_t steps, const Next& next) {
  __shared__ Drafted drafted[kDrafted];
  for (int64_t base = 0; base < steps; base += kDrafted) {
    __syncthreads();
    const int64_t i = base + threadIdx.x;
    if (int(threadIdx.x) < kDrafted && i < steps) {
      double more = 0.0;
      if (parts && i + 1 < chain.op.steps)
        for (int64_t c = 0; c < chain.op.chunks; ++c) more += parts[(i + 1) * chain.op.chunks + c].surplus;
      drafted[threadIdx.x] = {chain.p_drafted(i), chain.q_drafted(i), chain.coin_at(i), more};
    }
    __syncthreads();
    for (int64_t i = base; i < least(base + kDrafted, steps); ++i) next(i, drafted[i - base]);
  }
}

// Surplus of step i + 1, i the block's y: sum of max(w p - q, 0) over the chunk, less w p where that is of the draft's
// vocabulary alone.
template <class T>
__global__ void __launch_bounds__(kThreads) sum_surplus(const VerifyChain op) {
  __shared__ uint64_t slots[2][kWarps];
  Block team{slots};
  let_next_start();
  wait_for_previous();
  const int64_t b = blockIdx.z, i = int64_t(blockIdx.y) + 1;
  const ChainRow<T> chain = chain_of<T>(op, b);
  bool bad = false;
  for (int64_t s = team.rank(); s < op.steps; s += kThreads) bad |= !chain.sound(s);
  if (team.any(bad)) return;
  double w = 1.0;
  each_drafted(chain, nullptr, i,
               [&](int64_t, const Drafted& drafted) { w = next_weight(w, drafted.p, drafted.q); });
  const T *target = chain.target(i), *draft = chain.draft(i);
  const Law law = chain.p(i), other = chain.q(i);
  const int64_t tokens = 32 * chunk_threads(most(op.vocab, op.draft_vocab), op.chunks);
  const int64_t begin = int64_t(blockIdx.x) * tokens;
  double sum = 0.0;
  if (chain.dense(i)) {
    const float weight = float(w);
    constexpr int kTile = Block::kTile;
    const int64_t end = least(begin + tokens, op.vocab);
    for (int64_t c = begin + team.rank() * kTile; c < end; c += kThreads * kTile) {
      float mine[kTile], theirs[kTile];
      load_tile(target, c, end, mine);
      load_tile(draft, c, end, theirs);
      BEAGLE_UNROLL
      for (int j = 0; j < kTile; ++j) mine[j] = most(weight * law.at(mine[j]) - other.at(theirs[j]), 0.0f);
      sum += double(lane_sum(mine));
    }
  } else {
    for (int64_t c = begin + team.rank(); c < least(begin + tokens, op.draft_vocab); c += kThreads) {
      const double mine = w * double(law(target, op.token_ids ? op.token_ids[c] : c));
      sum += most(mine - double(other(draft, c)), 0.0) - mine;
    }
  }
  sum = team.sum(sum);
  if (team.rank() == 0) Place<T>(op, b, i).parts()[blockIdx.x].surplus = sum;
}

// argmax of log max(w p_n - q_n, 0) + g, or of log p_n + g where minus is false; 0 if nothing is left.
template <class T>
__device__ uint64_t draw(const ChainRow<T>& chain, int64_t n, float w, bool minus, Room& room) {
  const Law& law = chain.p(n);
  const float most_likely = law.scale * w;
  if (!(most_likely > kNoRest)) return 0;
  const Place<T> place(chain.op, chain.b, n);
  const Row<T> row = place.row();
  const Groups groups = place.groups();
  const Stream stream = chain.residual_noise(n);
  const float base = log_of(most_likely) + 1e-5f;
  __syncthreads();
  for (int32_t pair = int32_t(threadIdx.x); pair < groups.count / 2; pair += kRowThreads) {
    float noise[2];
    pair_noise(stream, uint32_t(pair), noise);
    BEAGLE_UNROLL
    for (int i = 0; i < 2; ++i) {
      const float top = groups.tops[2 * pair + i];
      const bool none = top == -kInf || top < law.cut;
      groups.bounds[2 * pair + i] = none ? -kInf : base + law.log_ratio(top) / kLog2E + noise[i];
    }
  }
  return search(room, groups, 1.0f, [](float) { return true; }, [&](uint32_t group) {
    return look(row, stream, group, [&](uint32_t token, float z, float noise) {
      const float rest = chain.rest(n, w, minus, int64_t(token), z);
      return rest > kNoRest ? make_key(log_of(rest) + noise, token) : 0;
    });
  });
}

template <class T>
__global__ void __launch_bounds__(kRowThreads, 2) verify_rows(const VerifyChain op) {
  __shared__ uint64_t slots[2][kRowWarps];
  __shared__ Room room;
  RowBlock team{slots};
  wait_for_previous();
  const ChainRow<T> chain = chain_of<T>(op, blockIdx.x);
  bool bad = false;
  for (int64_t i = team.rank(); i < op.steps; i += kRowThreads) bad |= !chain.sound(i);
  const bool good = !team.any(bad);
  int64_t n = 0;
  double w = 1.0, kept = 1.0;
  const Part* parts = op.block ? Place<T>(op, chain.b, 0).parts() : nullptr;
  if (good) {
    each_drafted(chain, parts, op.steps, [&](int64_t i, const Drafted& drafted) {
      if (op.block) {
        w = next_weight(w, drafted.p, drafted.q);
        const bool dense = i + 1 == op.steps || chain.dense(i + 1);
        const double more = dense ? drafted.more : most(drafted.more + w, 0.0);
        if (chain.block_passes(i, drafted.coin, w, more)) n = i + 1, kept = w;
      } else if (n == i && token_passes(drafted.coin, drafted.p, drafted.q)) {
        n = i + 1;
      }
    });
  }
  int64_t next = chain.p(n).best;
  if (chain.p(n).scale > 0.0f) {
    uint64_t key = 0;
    // where nothing is left, from p alone
    for (int again = 0; key == 0 && again < 2; ++again) {
      key = draw(chain, n, again ? 1.0f : float(kept), !again && good && n < op.steps, room);
    }
    if (key != 0) next = key_index(key);
  }
  if (team.rank() == 0) chain.write(n, next, good);
}

}  // namespace

void verify_chain(const VerifyChain& op, void* stream) {
  by_dtype(op.dtype, [&](auto* type) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
    const unsigned rows = unsigned(2 * op.steps + 1), batch = unsigned(op.batch);
    const unsigned threads = chunk_threads(most(op.vocab, op.draft_vocab), op.chunks);
    launch(scan_rows<T>, dim3(op.chunks, rows, batch), stream, op, threads);
    launch_dependent(make_laws<T>, dim3(rows, batch), stream, op, kRowThreads);
    if (op.block && op.steps > 1) {
      launch_dependent(sum_surplus<T>, dim3(op.chunks, unsigned(op.steps - 1), batch), stream, op);
    }
    launch_dependent(verify_rows<T>, batch, stream, op, kRowThreads);
  });
}

}  // namespace beagle::cuda
