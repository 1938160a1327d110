// Narrow networks on the CPU, all layers of some rows at a time. The contract is csrc/kernels/mlp/mlp.h.
//
// The lanes of the vectors are rows of the batch: layers of 5 outputs then fill a vector as well as layers of 64. A
// panel of kMlpPanel rows is transposed once, [feature][row], and stays so through all layers.
#pragma once

#include "../../activation/cpu/rows.inl"
#include "../../common/cpu/common.inl"
#include "../../gemm/cpu/microkernels.inl"
#include "../../gemm/cpu/pack.inl"

#if defined(FASTOPS_32_REGISTERS)
constexpr int kMlpRegisters = 32;
#else
constexpr int kMlpRegisters = 16;
#endif

// y[j][r] = bias[j] + the sum over p of w[j w_rs + p w_cs] h[p][r], for J features and the rows of a panel.
template <class T, int J>
void panel_features(const T* w, int64_t w_rs, int64_t w_cs, const T* bias, const T* h, int64_t k, T* y) {
  using V = Vec<T>;
  for (int r = 0; r < kMlpPanel; r += 2 * V::size) {
    V acc[J][2];
#pragma GCC unroll 8
    for (int j = 0; j < J; ++j) acc[j][0] = acc[j][1] = bias == nullptr ? V::zero() : V::set1(bias[j]);
    const T* from = h + r;
    const T* at = w;
    for (int64_t p = 0; p < k; ++p, from += kMlpPanel, at += w_cs) {
      const V a = V::load(from), b = V::load(from + V::size);
#pragma GCC unroll 8
      for (int j = 0; j < J; ++j) {
        const V c = V::set1(at[j * w_rs]);
        acc[j][0] = fma(c, a, acc[j][0]);
        acc[j][1] = fma(c, b, acc[j][1]);
      }
    }
#pragma GCC unroll 8
    for (int j = 0; j < J; ++j) {
      acc[j][0].store(y + j * kMlpPanel + r);
      acc[j][1].store(y + j * kMlpPanel + r + V::size);
    }
  }
}

// The same for n features.
template <class T>
void panel_product(const T* w, int64_t w_rs, int64_t w_cs, const T* bias, const T* h, int64_t n, int64_t k, T* y) {
  constexpr int most = kMlpRegisters / 4;
  const auto next = [&]<int J>() {
    panel_features<T, J>(w, w_rs, w_cs, bias, h, k, y);
    w += J * w_rs;
    if (bias != nullptr) bias += J;
    y += J * kMlpPanel;
    n -= J;
  };
  while (n >= most) next.template operator()<most>();
  if (most > 4 && n >= 4) next.template operator()<4>();
  if (n >= 2) next.template operator()<2>();
  if (n >= 1) next.template operator()<1>();
}

// Rows past the last one are zero, so that they add nothing to a gradient.
template <class T>
void clear_padding(T* y, int64_t n, int64_t rows) {
  if (rows == kMlpPanel) return;
  for (int64_t j = 0; j < n; ++j)
    for (int64_t r = rows; r < kMlpPanel; ++r) y[j * kMlpPanel + r] = 0;
}

// Some rows of a matrix with k columns to a panel, and back.
template <class T>
void read_panel(const T* from, int64_t row_stride, int64_t rows, int64_t k, T* panel) {
  pack_plain<T, T, kMlpPanel>(from, row_stride, 1, static_cast<int>(rows), k, panel);
}
template <class T>
void write_panel(const T* panel, int64_t rows, int64_t n, T* to) {
  if (n == 1) return store_row<T>(panel, to, static_cast<int>(rows));
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t j = 0; j < n; ++j) to[r * n + j] = panel[j * kMlpPanel + r];
}

inline int64_t mlp_widest(const MlpShape& shape) {
  int64_t widest = 0;
  for (int l = 0; l <= shape.layers; ++l) widest = larger(widest, shape.widths[l]);
  return widest;
}
inline int64_t mlp_products(const MlpShape& shape) {
  int64_t products = 0;
  for (int l = 0; l < shape.layers; ++l) products += shape.widths[l] * shape.widths[l + 1];
  return products;
}

struct MlpForwardPlan {
  MlpSaved saved;
  int64_t panels, scratch;  // scratch: elements for a thread
  int threads;
};

template <class T>
void mlp_forward(const Bound<MlpForward>& args, const MlpForwardPlan& plan, void* workspace, const Team& team) {
  const MlpShape& shape = args.shape;
  const int layers = shape.layers;
  parallel(team, plan.threads, [&](Crew& crew) {
    T* const scratch = static_cast<T*>(workspace) + crew.thread * plan.scratch;
    T* const pair[2] = {scratch, scratch + plan.scratch / 2};
    crew.each(plan.panels, [&](int64_t panel) {
      const int64_t first = panel * kMlpPanel, rows = smaller<int64_t>(kMlpPanel, shape.m - first);
      T* const saved =
          args.hidden_outputs == nullptr ? nullptr : static_cast<T*>(args.hidden_outputs) + panel * plan.saved.total;
      read_panel(static_cast<const T*>(args.x) + first * args.x_row_stride, args.x_row_stride, rows, shape.widths[0],
                 pair[0]);
      const T* h = pair[0];
      for (int l = 0; l < layers; ++l) {
        const int64_t k = shape.widths[l], n = shape.widths[l + 1];
        const bool last = l + 1 == layers;
        const Activation& f = last ? args.output : args.hidden;
        T* z = h == pair[0] ? pair[1] : pair[0];
        T* y = z;
        if (saved != nullptr && !last) {
          y = saved + plan.saved.output[l];
          z = saved + plan.saved.derived[l];
        } else if (saved != nullptr && has_slope(f) && saved_by_linear(f) == Saved::input) {
          z = saved + plan.saved.derived[l];
        }
        panel_product<T>(static_cast<const T*>(args.w[l]), k, 1, static_cast<const T*>(args.bias[l]), h, n, k, z);
        if (has_slope(f)) row_forward<T>(f.kind)(z, y, n * kMlpPanel, f);
        if (saved != nullptr) {
          clear_padding(y, n, rows);
          if (z != y) clear_padding(z, n, rows);
          if (last && has_slope(f) && saved_by_linear(f) == Saved::output)
            store_row<T>(y, saved + plan.saved.derived[l], static_cast<int>(n * kMlpPanel));
        }
        h = y;
      }
      const int64_t n = shape.widths[layers];
      write_panel(h, rows, n, static_cast<T*>(args.y) + first * n);
    });
  });
}

// The gradients of weights are summed by parts of the batch, whose number depends on the shape alone: groups of panels
// that stay in the L2 cache together, and consecutive groups to a part.
struct MlpBackwardPlan {
  MlpSaved saved;
  int64_t panels, group, groups, parts;
  int64_t part;                      // elements of a part's sums
  int64_t gradient[kMostMlpLayers];  // in a panel's scratch: grad_z of layer l
  int64_t x, next, panel_scratch;    // x, grad_x, and the whole
  int64_t packed;                    // elements for packed panels, which follow the scratch of a group
  int threads;
};

// Within one part, sums += over the group: grad_w[j][i] = the sum over rows of g[j] h[i], and grad_bias.
template <class T>
void panel_weights(const T* g, const T* h, int64_t stride_g, int64_t stride_h, int64_t panels, int64_t n, int64_t k,
                   bool add, T* grad_w) {
  using V = Vec<T>;
  constexpr int J = 4, I = kMlpRegisters / 8;
  for (int64_t j = 0; j < n; j += J)
    for (int64_t i = 0; i < k; i += I) {
      // Past the end the last feature is computed again.
      const T *gs[J], *hs[I];
      for (int a = 0; a < J; ++a) gs[a] = g + smaller<int64_t>(j + a, n - 1) * kMlpPanel;
      for (int b = 0; b < I; ++b) hs[b] = h + smaller<int64_t>(i + b, k - 1) * kMlpPanel;
      V acc[J][I];
#pragma GCC unroll 4
      for (int a = 0; a < J; ++a)
#pragma GCC unroll 4
        for (int b = 0; b < I; ++b) acc[a][b] = V::zero();
      for (int64_t p = 0; p < panels; ++p)
        for (int r = 0; r < kMlpPanel; r += V::size) {
          V x[I];
#pragma GCC unroll 4
          for (int b = 0; b < I; ++b) x[b] = V::load(hs[b] + p * stride_h + r);
#pragma GCC unroll 4
          for (int a = 0; a < J; ++a) {
            const V c = V::load(gs[a] + p * stride_g + r);
#pragma GCC unroll 4
            for (int b = 0; b < I; ++b) acc[a][b] = fma(c, x[b], acc[a][b]);
          }
        }
#pragma GCC unroll 4
      for (int a = 0; a < J; ++a)
#pragma GCC unroll 4
        for (int b = 0; b < I; ++b) {
          if (j + a >= n || i + b >= k) continue;
          T& to = grad_w[(j + a) * k + i + b];
          const T sum = reduce_add(acc[a][b]);
          to = add ? to + sum : sum;
        }
    }
}

// The same by tiles of the matrix product, with the panels of h transposed into `packed`. A panel has four vectors of
// 8, and panel_weights then adds up lanes for longer than it multiplies: backward of 1024 x 128, 4 layers, takes 1.5
// times as long with it (Zen 3, one thread). Below 32 features tiles are no faster. With vectors of 16: not measured.
#if defined(FASTOPS_VEC_AVX512)
inline bool takes_tiles(int64_t, int64_t) { return false; }
#else
inline bool takes_tiles(int64_t n, int64_t k) { return smaller(n, k) >= 32; }
#endif
template <class T>
void panel_weights_tiled(const T* g, const T* h, int64_t stride_g, int64_t stride_h, int64_t panels, int64_t n,
                         int64_t k, bool add, T* grad_w, T* packed) {
  constexpr int mr = Tile<T>::mr, nr = Tile<T>::nr;
  for (int64_t p = 0; p < panels; ++p) {
    pack<T, T, nr>(plain_source(h + p * stride_h, kMlpPanel, 1), 0, k, 0, kMlpPanel, packed, nr * kMlpPanel, nullptr);
    for (int64_t i = 0; i < k; i += nr)
      for (int64_t j = 0; j < n; j += mr) {
        TileOut<T> out{};
        out.c = grad_w + j * k + i;
        out.c_rs = out.prev_rs = k;
        out.prev = add || p > 0 ? out.c : nullptr;
        micro_tile(kMlpPanel, g + p * stride_g + j * kMlpPanel, kMlpPanel, 1, packed + i * kMlpPanel, nr,
                   static_cast<int>(smaller<int64_t>(mr, n - j)), static_cast<int>(smaller<int64_t>(nr, k - i)), out);
      }
  }
}

template <class T>
void panel_bias(const T* g, int64_t stride, int64_t panels, int64_t n, bool add, T* grad_bias) {
  using V = Vec<T>;
  for (int64_t j = 0; j < n; ++j) {
    V acc = V::zero();
    for (int64_t p = 0; p < panels; ++p)
      for (int r = 0; r < kMlpPanel; r += V::size) acc = acc + V::load(g + j * kMlpPanel + p * stride + r);
    const T sum = reduce_add(acc);
    grad_bias[j] = add ? grad_bias[j] + sum : sum;
  }
}

// The sums of one part. With one part these are the gradients themselves.
template <class T>
struct MlpSums {
  T* grad_w[kMostMlpLayers];
  T* grad_bias[kMostMlpLayers];
};

template <class T>
MlpSums<T> mlp_sums(const Bound<MlpBackward>& args, const MlpBackwardPlan& plan, T* parts, int64_t part) {
  MlpSums<T> sums{};
  T* at = parts + part * plan.part;
  for (int l = 0; l < args.shape.layers; ++l) {
    const int64_t n = args.shape.widths[l + 1], weights = args.shape.widths[l] * n;
    sums.grad_w[l] = static_cast<T*>(args.grad_w[l]);
    sums.grad_bias[l] = static_cast<T*>(args.grad_bias[l]);
    if (plan.parts == 1) continue;
    if (sums.grad_w[l] != nullptr) sums.grad_w[l] = at;
    if (sums.grad_bias[l] != nullptr) sums.grad_bias[l] = at + weights;
    at += weights + n;
  }
  return sums;
}

// One panel: the gradients of pre-activations, from the last layer to the first, and grad_x.
template <class T>
void mlp_backward_panel(const Bound<MlpBackward>& args, const MlpBackwardPlan& plan, int64_t panel, T* scratch) {
  const MlpShape& shape = args.shape;
  const int layers = shape.layers;
  const int64_t first = panel * kMlpPanel, rows = smaller<int64_t>(kMlpPanel, shape.m - first);
  const T* const saved = static_cast<const T*>(args.hidden_outputs) + panel * plan.saved.total;
  if (args.grad_w[0] != nullptr)
    read_panel(static_cast<const T*>(args.x) + first * args.x_row_stride, args.x_row_stride, rows, shape.widths[0],
               scratch + plan.x);
  T* g = scratch + plan.gradient[layers - 1];
  read_panel(static_cast<const T*>(args.grad_y) + first * args.grad_y_row_stride, args.grad_y_row_stride, rows,
             shape.widths[layers], g);
  for (int l = layers - 1;; --l) {
    const int64_t k = shape.widths[l], n = shape.widths[l + 1];
    const Activation& f = l + 1 == layers ? args.output : args.hidden;
    if (has_slope(f)) row_derivative<T>(f.kind)(g, saved + plan.saved.derived[l], g, n * kMlpPanel, f);
    if (l == 0 && args.grad_x == nullptr) return;
    T* const next = scratch + (l == 0 ? plan.next : plan.gradient[l - 1]);
    panel_product<T>(static_cast<const T*>(args.w[l]), 1, k, nullptr, g, k, n, next);
    g = next;
    if (l == 0) break;
  }
  write_panel(g, rows, shape.widths[0], static_cast<T*>(args.grad_x) + first * shape.widths[0]);
}

template <class T>
void mlp_backward(const Bound<MlpBackward>& args, const MlpBackwardPlan& plan, void* workspace, const Team& team) {
  const MlpShape& shape = args.shape;
  T* const parts = static_cast<T*>(workspace);
  T* const scratches = parts + (plan.parts == 1 ? 0 : plan.parts * plan.part);
  parallel(team, plan.threads, [&](Crew& crew) {
    T* const scratch = scratches + crew.thread * (plan.group * plan.panel_scratch + plan.packed);
    crew.each(plan.parts, [&](int64_t part) {
      const MlpSums<T> sums = mlp_sums<T>(args, plan, parts, part);
      const int64_t begin = plan.groups * part / plan.parts, end = plan.groups * (part + 1) / plan.parts;
      for (int64_t group = begin; group < end; ++group) {
        const int64_t first = group * plan.group, panels = smaller(plan.group, plan.panels - first);
        for (int64_t p = 0; p < panels; ++p)
          mlp_backward_panel<T>(args, plan, first + p, scratch + p * plan.panel_scratch);
        for (int l = 0; l < shape.layers; ++l) {
          const T* const g = scratch + plan.gradient[l];
          const T* const h =
              l == 0 ? scratch + plan.x
                     : static_cast<const T*>(args.hidden_outputs) + first * plan.saved.total + plan.saved.output[l - 1];
          const int64_t n = shape.widths[l + 1], k = shape.widths[l];
          const int64_t stride_h = l == 0 ? plan.panel_scratch : plan.saved.total;
          if (sums.grad_w[l] != nullptr && takes_tiles(n, k))
            panel_weights_tiled<T>(g, h, plan.panel_scratch, stride_h, panels, n, k, group > begin, sums.grad_w[l],
                                   scratch + plan.group * plan.panel_scratch);
          else if (sums.grad_w[l] != nullptr)
            panel_weights<T>(g, h, plan.panel_scratch, stride_h, panels, n, k, group > begin, sums.grad_w[l]);
          if (sums.grad_bias[l] != nullptr)
            panel_bias<T>(g, plan.panel_scratch, panels, n, group > begin, sums.grad_bias[l]);
        }
      }
    });
  });
  if (plan.parts == 1) return;
  const auto add_up = [&](void* to, const T* first, int64_t n) {
    using V = Vec<T>;
    for (int64_t i = 0; i < n && to != nullptr; i += V::size) {
      const int count = static_cast<int>(smaller<int64_t>(V::size, n - i));
      V total = V::load(first + i, count);
      for (int64_t part = 1; part < plan.parts; ++part) total = total + V::load(first + part * plan.part + i, count);
      total.store(static_cast<T*>(to) + i, count);
    }
  };
  const MlpSums<T> sums = mlp_sums<T>(args, plan, parts, 0);
  for (int l = 0; l < shape.layers; ++l) {
    add_up(args.grad_w[l], sums.grad_w[l], shape.widths[l] * shape.widths[l + 1]);
    add_up(args.grad_bias[l], sums.grad_bias[l], shape.widths[l + 1]);
  }
}

inline int mlp_threads(const MlpShape& shape, int64_t units, int threads) {
  const int64_t wanted = smaller(units, 2 * shape.m * mlp_products(shape) / kFlopPerThread);
  return static_cast<int>(larger<int64_t>(1, smaller<int64_t>(wanted, threads)));
}

void plan_call(Plan<MlpForward>& plan) {
  const MlpForward& call = plan.call;
  if (call.shape.m == 0 || !mlp_fits_cpu(call.shape)) return;  // wider layers are products of their own
  MlpForwardPlan how{mlp_saved(call.shape, call.hidden, call.output), ceil_div(call.shape.m, kMlpPanel), 0, 1};
  how.scratch = 2 * kMlpPanel * mlp_widest(call.shape);
  how.threads = mlp_threads(call.shape, how.panels, plan.target.threads);
  const auto decided = [&](auto type) {
    using T = decltype(type);
    decide(plan, {"mlp_panels"}, static_cast<size_t>(how.scratch * how.threads) * sizeof(T), how,
           [](auto& args, auto& how, auto* workspace, auto& team) { mlp_forward<T>(args, how, workspace, team); });
  };
  if (call.shape.dtype == DType::f32) return decided(float{});
  if constexpr (!kInference) decided(double{});
}

void plan_call(Plan<MlpBackward>& plan) {
  const MlpBackward& call = plan.call;
  const MlpShape& shape = call.shape;
  if (shape.m == 0 || !mlp_fits_cpu(shape)) return;
  constexpr int64_t kGroupBytes = 128 << 10;  // a quarter of a small L2 cache
  constexpr int64_t kMostParts = 16;
  MlpBackwardPlan how{};
  how.saved = mlp_saved(shape, call.hidden, call.output);
  how.panels = ceil_div(shape.m, kMlpPanel);
  const auto take = [](int64_t& total, int64_t elements) {
    const int64_t at = total;
    total += elements;
    return at;
  };
  how.x = take(how.panel_scratch, shape.widths[0] * kMlpPanel);
  how.next = take(how.panel_scratch, shape.widths[0] * kMlpPanel);
  for (int l = 0; l < shape.layers; ++l) {
    how.gradient[l] = take(how.panel_scratch, shape.widths[l + 1] * kMlpPanel);
    take(how.part, (shape.widths[l] + 1) * shape.widths[l + 1]);
  }
  const auto decided = [&](auto type) {
    using T = decltype(type);
    const int64_t bytes = static_cast<int64_t>(sizeof(T));
    how.group = larger<int64_t>(1, smaller<int64_t>(how.panels, kGroupBytes / (how.panel_scratch * bytes)));
    how.groups = ceil_div(how.panels, how.group);
    how.parts = smaller(how.groups, kMostParts);
    how.threads = mlp_threads(shape, how.parts, plan.target.threads);
    how.packed = round_up(mlp_widest(shape), Tile<T>::nr) * kMlpPanel;
    const int64_t sums = how.parts == 1 ? 0 : how.parts * how.part;
    decide(plan, {"mlp_panels"},
           static_cast<size_t>((sums + how.threads * (how.group * how.panel_scratch + how.packed)) * bytes), how,
           [](auto& args, auto& how, auto* workspace, auto& team) { mlp_backward<T>(args, how, workspace, team); });
  };
  shape.dtype == DType::f32 ? decided(float{}) : decided(double{});
}
