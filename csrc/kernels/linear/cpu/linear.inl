// Linear layers as matrix products, forward and backward. The contract is csrc/kernels/linear/linear.h.
#pragma once

#include "../../activation/cpu/rows.inl"
#include "../../common/cpu/common.inl"
#include "../../gemm/cpu/dot.inl"
#include "../../gemm/cpu/gemm.inl"
#include "../../gemm/cpu/panels.inl"

template <class T>
inline Source<T> matrix_source(const void* data, const Strides& strides, bool rows_are_lanes) {
  const T* const p = static_cast<const T*>(data);
  return rows_are_lanes ? plain_source(p, strides.row, strides.col) : plain_source(p, strides.col, strides.row);
}

// grad_y * f'(saved). Its lanes are the rows (m) or the columns (n).
template <class T>
inline Source<T> gradient_source(const Bound<LinearBackward>& args, bool rows_are_lanes) {
  Source<T> s = matrix_source<T>(args.grad_y, args.grad_y_strides, rows_are_lanes);
  if (args.activation.kind == ActivationKind::identity) return s;
  const Source<T> saved = matrix_source<T>(args.saved, args.saved_strides, rows_are_lanes);
  s.derivative = row_derivative<T>(args.activation.kind);
  s.saved = saved.p;
  s.saved_ls = saved.ls;
  s.saved_ks = saved.ks;
  s.activation = args.activation;
  return s;
}

template <class T>
inline Gemm<T> forward_gemm(const Bound<LinearForward>& args) {
  Gemm<T> g{args.m,
            args.n,
            args.k,
            matrix_source<T>(args.x, args.x_strides, true),
            matrix_source<T>(args.w, args.w_strides, true),
            {},
            nullptr};
  const ActivationKind kind = args.activation.kind;
  const Rectifier relu = product_rectifier<T>(args.activation, args.z);
  g.out = {static_cast<T*>(args.y), args.y_row_stride, static_cast<T*>(args.z), nullptr, relu, nullptr,
           args.activation};
  if (!relu && kind != ActivationKind::identity) g.out.f = row_forward<T>(kind);
  g.out.residual = static_cast<const T*>(args.residual);
  if (args.packed_w) g.b_packed = args.w;
  return g;
}

template <class T>
inline Output<T> plain_output(void* y, int64_t rs) {
  return {static_cast<T*>(y), rs, nullptr, nullptr, kNoRectifier, nullptr, {}};
}

template <class T>
inline Gemm<T> grad_x_gemm(const Bound<LinearBackward>& args) {
  return {args.m,
          args.k,
          args.n,
          gradient_source<T>(args, true),
          matrix_source<T>(args.w, args.w_strides, false),
          plain_output<T>(args.grad_x, args.k),
          nullptr};
}

template <class T>
inline Gemm<T> grad_w_gemm(const Bound<LinearBackward>& args) {
  return {args.n,
          args.k,
          args.m,
          gradient_source<T>(args, false),
          matrix_source<T>(args.x, args.x_strides, false),
          plain_output<T>(args.grad_w, args.k),
          nullptr};
}

template <class T>
inline bool contiguous_bias(const Bound<LinearForward>& args) {
  return args.bias == nullptr || (same_type<T, Compute<T>> && (args.bias_stride == 1 || args.n == 1));
}

template <class T>
void convert_bias(const Bound<LinearForward>& args, Compute<T>* to) {
  constexpr int kChunk = 64;
  const T* const from = static_cast<const T*>(args.bias);
  T values[kChunk];
  for (int64_t j = 0; j < args.n; j += kChunk) {
    const int count = static_cast<int>(smaller<int64_t>(args.n - j, kChunk));
    gather(from + j * args.bias_stride, 0, args.bias_stride, 1, count, values, kChunk);
    widen_row(values, to + j, count);
  }
}

template <class P>
KernelName gemm_name(const GemmPlan& plan) {
  if constexpr (Blocks<P>::all)
    return Blocks<P>::kernel;
  else
    return plan.tiny ? tile_name<P>("gemm_tiny", "gemm_tiny_bf16") : tile_name<P>("gemm", "gemm_bf16");
}

// A bias that is converted goes behind the product's own memory; that of a tiny product is on the stack.
template <class P, class T>
void linear_forward(const Bound<LinearForward>& args, const GemmPlan& plan, void* workspace, const Team& team) {
  using C = Compute<T>;
  Gemm<T> g = forward_gemm<T>(args);
  alignas(64) unsigned char small_bias[kTinyBytes];  // large enough: a tiny product has n <= kTinyBytes / 8
  if (contiguous_bias<T>(args)) {
    g.out.bias = static_cast<const C*>(args.bias);
  } else {
    C* const bias = reinterpret_cast<C*>(plan.tiny ? small_bias : static_cast<unsigned char*>(workspace) + plan.total);
    convert_bias<T>(args, bias);
    g.out.bias = bias;
  }
  gemm<P>(g, plan, workspace, team);
}

template <class T>
void linear_dot(const Bound<LinearForward>& args, void* workspace, const Team& team) {
  using C = Compute<T>;
  Gemm<T> g = forward_gemm<T>(args);
  if (contiguous_bias<T>(args)) {
    g.out.bias = static_cast<const C*>(args.bias);
  } else {
    convert_bias<T>(args, static_cast<C*>(workspace));
    g.out.bias = static_cast<const C*>(workspace);
  }
  dot_product(g, team);
}

// Decides that the product g of the linear layer as_linear(args) is done with panels of P. bias: bytes for it.
template <class P, class T, class Call, class AsLinear>
void plan_product_forward(Plan<Call>& plan, const Gemm<T>& g, size_t bias, AsLinear) {
  const GemmPlan product = plan_gemm<P>(g, plan.target.threads);
  decide(plan, gemm_name<P>(product), product.tiny ? 0 : product.total + bias, product,
         [](auto& args, auto& product, auto* workspace, auto& team) {
           linear_forward<P, T>(AsLinear{}(args), product, workspace, team);
         });
  if (!product.b_packed) return;
  plan.packed = packed_b_bytes<P>(g, product);
  plan.packer = [](const Plan<Call>& plan, const void* w, void* to) {
    typename Call::Pointers pointers{};
    pointers.w = w;
    pack_b<P>(forward_gemm<T>(AsLinear{}(bind(plan, pointers))), *reinterpret_cast<const GemmPlan*>(plan.decisions),
              to);
  };
}

// Decides the plan of a call that is the linear layer as_linear(args).
template <class T, class Call, class AsLinear>
void plan_linear_forward(Plan<Call>& plan, const Bound<Call>& call, AsLinear as_linear) {
  const Bound<LinearForward> args = as_linear(call);
  if (args.residual != nullptr && !same_type<T, Compute<T>>) return;
  const Gemm<T> g = forward_gemm<T>(args);
  const size_t bias = contiguous_bias<T>(args) ? 0 : aligned(args.n * static_cast<int64_t>(sizeof(Compute<T>)));
  if (takes_dot(g) && !(args.packed_w && g.m >= kMr))  // with little to pack, whole tiles are faster
    return decide(plan, {"dot", {kDot, kDot}}, bias,
                  [](auto& args, auto* workspace, auto& team) { linear_dot<T>(AsLinear{}(args), workspace, team); });
  with_panel<T>(args.bf16_multiply, args.m * args.n * args.k,
                [&](auto panel) { plan_product_forward<decltype(panel)>(plan, g, bias, as_linear); });
}

// Up to this many columns, the sums for grad_bias are on the stack.
constexpr int64_t kSmallSums = 256;

// sums[j] = the sum of g[i, j] over rows, in their order. Columns are divided into strips. Where g has a derivative,
// its values, rounded, can be kept as well: m dense rows. Then sums may be null.
constexpr int64_t kSumStrip = 96;

template <class T>
void column_sums(const Bound<LinearBackward>& args, Compute<T>* sums, const Team& team, T* derived = nullptr) {
  using C = Compute<T>;
  const Source<T> s = gradient_source<T>(args, false);
  const int64_t strips = ceil_div(args.n, kSumStrip);
  const int wanted =
      args.m * args.n < kFlopPerThread / 8 ? 1 : static_cast<int>(smaller<int64_t>(strips, team.threads));
  parallel(team, wanted, [&](Crew& crew) {
    constexpr int kRows = 32;
    alignas(64) C block[kRows * kSumStrip];
    T values[kSumStrip];
    crew.each(strips, [&](int64_t strip) {
      const int64_t j = strip * kSumStrip;
      const int width = static_cast<int>(smaller(args.n - j, kSumStrip));
      for (int64_t i = 0; i < args.m; i += kRows) {
        const int rows = static_cast<int>(smaller<int64_t>(args.m - i, kRows));
        if (s.derivative != nullptr) {
          derivative_block(s, j, i, width, rows, true, block, kSumStrip);
          for (int r = 0; derived != nullptr && r < rows; ++r)
            store_row<T>(block + r * kSumStrip, derived + (i + r) * args.n + j, width);
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
        if (sums != nullptr) add_columns(block, kSumStrip, width, rows, sums + j);
      }
    });
  });
}

// Whether grad_bias is computed in a separate pass. A narrow gradient is multiplied in place, as reading 4096 x 64
// floats from L2 twice is faster than packing them.
template <class T>
inline bool sums_apart(const Bound<LinearBackward>& args) {
  return same_type<T, Compute<T>> && args.activation.kind == ActivationKind::identity && args.grad_y_strides.col == 1 &&
         args.grad_y_strides.row <= kNarrow && args.k <= kNarrow;
}

struct BackwardPlan {
  bool row_times_matrix;  // the way to grad_x
  GemmPlan grad_x, grad_w;
  size_t gemm;     // bytes for the larger of the two products
  size_t sums;     // bytes for the sums for grad_bias
  size_t derived;  // bytes for grad_y * f'(saved), if that is formed ahead of both products
};

// The matrix unit's products would each form the derivatives as they pack: 1.2 to 1.5 times as long, forward and
// backward, of a bfloat16 layer with GELU or ReLU (2048x512x2048, 1024x768x3072; Emerald Rapids).
constexpr int64_t kDerivedElements = 16384;

template <class P, class T>
inline bool derives_once(const Bound<LinearBackward>& args) {
  return Blocks<P>::some && args.activation.kind != ActivationKind::identity && args.grad_x != nullptr &&
         args.grad_w != nullptr && args.k > 0 && args.m * args.n >= kDerivedElements;
}

// The gradients once grad_y * f'(saved) is in memory.
inline Bound<LinearBackward> with_derived(Bound<LinearBackward> args, const void* derived) {
  args.grad_y = derived;
  args.grad_y_strides = {args.n, 1};
  args.activation = {};
  args.saved = nullptr;
  return args;
}

template <class P, class T>
BackwardPlan plan_backward(const Bound<LinearBackward>& call, int threads) {
  BackwardPlan plan{};
  Bound<LinearBackward> args = call;
  const bool once = derives_once<P, T>(args);
  if (once) {
    plan.derived = aligned(args.m * args.n * static_cast<int64_t>(sizeof(T)));
    args = with_derived(args, planned_address(64));
  }
  if (args.grad_x != nullptr && args.m > 0 && args.k > 0) {
    const Gemm<T> g = grad_x_gemm<T>(args);
    plan.grad_x = plan_gemm<P>(g, threads);
    plan.row_times_matrix = takes_row_times_matrix(g);
    if (!plan.grad_x.tiny && !plan.row_times_matrix) plan.gemm = plan.grad_x.total;
  }
  if (args.grad_w != nullptr && args.n > 0 && args.k > 0) {
    Gemm<T> g = grad_w_gemm<T>(args);
    Compute<T> any;
    // The plan depends only on whether it is null.
    g.a_sums = args.grad_bias != nullptr && !once && !sums_apart<T>(args) ? &any : nullptr;
    plan.grad_w = plan_gemm<P>(g, threads);
    if (!plan.grad_w.tiny) plan.gemm = larger(plan.gemm, plan.grad_w.total);
  }
  if (args.grad_bias != nullptr && !same_type<T, Compute<T>> && args.n > kSmallSums)
    plan.sums = aligned(args.n * static_cast<int64_t>(sizeof(Compute<T>)));
  return plan;
}

template <class P, class T>
void linear_backward(const Bound<LinearBackward>& call, const BackwardPlan& plan, void* workspace, const Team& team) {
  using C = Compute<T>;
  unsigned char* const bytes = static_cast<unsigned char*>(workspace);
  Bound<LinearBackward> args = call;
  C small_sums[kSmallSums];
  C* sums = nullptr;
  if (args.grad_bias != nullptr) {
    if constexpr (same_type<T, C>)
      sums = static_cast<C*>(args.grad_bias);
    else if (args.n <= kSmallSums)
      sums = small_sums;
    else
      sums = reinterpret_cast<C*>(bytes + plan.gemm);
    for (int64_t j = 0; j < args.n; ++j) sums[j] = 0;
  }
  const bool once = plan.derived > 0;
  if (once) {
    T* const derived = reinterpret_cast<T*>(bytes + plan.gemm + plan.sums);
    column_sums<T>(args, sums, team, derived);
    args = with_derived(args, derived);
  }
  if (args.grad_x != nullptr && args.m > 0 && args.k > 0) {
    const Gemm<T> g = grad_x_gemm<T>(args);
    if (plan.row_times_matrix)
      row_times_matrix(g, team);
    else
      gemm<P>(g, plan.grad_x, workspace, team);
  }
  if (args.n == 0) return;
  if (args.grad_w != nullptr && args.k > 0) {
    Gemm<T> g = grad_w_gemm<T>(args);
    const bool apart = sums != nullptr && !once && sums_apart<T>(args);
    if (apart) column_sums<T>(args, sums, team);
    if (!apart && !once) g.a_sums = sums;
    gemm<P>(g, plan.grad_w, workspace, team);
  } else if (sums != nullptr) {
    column_sums<T>(args, sums, team);
  }
  if constexpr (!same_type<T, C>) {
    if (sums == nullptr) return;
    T* const to = static_cast<T*>(args.grad_bias);
    for (int64_t j = 0; j < args.n; j += kSumStrip)
      store_row<T>(sums + j, to + j, static_cast<int>(smaller(args.n - j, kSumStrip)));
  }
}

// Decides that the gradients as_linear(args) are products of panels of P.
template <class P, class T, class Call, class AsLinear>
void plan_products_backward(Plan<Call>& plan, const Bound<LinearBackward>& args, AsLinear) {
  const BackwardPlan products = plan_backward<P, T>(args, plan.target.threads);
  const KernelName name = args.grad_x == nullptr && args.grad_w == nullptr ? KernelName{"column_sums"}
                          : products.row_times_matrix
                              ? KernelName{"row_times_matrix"}
                              : gemm_name<P>(args.grad_x != nullptr ? products.grad_x : products.grad_w);
  decide(plan, name, products.gemm + products.sums + products.derived, products,
         [](auto& args, auto& products, auto* workspace, auto& team) {
           linear_backward<P, T>(AsLinear{}(args), products, workspace, team);
         });
}

// Decides the plan of a call that is the gradients as_linear(args).
template <class T, class Call, class AsLinear>
void plan_linear_backward(Plan<Call>& plan, const Bound<Call>& call, AsLinear as_linear) {
  const Bound<LinearBackward> args = as_linear(call);
  with_panel<T>(args.bf16_multiply, args.m * args.n * args.k,
                [&](auto panel) { plan_products_backward<decltype(panel), T>(plan, args, as_linear); });
}

#if defined(FASTOPS_HAS_AMX)
// Where the matrix unit is faster than multiply-adds: on Granite Rapids, one thread and two, m x n x k of 1024^3 1.60
// times, 800 x 768 x 768 1.50, 256^3 1.19; 128^3 0.95, 25088 x 64 x 64 0.93. 25088 x 128 x 256 0.87 with gradients.
constexpr int64_t kPartsRows = 64, kPartsFeatures = 128, kPartsWork = 16 << 20, kPartsManyRows = 8192;
// With weights that are packed already (Emerald Rapids, m x n x k): 32 x 128 x 784 1.24 and 1.07, 64 x 128 x 784 1.23
// and 1.46, 64 x 512 x 512 1.28 and 1.31, 100 x 200 x 300 1.07 and 1.17; 16 x 128 x 784 0.99, 196 x 128 x 128 1.10 and
// 0.92.
constexpr int64_t kPartsPackedWork = 1 << 20, kPartsPackedDepth = 256, kPartsPackedRows = 32;

inline bool has_packed_w(const LinearForward& call) { return call.packed_w; }
inline bool has_packed_w(const LinearBackward&) { return false; }

// body(bf16_parts<n>{}) for float32 layers that are faster by parts than by multiply-adds.
template <class Args, class Body>
inline void with_parts(const Args& args, Body&& body) {
  const bool packed = has_packed_w(args) && args.k >= kPartsPackedDepth;
  bool faster = args.m >= (packed ? kPartsPackedRows : kPartsRows) && smaller(args.n, args.k) >= kPartsFeatures;
  faster = faster && args.m * args.n * args.k >= (packed ? kPartsPackedWork : kPartsWork);
  // Many rows of few features are bound by memory, which parts read and write more of.
  faster = faster && (args.m <= kPartsManyRows || smaller(args.n, args.k) >= 256);
  const auto how = args.bf16_multiply;
  if (!(how == Bf16Multiply::automatic ? faster : how == Bf16Multiply::native) || args.m * args.n * args.k == 0) return;
  if (args.precision == Precision::highest)
    body(bf16_parts<3>{});
  else if (args.precision == Precision::high)
    body(bf16_parts<2>{});
  else
    body(bf16_parts<1>{});
}

template <class Call, class AsLinear>
void plan_linear_by_parts(Plan<Call>& plan, const Bound<Call>& call, AsLinear as_linear) {
  const auto args = as_linear(call);
  with_parts(args, [&](auto parts) {
    using P = decltype(parts);
    if constexpr (same_type<decltype(args), const Bound<LinearForward>>) {
      const size_t bias = contiguous_bias<float>(args) ? 0 : aligned(args.n * static_cast<int64_t>(sizeof(float)));
      plan_product_forward<P>(plan, forward_gemm<float>(args), bias, as_linear);
    } else {
      plan_products_backward<P, float>(plan, args, as_linear);
    }
  });
}
#endif

struct AsItIs {
  template <class Args>
  Args operator()(const Args& args) const {
    return args;
  }
};

inline LinearForward::Pointers planned_pointers(const LinearForward& call) {
  void* const p = planned_address(call.alignment);
  return {p, p, call.with_bias ? p : nullptr, p, call.with_z ? p : nullptr, call.with_residual ? p : nullptr};
}
inline LinearBackward::Pointers planned_pointers(const LinearBackward& call) {
  void* const p = planned_address(call.alignment);
  return {
      p, p, p, p, call.with_grad_x ? p : nullptr, call.with_grad_w ? p : nullptr, call.with_grad_bias ? p : nullptr};
}

void plan_call(Plan<LinearForward>& plan) {
  const LinearForward& call = plan.call;
  if (call.m == 0 || call.n == 0) return decide_nothing(plan);
  const auto args = bind(plan, planned_pointers(call));
  with_dtype(call.dtype, [&](auto type) { plan_linear_forward<decltype(type)>(plan, args, AsItIs{}); });
}

void plan_call(Plan<LinearBackward>& plan) {
  const auto args = bind(plan, planned_pointers(plan.call));
  with_dtype(plan.call.dtype, [&](auto type) { plan_linear_backward<decltype(type)>(plan, args, AsItIs{}); });
}

#if defined(FASTOPS_HAS_AMX)
void plan_float32(Plan<LinearForward>& plan) {
  plan_linear_by_parts(plan, bind(plan, planned_pointers(plan.call)), AsItIs{});
}
void plan_float32(Plan<LinearBackward>& plan) {
  plan_linear_by_parts(plan, bind(plan, planned_pointers(plan.call)), AsItIs{});
}
#endif
