// Linear layers as matrix products, forward and backward. The contract is csrc/kernels/linear/linear.h.
#pragma once

#include "../../activation/cpu/rows.inl"
#include "../../common/cpu/dtype.inl"
#include "../../common/cpu/elements.inl"
#include "../../common/cpu/math.inl"
#include "../../common/cpu/numbers.inl"
#include "../../common/cpu/threads.inl"
#include "../../gemm/cpu/dot.inl"
#include "../../gemm/cpu/gemm.inl"
#include "../../gemm/cpu/microkernels.inl"
#include "../../gemm/cpu/pack.inl"
#include "../../gemm/cpu/panels.inl"

template <class T>
inline Source<T> matrix_source(const Matrix& x, bool rows_are_lanes) {
  const T* const p = static_cast<const T*>(x.data);
  return rows_are_lanes ? plain_source(p, x.row_stride, x.col_stride) : plain_source(p, x.col_stride, x.row_stride);
}

// grad_y * f'(saved). Its lanes are the rows (m) or the columns (n).
template <class T>
inline Source<T> gradient_source(const LinearBackward& args, bool rows_are_lanes) {
  Source<T> s = matrix_source<T>(args.grad_y, rows_are_lanes);
  if (args.activation.kind == ActivationKind::identity) return s;
  const Source<T> saved = matrix_source<T>(args.saved, rows_are_lanes);
  s.derivative = row_derivative<T>(args.activation.kind);
  s.saved = saved.p;
  s.saved_ls = saved.ls;
  s.saved_ks = saved.ks;
  s.activation = args.activation;
  return s;
}

template <class T>
inline Gemm<T> forward_gemm(const LinearForward& args) {
  Gemm<T> g{args.m, args.n, args.k, matrix_source<T>(args.x, true), matrix_source<T>(args.w, true), {}, nullptr};
  const ActivationKind kind = args.activation.kind;
  const bool relu = kind == ActivationKind::relu && args.z == nullptr;
  g.out = {static_cast<T*>(args.y), args.y_row_stride, static_cast<T*>(args.z), nullptr, relu, nullptr,
           args.activation};
  if (!relu && kind != ActivationKind::identity) g.out.f = row_forward<T>(kind);
  return g;
}

template <class T>
inline Output<T> plain_output(void* y, int64_t rs) {
  return {static_cast<T*>(y), rs, nullptr, nullptr, false, nullptr, {}};
}

template <class T>
inline Gemm<T> grad_x_gemm(const LinearBackward& args) {
  return {args.m,
          args.k,
          args.n,
          gradient_source<T>(args, true),
          matrix_source<T>(args.w, false),
          plain_output<T>(args.grad_x, args.k),
          nullptr};
}

template <class T>
inline Gemm<T> grad_w_gemm(const LinearBackward& args) {
  return {args.n,
          args.k,
          args.m,
          gradient_source<T>(args, false),
          matrix_source<T>(args.x, false),
          plain_output<T>(args.grad_w, args.k),
          nullptr};
}

template <class T>
inline bool contiguous_bias(const LinearForward& args) {
  return args.b == nullptr || (same_type<T, Compute<T>> && (args.b_stride == 1 || args.n == 1));
}

template <class T>
void convert_bias(const LinearForward& args, Compute<T>* to) {
  constexpr int kChunk = 64;
  const T* const from = static_cast<const T*>(args.b);
  T values[kChunk];
  for (int64_t j = 0; j < args.n; j += kChunk) {
    const int count = static_cast<int>(smaller<int64_t>(args.n - j, kChunk));
    gather(from + j * args.b_stride, 0, args.b_stride, 1, count, values, kChunk);
    widen_row(values, to + j, count);
  }
}

template <class P, class T>
KernelName gemm_name(const Gemm<T>& g) {
  return plan_gemm<P>(g, 1).tiny ? tile_name<P>("gemm_tiny", "gemm_tiny_bf16") : tile_name<P>("gemm", "gemm_bf16");
}

template <class T>
size_t forward_workspace(const LinearForward& args, int threads) {
  if (args.m == 0 || args.n == 0) return 0;
  const Gemm<T> g = forward_gemm<T>(args);
  if (takes_dot(g)) return contiguous_bias<T>(args) ? 0 : aligned(args.n * static_cast<int64_t>(sizeof(Compute<T>)));
  return with_panel<T>(args.bf16_multiply, args.m * args.n * args.k, [&](auto panel) -> size_t {
    const GemmPlan plan = plan_gemm<decltype(panel)>(g, threads);
    if (plan.tiny) return 0;
    return plan.total + (contiguous_bias<T>(args) ? 0 : aligned(args.n * static_cast<int64_t>(sizeof(Compute<T>))));
  });
}

template <class T>
void forward(const LinearForward& args, void* workspace, const Team& team) {
  using C = Compute<T>;
  if (args.m == 0 || args.n == 0) return;
  Gemm<T> g = forward_gemm<T>(args);
  if (takes_dot(g)) {
    if (contiguous_bias<T>(args)) {
      g.out.bias = static_cast<const C*>(args.b);
    } else {
      convert_bias<T>(args, static_cast<C*>(workspace));
      g.out.bias = static_cast<const C*>(workspace);
    }
    return dot_product(g, team);
  }
  with_panel<T>(args.bf16_multiply, args.m * args.n * args.k, [&](auto panel) {
    const GemmPlan plan = plan_gemm<decltype(panel)>(g, team.threads);
    alignas(64) unsigned char small_bias[kTinyBytes];  // large enough: a tiny product has n <= kTinyBytes / 8
    if (contiguous_bias<T>(args)) {
      g.out.bias = static_cast<const C*>(args.b);
    } else {
      C* const bias =
          reinterpret_cast<C*>(plan.tiny ? small_bias : static_cast<unsigned char*>(workspace) + plan.total);
      convert_bias<T>(args, bias);
      g.out.bias = bias;
    }
    gemm<decltype(panel)>(g, workspace, team);
  });
}

// Up to this many columns, the sums for grad_b are on the stack.
constexpr int64_t kSmallSums = 256;

// sums[j] = the sum of g[i, j] over rows, in their order. Columns are divided into strips.
constexpr int64_t kSumStrip = 96;

template <class T>
void column_sums(const LinearBackward& args, Compute<T>* sums, const Team& team) {
  using C = Compute<T>;
  const Source<T> s = gradient_source<T>(args, false);
  const int64_t strips = ceil_div(args.n, kSumStrip);
  const int wanted =
      args.m * args.n < kFlopPerThread / 8 ? 1 : static_cast<int>(smaller<int64_t>(strips, team.threads));
  team.parallel(wanted, [&](int thread, int actual) {
    constexpr int kRows = 32;
    alignas(64) C block[kRows * kSumStrip];
    T values[kSumStrip];
    for (int64_t j = strips * thread / actual * kSumStrip;
         j < smaller(strips * (thread + 1) / actual * kSumStrip, args.n); j += kSumStrip) {
      const int width = static_cast<int>(smaller(args.n - j, kSumStrip));
      for (int64_t i = 0; i < args.m; i += kRows) {
        const int rows = static_cast<int>(smaller<int64_t>(args.m - i, kRows));
        if (s.derivative != nullptr) {
          derivative_block(s, j, i, width, rows, true, block, kSumStrip);
        } else {
          for (int r = 0; r < rows; ++r) {
            const T* row = s.p + j * s.ls + (i + r) * s.ks;
            if (s.ls != 1) {
              gather(row, 0, s.ls, 1, width, values, kSumStrip);
              row = values;
            }
            widen_row(row, block + r * kSumStrip, width);
          }
        }
        add_columns(block, kSumStrip, width, rows, sums + j);
      }
    }
  });
}

// Whether grad_b is computed in a separate pass. A narrow gradient is multiplied in place, as reading 4096 x 64 floats
// from L2 twice is faster than packing them.
template <class T>
inline bool sums_apart(const LinearBackward& args) {
  return same_type<T, Compute<T>> && args.activation.kind == ActivationKind::identity && args.grad_y.col_stride == 1 &&
         args.grad_y.row_stride <= kNarrow && args.k <= kNarrow;
}

struct BackwardPlan {
  size_t gemm;  // bytes for the larger of the two products
  size_t sums;  // bytes for the sums for grad_b
};

template <class T>
BackwardPlan plan_backward(const LinearBackward& args, int threads) {
  BackwardPlan plan{};
  with_panel<T>(args.bf16_multiply, args.m * args.n * args.k, [&](auto panel) {
    if (args.grad_x != nullptr && args.m > 0 && args.k > 0) {
      const Gemm<T> g = grad_x_gemm<T>(args);
      const GemmPlan p = plan_gemm<decltype(panel)>(g, threads);
      if (!p.tiny && !takes_row_times_matrix(g)) plan.gemm = p.total;
    }
    if (args.grad_w != nullptr && args.n > 0 && args.k > 0) {
      Gemm<T> g = grad_w_gemm<T>(args);
      Compute<T> any;
      g.a_sums = args.grad_b != nullptr && !sums_apart<T>(args)
                     ? &any
                     : nullptr;  // the plan depends only on whether it is null
      const GemmPlan p = plan_gemm<decltype(panel)>(g, threads);
      if (!p.tiny) plan.gemm = larger(plan.gemm, p.total);
    }
  });
  if (args.grad_b != nullptr && !same_type<T, Compute<T>> && args.n > kSmallSums)
    plan.sums = aligned(args.n * static_cast<int64_t>(sizeof(Compute<T>)));
  return plan;
}

template <class T>
void backward(const LinearBackward& args, void* workspace, const Team& team) {
  using C = Compute<T>;
  if (args.grad_x != nullptr && args.m > 0 && args.k > 0) {
    const Gemm<T> g = grad_x_gemm<T>(args);
    if (takes_row_times_matrix(g))
      row_times_matrix(g, team);
    else
      with_panel<T>(args.bf16_multiply, args.m * args.n * args.k,
                    [&](auto panel) { gemm<decltype(panel)>(g, workspace, team); });
  }
  if (args.n == 0 || (args.grad_w == nullptr && args.grad_b == nullptr)) return;

  C small_sums[kSmallSums];
  C* sums = nullptr;
  if (args.grad_b != nullptr) {
    if constexpr (same_type<T, C>)
      sums = static_cast<C*>(args.grad_b);
    else if (args.n <= kSmallSums)
      sums = small_sums;
    else
      sums = reinterpret_cast<C*>(static_cast<unsigned char*>(workspace) + plan_backward<T>(args, team.threads).gemm);
    for (int64_t j = 0; j < args.n; ++j) sums[j] = 0;
  }
  if (args.grad_w != nullptr && args.k > 0) {
    Gemm<T> g = grad_w_gemm<T>(args);
    const bool apart = sums != nullptr && sums_apart<T>(args);
    if (apart) column_sums<T>(args, sums, team);
    if (!apart) g.a_sums = sums;
    with_panel<T>(args.bf16_multiply, args.m * args.n * args.k,
                  [&](auto panel) { gemm<decltype(panel)>(g, workspace, team); });
  } else if (sums != nullptr) {
    column_sums<T>(args, sums, team);
  }
  if constexpr (!same_type<T, C>) {
    if (sums == nullptr) return;
    T* const to = static_cast<T*>(args.grad_b);
    for (int64_t j = 0; j < args.n; j += kSumStrip)
      store_row<T>(sums + j, to + j, static_cast<int>(smaller(args.n - j, kSumStrip)));
  }
}

template <class T>
KernelName forward_name(const LinearForward& args) {
  const Gemm<T> g = forward_gemm<T>(args);
  if (takes_dot(g)) return {"dot", {kDot, kDot}};
  return with_panel<T>(args.bf16_multiply, args.m * args.n * args.k,
                       [&](auto panel) { return gemm_name<decltype(panel)>(g); });
}

template <class T>
KernelName backward_name(const LinearBackward& args) {
  if (args.grad_x == nullptr && args.grad_w == nullptr) return {"column_sums"};
  if (args.grad_x != nullptr && takes_row_times_matrix(grad_x_gemm<T>(args))) return {"row_times_matrix"};
  const Gemm<T> g = args.grad_x != nullptr ? grad_x_gemm<T>(args) : grad_w_gemm<T>(args);
  return with_panel<T>(args.bf16_multiply, args.m * args.n * args.k,
                       [&](auto panel) { return gemm_name<decltype(panel)>(g); });
}

size_t linear_forward_workspace(const LinearForward& args, int threads) {
  return with_dtype(args.dtype, [&](auto t) { return forward_workspace<decltype(t)>(args, threads); });
}
void linear_forward(const LinearForward& args, void* workspace, const Team& team) {
  with_dtype(args.dtype, [&](auto t) { forward<decltype(t)>(args, workspace, team); });
}
KernelName linear_forward_name(const LinearForward& args) {
  return with_dtype(args.dtype, [&](auto t) { return forward_name<decltype(t)>(args); });
}
size_t linear_backward_workspace(const LinearBackward& args, int threads) {
  return with_dtype(args.dtype, [&](auto t) {
    const BackwardPlan plan = plan_backward<decltype(t)>(args, threads);
    return plan.gemm + plan.sums;
  });
}
void linear_backward(const LinearBackward& args, void* workspace, const Team& team) {
  with_dtype(args.dtype, [&](auto t) { backward<decltype(t)>(args, workspace, team); });
}
KernelName linear_backward_name(const LinearBackward& args) {
  return with_dtype(args.dtype, [&](auto t) { return backward_name<decltype(t)>(args); });
}
