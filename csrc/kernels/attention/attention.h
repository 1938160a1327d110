// Contract of scaled dot product attention: y = softmax(scale Q K^T + mask) V for each head of each batch.
//
// Q is [queries, size], K [keys, size], V [keys, value_size], y [queries, value_size], each with unit stride along its
// rows and its own strides of batch, head and row, which may be any number. mask is [queries, keys] with unit stride
// along the keys; its other strides are often 0. All sizes are >= 1. Outputs overlap nothing else.
//
// causal: query i sees the keys j <= i only. A query that sees no key, also one for which the mask is -inf everywhere,
// gives zeros. Sums, and lse, are float32 (float64 for float64); their order does not depend on the number of threads.
// Source: Milakov and Gimelshein, "Online normalizer calculation for softmax" (2018); Dao, Fu, Ermon, Rudra and Re,
// "FlashAttention" (2022).
#pragma once

#include "../activation/activation.h"  // which the bodies of the matrix product include
#include "../common/tensor.h"

namespace fastops {

struct HeadStrides {
  int64_t batch = 0, head = 0, row = 0;
  bool operator==(const HeadStrides&) const = default;
};

struct AttentionShape {
  DType dtype;
  bool causal, with_mask;
  double scale;
  int64_t batch, heads, queries, keys, size, value_size;
  HeadStrides q, k, v, y, mask;
  bool operator==(const AttentionShape&) const = default;
};

// lse[b, h, i] = log(sum_j exp(scale Q K^T + mask)), contiguous, may be null where nobody wants it.
struct AttentionForward {
  AttentionShape attention;
  DType dtype;

  struct Pointers {
    const void* q;
    const void* k;
    const void* v;
    const void* mask = nullptr;
    void* y;
    void* lse = nullptr;
  };
  bool operator==(const AttentionForward&) const = default;
};

// With P = exp(scale Q K^T + mask - lse) and D = P (grad_y V^T - sum_j grad_y y): grad_v = P^T grad_y, grad_q = scale D
// K, grad_k = scale D^T Q. A gradient that is null is not computed.
struct AttentionBackward {
  AttentionShape attention;
  DType dtype;
  HeadStrides grad_y_strides, grad_q_strides, grad_k_strides, grad_v_strides;

  struct Pointers {
    const void* grad_y;
    const void* q;
    const void* k;
    const void* v;
    const void* mask = nullptr;
    const void* y;
    const void* lse;
    void* grad_q = nullptr;
    void* grad_k = nullptr;
    void* grad_v = nullptr;
  };
  bool operator==(const AttentionBackward&) const = default;
};

#define FASTOPS_CALLS_attention(X) X(AttentionForward) X(AttentionBackward)

}  // namespace fastops
