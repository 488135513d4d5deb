// The arguments of every op, as the executors and the bindings see them. Pointers are device pointers for CUDA.
// Logits: rows with the last dimension contiguous; strides in elements.
#pragma once

#include "common.h"

// The fields of an op in the order in which Python gives them; those of a struct within stand in its place.
#define BEAGLE_FIELDS(...)         \
  template <class F>               \
  void fields(F&& each) {          \
    each(__VA_ARGS__);             \
  }

namespace beagle {

// What Python must know too and takes from here, by the bindings.
enum Dtype : int32_t { kFloat32, kFloat16, kBFloat16, kDtypes };
// Kinds of weights beside those of x's own dtype; kExact: bf16 where x is fp32.
enum Kind : int32_t { kInt8 = kDtypes, kExact, kKinds };
constexpr int32_t kMaxNodes = 1024;  // of a tree
constexpr int64_t kChunk = 8192;     // tokens of a row that one CUDA block takes
constexpr int64_t kRowWords = 8;     // of 64 bits, that the CUDA blocks of a row share
constexpr int64_t kPartWords = 4;    // that verify_chain notes of a chunk on CUDA
constexpr int32_t kMaxK = 1024;      // candidates of a row, on CUDA
constexpr int64_t kMaxRows = 65535;  // of a batch, where CUDA counts them in blockIdx.y or z

// How one row samples; temperature 0 is greedy and takes no filter.
struct RowSampling {
  uint64_t seed;
  float temperature;
  int32_t top_k;
  float top_p, min_p;
  BEAGLE_FN bool noisy() const { return temperature > 0.0f; }
  BEAGLE_FN bool filters(int64_t vocab) const {
    return noisy() && ((top_k > 0 && top_k < vocab) || top_p < 1.0f || min_p > 0.0f);
  }
};

struct Sampling {
  const int64_t* seed;
  const float* temperature;
  const int32_t* top_k;
  const float* top_p;
  const float* min_p;
  BEAGLE_FN RowSampling at(int64_t row) const {
    return {uint64_t(seed[row]), temperature[row], top_k[row], top_p[row], min_p[row]};
  }
  // Of the rows from `row` on.
  Sampling from(int64_t row) const { return {seed + row, temperature + row, top_k + row, top_p + row, min_p + row}; }
  BEAGLE_FIELDS(seed, temperature, top_k, top_p, min_p)
};

struct Tree {
  const int64_t* tokens;
  const int32_t* parents;
  const int32_t* depth;
  const int64_t* mask;
  const int32_t* size;
  int32_t nodes, words, max_depth;
  BEAGLE_FIELDS(tokens, parents, depth, mask, size, nodes, words, max_depth)
};

struct Verdict {
  int32_t* path;
  int32_t* num_accepted;
  int64_t* next_token;
  int32_t* status;
  BEAGLE_FIELDS(path, num_accepted, next_token, status)
};

struct ChooseTokens {
  const void* logits;
  int32_t dtype;
  int64_t rows, vocab, stride;
  const int64_t* positions;
  Sampling sampling;
  uint32_t stream;
  const int64_t* rounds;  // or null
  uint64_t* keys;         // workspace [rows, chunks]
  int32_t* flags;         // workspace [rows, chunks]
  float* groups;          // workspace [rows, 256 chunks + 2 kRowWords] for CUDA
  int64_t chunks;
  int64_t* tokens;
  int32_t* status;
  BEAGLE_FIELDS(logits, dtype, rows, vocab, stride, positions, sampling, stream, rounds, keys, flags, groups,
                chunks, tokens, status)
};

struct PerturbLogits {
  const void* logits;
  int32_t dtype;
  int64_t rows, vocab, stride;
  const int64_t* positions;
  Sampling sampling;
  uint64_t* keys;  // workspace [rows, chunks] for CUDA
  int32_t* flags;  // workspace [rows, chunks] for CUDA
  float* groups;   // workspace [rows, 256 chunks + 2 kRowWords] for CUDA
  float* bounds;   // workspace [rows, 2]: the largest logit, and the least that top-k and top-p keep
  int64_t chunks;
  float* values;   // [rows, vocab]
  int32_t* status;
  BEAGLE_FIELDS(logits, dtype, rows, vocab, stride, positions, sampling, keys, flags, groups, bounds, chunks, values,
                status)
};

// Node n of row b sees text[b, :lengths[b]] and its path, padded with -1 on the left; columns are tokens, or those of
// token_ids.
struct AdjustLogits {
  const void* logits;
  int32_t dtype;
  int64_t batch, nodes, width, stride_b, stride_n;
  const int64_t* paths;
  int64_t path_length;
  const int64_t* text;
  int64_t slots;
  const int32_t *lengths, *prompts;
  const float* added;    // [batch, vocab], or null
  const int32_t* first;  // [batch, vocab], or null
  int64_t vocab;
  const int64_t* phrases;
  const float* phrase_bias;
  const int32_t* phrase_rows;
  int64_t phrase_count, phrase_length;
  const float *repetition, *frequency, *presence;
  const int32_t* ngram;
  const int64_t* token_ids;  // or null
  const int32_t* allowed;    // [batch, nodes, words], or null
  int64_t words, chunks;
  uint32_t* counts;  // workspace [batch, width] for CUDA, zero
  int32_t* sizes;    // workspace [batch], zero
  int32_t* listed;   // workspace [batch, slots]: the columns of a text's different tokens, so many as sizes says
  int32_t* places;   // workspace [batch, nodes, path_length]
  float* out;        // [batch, nodes, width]
  BEAGLE_FIELDS(logits, dtype, batch, nodes, width, stride_b, stride_n, paths, path_length, text, slots, lengths, prompts,
                added, first, vocab, phrases, phrase_bias, phrase_rows, phrase_count, phrase_length, repetition,
                frequency, presence, ngram, token_ids, allowed, words, chunks, counts, sizes, listed, places, out)
};

struct TopCandidates {
  const void* logits;
  int32_t dtype;
  int64_t rows, vocab, stride;
  int32_t k;
  const int64_t* positions;
  Sampling sampling;
  const int64_t* token_ids;  // or null
  uint64_t* keys;            // workspace [rows, k] for the host
  float* sums;               // workspace [rows, chunks, 2] for CUDA
  float* groups;             // workspace [rows, 256 chunks + 2 kRowWords] for CUDA
  int64_t chunks;
  int64_t* tokens;
  float* scores;
  BEAGLE_FIELDS(logits, dtype, rows, vocab, stride, k, positions, sampling, token_ids, keys, sums, groups,
                chunks, tokens, scores)
};

struct BuildTree {
  const int64_t* root;
  const int64_t* tokens;
  const float* scores;
  const int32_t* parents;
  int64_t batch;
  int32_t candidates, nodes, words, max_depth;
  int32_t* label;  // workspace [batch, candidates]
  int64_t* out_tokens;
  int32_t* out_parents;
  int32_t* out_depth;
  int64_t* out_mask;
  int32_t* out_size;
  BEAGLE_FIELDS(root, tokens, scores, parents, batch, candidates, nodes, words, max_depth, label, out_tokens, out_parents,
                out_depth, out_mask, out_size)
};

struct JoinBranch {
  const int64_t* tokens;
  const float* scores;
  const int32_t* parents;
  const int64_t* branch_tokens;
  const float* branch_scores;
  int64_t batch;
  int32_t candidates, steps;
  int64_t* out_tokens;  // [batch, candidates + steps], as the next two
  float* out_scores;
  int32_t* out_parents;
  BEAGLE_FIELDS(tokens, scores, parents, branch_tokens, branch_scores, batch, candidates, steps, out_tokens, out_scores,
                out_parents)
};

// text: rows with the tokens contiguous, `stride` elements apart.
struct Lookup {
  const int64_t* text;
  const int32_t* lengths;
  int64_t stride, batch, size;
  int32_t count, longest;
  int64_t* tokens;
  int32_t* matched;
  BEAGLE_FIELDS(text, lengths, stride, batch, size, count, longest, tokens, matched)
};

struct AcceptTree {
  Tree tree;
  int64_t batch;
  const int64_t* chosen;
  Verdict verdict;
  BEAGLE_FIELDS(tree, batch, chosen, verdict)
};

struct VerifyTree {
  const void* logits;
  int32_t dtype;
  int64_t batch, vocab, stride_b, stride_n;
  Tree tree;
  const int64_t* positions;
  Sampling sampling;
  uint64_t* keys;  // workspace [batch, nodes, chunks]
  int32_t* flags;  // workspace [batch, nodes, chunks]
  float* groups;   // workspace [batch, nodes, 256 chunks + 2 kRowWords] for CUDA
  int64_t chunks;
  Verdict verdict;
  BEAGLE_FIELDS(logits, dtype, batch, vocab, stride_b, stride_n, tree, positions, sampling, keys, flags, groups,
                chunks, verdict)
};

struct VerifyChain {
  const void* target;
  const void* draft;
  int32_t dtype;  // of both
  int64_t batch, steps, vocab, draft_vocab, target_b, target_n, draft_b, draft_n;
  const int64_t* draft_tokens;
  const int64_t* positions;
  Sampling sampling;
  bool block;
  const int64_t* token_ids;  // or null
  void* laws;                // workspace [batch, 2 steps + 1] of Law
  float* groups;             // workspace [batch, 2 steps + 1, 256 chunks + 2 kRowWords] for CUDA
  void* parts;               // workspace [batch, 2 steps + 1, chunks, kPartWords] of int64 for CUDA
  int64_t chunks;            // of a row, for CUDA
  Verdict verdict;
  BEAGLE_FIELDS(target, draft, dtype, batch, steps, vocab, draft_vocab, target_b, target_n, draft_b, draft_n, draft_tokens,
                positions, sampling, block, token_ids, laws, groups, parts, chunks, verdict)
};

struct CompactCache {
  char* cache;
  int64_t layers, planes, batch, heads, slots, width;                      // slots a page; width in bytes
  int64_t stride_layer, stride_plane, stride_batch, stride_head, stride_slot;  // in bytes
  int64_t pages, table_width;
  const int32_t* path;
  int64_t path_length;
  const int32_t* num_accepted;
  const int32_t* lengths;
  const int32_t* table;  // or null
  BEAGLE_FIELDS(cache, layers, planes, batch, heads, slots, width, stride_layer, stride_plane, stride_batch, stride_head,
                stride_slot, pages, table_width, path, path_length, num_accepted, lengths, table)
};

}  // namespace beagle
