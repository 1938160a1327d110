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
  // Of products in blocks only (amx_blocks.inl). Several of them with one A: how many, and how far apart their B and
  // out are. Or the sum of several: how many, and how far apart their A and B are.
  int64_t images = 1, b_image = 0, y_image = 0;
  int64_t k_images = 1, a_k_image = 0, b_k_image = 0;
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
  // A product in blocks (amx_blocks.inl): A is packed for ms rows and ks blocks of k at a time. Strips and panels are
  // not used.
  bool blocked;
  int64_t ms;
  int64_t group;  // the blocks of k whose panels of B a thread keeps
};
