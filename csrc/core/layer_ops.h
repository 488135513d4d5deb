// What the ops on layers and attention take; ops.h says how such a struct is made.
#pragma once

#include "ops.h"

namespace beagle {

// q, k, v with the last dimension contiguous, strides in elements; out contiguous [batch, nodes, heads, value_width].
// slots: of a row, or of a page where there is a table [batch, table_width].
struct TreeAttention {
  const void *q, *k, *v;
  void* out;
  int32_t dtype;
  int64_t batch, nodes, heads, kv_heads, width, value_width, slots, words;
  int64_t q_batch, q_node, q_head, k_batch, k_head, k_slot, v_batch, v_head, v_slot;
  const int32_t* lengths;
  const int64_t* mask;
  const int32_t* table;  // or null
  int64_t table_width, pages;
  float scale;
  const int32_t* starts;  // [batch, nodes], or null
  const float* sinks;     // [heads], or null
  float softcap;          // 0: none
  BEAGLE_FIELDS(q, k, v, out, dtype, batch, nodes, heads, kv_heads, width, value_width, slots, words, q_batch, q_node,
                q_head, k_batch, k_head, k_slot, v_batch, v_head, v_slot, lengths, mask, table, table_width, pages, scale,
                starts, sinks, softcap)
};

// x, weight with the last dimension contiguous, strides in elements; out contiguous [rows, outputs].
struct SkinnyLinear {
  const void *x, *weight;
  void* out;
  int32_t dtype, kind;  // of x and out; of the weight
  int64_t rows, outputs, width, x_stride, stride;
  BEAGLE_FIELDS(x, weight, out, dtype, kind, rows, outputs, width, x_stride, stride)
};

// A linear layer as nn.Linear stores it: y = W x + bias, W [outputs, width] with rows `stride` elements apart; W null: there
// is none.
struct LinearWeight {
  const void* weight;
  const void* bias;     // or null
  const float* scales;  // [outputs, width / group] of int8
  int32_t kind;         // a Dtype or a Kind
  int64_t outputs, width, stride, group;
  BEAGLE_FIELDS(weight, bias, scales, kind, outputs, width, stride, group)
};

// x / sqrt(mean(x^2) + eps) * (weight + added); weight null: x as it is.
struct NormWeight {
  const void* weight;
  float eps, added;
  BEAGLE_FIELDS(weight, eps, added)
};

// A plane of a cache: slot s of row b's head h is at base + place * batch + h * head + s' * slot, as in TreeAttention.
struct CachePlane {
  void* base;
  int64_t batch, head, slot;
  BEAGLE_FIELDS(base, batch, head, slot)
};

enum Activation : int32_t { kSilu, kGeluTanh };

// What new tokens bring to decoder layers: x, out [batch, nodes, width], cos, sin [batch, nodes, rotary].
struct NewTokens {
  const void* x;
  void* out;
  int64_t batch, nodes, rotary;
  const void *cos, *sin;
  int64_t slots;
  const int32_t* table;  // or null
  int64_t table_width, pages;
  const int32_t* lengths;
  const int64_t* mask;
  int64_t words;
  const int32_t* starts;  // or null
  int64_t write;          // where the new keys go, behind the length
  int64_t ring;           // slots from the first on that they go round, or 0
  const int32_t* ends;    // [batch] slots from which on nothing is kept, or null
  BEAGLE_FIELDS(x, out, batch, nodes, rotary, cos, sin, slots, table, table_width, pages, lengths, mask, words, starts,
                write, ring, ends)
};

// What a decoder layer is, everything of one dtype but the weights of its linear layers. Without q it is only the keys
// and values of the states x, by norm_state.
struct LayerParts {
  int32_t dtype;
  int64_t width, heads, kv_heads, head_width;
  LinearWeight q, k, v, o, gate, up, down;
  NormWeight norm_in, norm_q, norm_k, norm_attended, norm_mlp, norm_after, norm_out, norm_state;
  int32_t activation;
  float residual, scale, softcap;  // softcap 0: none
  int32_t of_output;               // keys are those of the states that come out
  int32_t turned;                  // queries and keys have rotary positions
  BEAGLE_FIELDS(dtype, width, heads, kv_heads, head_width, q, k, v, o, gate, up, down, norm_in, norm_q, norm_k,
                norm_attended, norm_mlp, norm_after, norm_out, norm_state, activation, residual, scale, softcap, of_output,
                turned)
};

struct DecoderLayer : LayerParts, NewTokens {
  CachePlane keys, values;
};

// The same of a weight in int8 with contiguous scales [outputs, width / group]; x and out of `dtype`.
struct Int8Linear {
  const void* x;
  const int8_t* weight;
  const float* scales;
  void* out;
  int32_t dtype;
  int64_t rows, outputs, width, group, x_stride, stride;
  BEAGLE_FIELDS(x, weight, scales, out, dtype, rows, outputs, width, group, x_stride, stride)
};

}  // namespace beagle
