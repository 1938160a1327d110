// Linear layers with sparse weights. The contract is csrc/kernels/sparse_linear/sparse_linear.h.
//
// x is packed into panels, whose lanes are its rows (gemm/cpu/pack.inl), some panels at a time. Forward, a unit of work
// is a panel and some rows of blocks; their sums are a tile, which is finished and transposed into y. The gradient of x
// is scattered into a panel of its own, so a unit is a panel. That of the values is a product of panels for each of
// them; a unit is some rows of blocks. In each, what is added to an element, and in which order, follows from the
// weight alone. One row needs no panel.
#pragma once

#include "../../activation/cpu/rows.inl"
#include "../../common/cpu/common.inl"
#include "../../gemm/cpu/pack.inl"
#include "sparse_kernels.inl"

constexpr int64_t kOutputs = 32;            // of a tile
constexpr int64_t kPackedAtOnce = 512;      // columns of a panel; a multiple of every vector's size
constexpr int64_t kPanelBytes = 768 << 10;  // of a panel of two vectors, which stays in L2
constexpr int64_t kSlabBytes = 8 << 20;     // of the panels at a time

struct SparsePlan {
  SparseKernels kernels;
  int threads;
  int64_t per_image, panels;  // of an image, and of all
  int64_t slab;               // panels at a time; of grad_x the panels of a unit, 1
  int64_t x_panel, y_panel;   // floats
};

// A matrix of each image, and how its rows become the lanes of panels.
template <class T>
struct Images {
  const T* p;
  Strides strides;
  int64_t image_stride, rows, columns;

  // Columns [k0, k1) of panel q; those behind the matrix are zero.
  template <int W>
  void pack_panel(const SparsePlan& plan, int64_t q, int64_t k0, int64_t k1, float* panel) const {
    const int64_t row = q % plan.per_image * W, end = smaller(k1, columns);
    const T* const image = p + q / plan.per_image * image_stride;
    if (k0 < end)
      pack<float, T, W>(plain_source(image, strides.row, strides.col), row, smaller<int64_t>(W, rows - row), k0,
                        end - k0, panel + k0 * W, 0, nullptr);
    for (int64_t at = larger(k0, end) * W; at < k1 * W; ++at) panel[at] = 0;
  }
};

// y[lane, j0 + j] = tile[j, lane] for `rows` lanes and `columns` columns; p is y[0, j0].
template <int W, class T>
void store_tile(const float* tile, int columns, T* p, Strides strides, int rows) {
  using V = Vec<float>;
  if constexpr (W == 1)
    if (strides.col == 1) return store_row<T>(tile, p, columns);
  if (strides.col != 1) {
    for (int j = 0; j < columns; ++j) store_row<T>(tile + j * W, p + j * strides.col, rows);
    return;
  }
  constexpr int kLanes = W < V::size ? W : V::size;
  for (int l = 0; l < rows; l += kLanes)
    for (int j = 0; j < columns; j += V::size) {
      const int count = smaller(columns - j, V::size);
      V r[V::size];
#pragma GCC unroll 16
      for (int i = 0; i < V::size; ++i) r[i] = i < count ? V::load(tile + (j + i) * W + l, kLanes) : V::zero();
      transpose(r);
#pragma GCC unroll 16
      for (int i = 0; i < V::size; ++i)
        if (i < kLanes && l + i < rows) r[i].store(p + (l + i) * strides.row + j, count);
    }
}

// Packs panels [first, first + count) of a matrix, all of their `columns` columns.
template <int W, class T>
bool pack_panels(const SparsePlan& plan, const Images<T>& from, int64_t first, int64_t count, int64_t columns,
                 float* to, Crew& crew) {
  const int64_t parts = larger<int64_t>(ceil_div(columns, kPackedAtOnce), 1);
  return crew.share(count * parts, [&](int64_t unit) {
    const int64_t q = unit / parts, k0 = unit % parts * kPackedAtOnce;
    from.template pack_panel<W>(plan, first + q, k0, smaller(k0 + kPackedAtOnce, columns), to + q * columns * W);
  });
}

template <class Args>
int64_t padded_k(const Args& args) {
  return round_up(args.weight.k, args.weight.block_cols);
}
template <class Args>
int64_t padded_n(const Args& args) {
  return round_up(args.weight.n, args.weight.block_rows);
}

template <int W, class T>
void sparse_forward(const Bound<SparseLinearForward>& args, const SparsePlan& plan, float* x_panels, Crew& crew) {
  using V = Vec<float>;
  const SparseWeight& weight = args.weight;
  const Images<T> x{static_cast<const T*>(args.x), args.x_strides, args.x_image_stride, args.m, weight.k};
  const ActivationKind kind = args.activation.kind;
  const auto f = kind != ActivationKind::identity ? row_forward<float>(kind) : nullptr;
  const int64_t chunk = kOutputs / weight.block_rows, rows_of_blocks = ceil_div(weight.n, weight.block_rows);
  const int64_t chunks = ceil_div(rows_of_blocks, chunk), columns = plan.x_panel / W;
  for (int64_t q0 = 0; q0 < plan.panels; q0 += plan.slab) {
    const int64_t count = smaller(plan.slab, plan.panels - q0);
    if (!pack_panels<W>(plan, x, q0, count, columns, x_panels, crew)) return;
    const bool stays = crew.share(count * chunks, [&](int64_t unit) {
      const int64_t q = unit / chunks, i0 = unit % chunks * chunk, i1 = smaller(i0 + chunk, rows_of_blocks);
      const int64_t n0 = i0 * weight.block_rows, n1 = smaller(i1 * weight.block_rows, weight.n);
      alignas(64) float tile[kOutputs * W];
      plan.kernels.multiply(weight, args.sparse, x_panels + q * plan.x_panel, i0, i1, tile);
      const int outputs = static_cast<int>(n1 - n0);
      for (int j = 0; j < outputs; ++j) {
        float* const row = tile + j * W;
        if (args.bias != nullptr) {
          const V bias = V::set1(load_one(static_cast<const T*>(args.bias) + n0 + j));
          constexpr int kLanes = W < V::size ? W : V::size;
          for (int v = 0; v < W; v += kLanes) (V::load(row + v, kLanes) + bias).store(row + v, kLanes);
        }
        if (f != nullptr) f(row, row, W, args.activation);
      }
      const int64_t image = (q0 + q) / plan.per_image, m0 = (q0 + q) % plan.per_image * W;
      T* const y = static_cast<T*>(args.y) + image * args.y_image_stride + m0 * args.y_strides.row;
      store_tile<W>(tile, outputs, y + n0 * args.y_strides.col, args.y_strides,
                    static_cast<int>(smaller<int64_t>(W, args.m - m0)));
    });
    if (!stays) return;
  }
}

template <class T>
void sparse_one_row(const Bound<SparseLinearForward>& args, const SparsePlan& plan, float* x, Crew& crew) {
  const SparseWeight& weight = args.weight;
  const int64_t columns = padded_k(args), rows_of_blocks = ceil_div(weight.n, weight.block_rows);
  const bool packed = crew.share(1, [&](int64_t) {
    const T* const from = static_cast<const T*>(args.x);
    if (args.x_strides.col == 1)
      widen_row(from, x, static_cast<int>(weight.k));
    else
      for (int64_t k = 0; k < weight.k; ++k) x[k] = load_one(from + k * args.x_strides.col);
    for (int64_t k = weight.k; k < columns; ++k) x[k] = 0;
  });
  if (!packed) return;
  const ActivationKind kind = args.activation.kind;
  const auto f = kind != ActivationKind::identity ? row_forward<float>(kind) : nullptr;
  const int64_t chunk = kOutputs / weight.block_rows;
  crew.share(ceil_div(rows_of_blocks, chunk), [&](int64_t unit) {
    const int64_t i0 = unit * chunk, i1 = smaller(i0 + chunk, rows_of_blocks), n0 = i0 * weight.block_rows;
    const int count = static_cast<int>(smaller(i1 * weight.block_rows, weight.n) - n0);
    alignas(64) float outputs[kOutputs], bias[kOutputs];
    plan.kernels.multiply(weight, args.sparse, x, i0, i1, outputs);
    if (args.bias != nullptr) {
      widen_row(static_cast<const T*>(args.bias) + n0, bias, count);
      for (int j = 0; j < count; ++j) outputs[j] += bias[j];
    }
    if (f != nullptr) f(outputs, outputs, count, args.activation);
    store_tile<1>(outputs, count, static_cast<T*>(args.y) + n0 * args.y_strides.col, args.y_strides, 1);
  });
}

// Each member has a panel of grad_y and one of grad_x.
template <int W, class T>
void sparse_grad_x(const Bound<SparseLinearBackward>& args, const SparsePlan& plan, float* workspace, Crew& crew) {
  const SparseWeight& weight = args.weight;
  const Images<T> g{static_cast<const T*>(args.grad_y), args.grad_y_strides, args.grad_y_image_stride, args.m,
                    weight.n};
  float* const g_panel = workspace + crew.thread * (plan.x_panel + plan.y_panel);
  float* const x_panel = g_panel + plan.y_panel;
  crew.share(plan.panels, [&](int64_t q) {
    g.template pack_panel<W>(plan, q, 0, padded_n(args), g_panel);
    for (int64_t i = 0; i < plan.x_panel; ++i) x_panel[i] = 0;
    plan.kernels.scatter(weight, args.sparse, g_panel, x_panel);
    const int64_t image = q / plan.per_image, m0 = q % plan.per_image * W;
    T* const to = static_cast<T*>(args.grad_x) + image * args.grad_x_image_stride + m0 * args.grad_x_strides.row;
    for (int64_t k = 0; k < weight.k; k += kOutputs)
      store_tile<W>(x_panel + k * W, static_cast<int>(smaller(kOutputs, weight.k - k)),
                    to + k * args.grad_x_strides.col, args.grad_x_strides,
                    static_cast<int>(smaller<int64_t>(W, args.m - m0)));
  });
}

template <int W, class T>
void sparse_grad_values(const Bound<SparseLinearBackward>& args, const SparsePlan& plan, float* workspace, Crew& crew) {
  const SparseWeight& weight = args.weight;
  const Images<T> g{static_cast<const T*>(args.grad_y), args.grad_y_strides, args.grad_y_image_stride, args.m,
                    weight.n};
  const Images<T> x{static_cast<const T*>(args.x), args.x_strides, args.x_image_stride, args.m, weight.k};
  float *const g_panels = workspace, *const x_panels = workspace + plan.slab * plan.y_panel;
  const int64_t chunk = kOutputs / weight.block_rows, rows_of_blocks = ceil_div(weight.n, weight.block_rows);
  for (int64_t q0 = 0; q0 < plan.panels; q0 += plan.slab) {
    const int64_t count = smaller(plan.slab, plan.panels - q0);
    if (!pack_panels<W>(plan, g, q0, count, plan.y_panel / W, g_panels, crew)) return;
    if (!pack_panels<W>(plan, x, q0, count, plan.x_panel / W, x_panels, crew)) return;
    const bool stays = crew.share(ceil_div(rows_of_blocks, chunk), [&](int64_t unit) {
      const int64_t i0 = unit * chunk, i1 = smaller(i0 + chunk, rows_of_blocks);
      for (int64_t q = 0; q < count; ++q)
        plan.kernels.products(weight, args.sparse, g_panels + q * plan.y_panel, x_panels + q * plan.x_panel, i0, i1,
                              q0 + q == 0, args.grad_values);
    });
    if (!stays) return;
  }
}

template <class Call>
SparsePlan plan_sparse(const Plan<Call>& plan, int lanes) {
  const Call& call = plan.call;
  const SparseWeight& weight = call.weight;
  SparsePlan how{};
  how.kernels = find_sparse_kernels(weight, lanes);
  how.per_image = ceil_div(call.m, lanes);
  how.panels = call.images * how.per_image;
  how.x_panel = padded_k(call) * lanes;
  how.y_panel = padded_n(call) * lanes;
  // In multiply-adds of whole vectors; of one row, single weights take as long as half of one, and others less.
  const int size = weight.block_rows * weight.block_cols;
  const int64_t cost = lanes > 1 ? larger<int64_t>(lanes, Vec<float>::size) : size == 1 ? 8 : 2;
  const double work = 2.0 * static_cast<double>(how.panels * cost) * static_cast<double>(weight.blocks * size);
  how.threads = static_cast<int>(smaller(static_cast<double>(plan.target.threads), larger(1.0, work / kFlopPerThread)));
  const int64_t bytes = (how.x_panel + how.y_panel) * static_cast<int64_t>(sizeof(float));
  how.slab = smaller(how.panels, larger<int64_t>(kSlabBytes / larger<int64_t>(bytes, 1), 1));
  return how;
}

// Of panels whose rows are `columns`: two vectors, or one.
inline int panel_lanes(int64_t m, int64_t columns) {
  constexpr int kSize = Vec<float>::size;
  const bool wide = m > kSize && columns * 2 * kSize * static_cast<int64_t>(sizeof(float)) <= kPanelBytes;
  return wide ? 2 * kSize : kSize;
}

// body<W>() for the width of the plan's panels.
template <class Body>
void with_lanes(const SparsePlan& plan, Body&& body) {
  constexpr int kSize = Vec<float>::size;
  if (plan.kernels.lanes == 2 * kSize)
    body.template operator()<2 * kSize>();
  else if (plan.kernels.lanes == kSize)
    body.template operator()<kSize>();
  else
    body.template operator()<EightLanes::size>();
}

template <class T>
void plan_sparse_forward(Plan<SparseLinearForward>& plan) {
  const SparseLinearForward& call = plan.call;
  const bool one = call.images * call.m == 1, few = call.m <= EightLanes::size;
  const SparsePlan how = plan_sparse(plan, one ? 1 : few ? EightLanes::size : panel_lanes(call.m, padded_k(call)));
  decide(plan, how.kernels.name, aligned(how.slab * how.x_panel * static_cast<int64_t>(sizeof(float))), how,
         [](auto& args, auto& how, auto* workspace, auto& team) {
           float* const panels = static_cast<float*>(workspace);
           if (how.kernels.lanes == 1)
             return parallel(team, how.threads, [&](Crew& crew) { sparse_one_row<T>(args, how, panels, crew); });
           with_lanes(how, [&]<int W>() {
             parallel(team, how.threads, [&](Crew& crew) { sparse_forward<W, T>(args, how, panels, crew); });
           });
         });
}

template <class T>
void plan_sparse_backward(Plan<SparseLinearBackward>& plan) {
  const SparsePlan how = plan_sparse(plan, panel_lanes(plan.call.m, larger(padded_k(plan.call), padded_n(plan.call))));
  const int64_t panels = larger<int64_t>(how.slab, plan.call.with_grad_x ? how.threads : 1);
  decide(plan, how.kernels.name, aligned(panels * (how.x_panel + how.y_panel) * static_cast<int64_t>(sizeof(float))),
         how, [](auto& args, auto& how, auto* workspace, auto& team) {
           float* const panels = static_cast<float*>(workspace);
           with_lanes(how, [&]<int W>() {
             if (args.grad_x != nullptr)
               parallel(team, how.threads, [&](Crew& crew) { sparse_grad_x<W, T>(args, how, panels, crew); });
             if (args.grad_values != nullptr)
               parallel(team, how.threads, [&](Crew& crew) { sparse_grad_values<W, T>(args, how, panels, crew); });
           });
         });
}

void plan_call(Plan<SparseLinearForward>& plan) {
  if (plan.call.images * plan.call.m == 0 || plan.call.weight.n == 0) return decide_nothing(plan);
  with_dtype(plan.call.dtype, [&]<class T>(T) {
    if constexpr (!same_type<T, double>) plan_sparse_forward<T>(plan);
  });
}

void plan_call(Plan<SparseLinearBackward>& plan) {
  if (plan.call.images * plan.call.m == 0) return decide_nothing(plan);
  with_dtype(plan.call.dtype, [&]<class T>(T) {
    if constexpr (!same_type<T, double>) plan_sparse_backward<T>(plan);
  });
}
