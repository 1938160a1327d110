// A matrix product, and how it will be done.
#pragma once

#include "../../common/cpu/common.inl"
#include "microkernels.inl"
#include "pack.inl"

template <class T>
struct Gemm {
  int64_t m, n, k;
  Source<T> a;  // lanes: rows
  Source<T> b;  // lanes: columns
  Output<T> out;
  Compute<T>* a_sums;              // null, or m elements, initially zero, to which the sums of A over k are added
  const void* b_packed = nullptr;  // B as pack_b makes it, instead of b
};

struct GemmPlan {
  bool tiny, share_a, a_direct, b_direct;
  bool b_packed;  // and not b_direct: B comes in panels of the whole of k, b_panel apart
  int threads;
  int64_t kc, ks, mb, nb;
  int64_t strip;             // lanes of the private operand per job
  int64_t parts;             // jobs per strip: the shared operand is divided into this many parts
  int64_t a_panel, b_panel;  // elements of P between panels
  size_t shared_at, private_at, private_bytes, partial_at, total;
  // Of a product in blocks (amx_blocks.inl), which uses what is above it but strips and panels:
  bool blocked, share_b;
  int64_t ms, ns;  // rows and columns whose operands are packed at a time
  size_t b_at;     // of packed B; A is at shared_at
};
