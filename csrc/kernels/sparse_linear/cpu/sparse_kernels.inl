// What is done with the blocks of a sparse weight and one panel of rows of x, of which W = V vectors X are the lanes:
//   panel[p * W + lane] = x[lane, p]
// A weight is spread to all lanes of a vector; an index says which row of the panel it meets. So there is no gather,
// and zeros cost nothing. Rows of a block share the loads of x: blocks of 4 x 4 run at the rate of a dense product,
// single weights at 0.35 to 0.4 of it, as each of them loads W lanes from L2 (Zen 5).
#pragma once

#include "../../common/cpu/common.inl"

template <int rows, int cols>
struct Block {
  static constexpr int kRows = rows, kCols = cols, kSize = rows * cols;
};

// Rows of a block are taken as many at a time as their sums fit the registers. A row alone has several sums, of which
// each takes the next weight in turn: a multiply-add takes 4 cycles.
#if defined(FASTOPS_32_REGISTERS)
constexpr int kRowsTogether = 8, kBlockSums = 16;
#else
constexpr int kRowsTogether = 4, kBlockSums = 8;
#endif
constexpr int kRowSums = 8;

template <class B, int V, class X = Vec<float>>
struct Tiling {
  static constexpr int kLanes = V * X::size;
  static constexpr int kRows = B::kRows < kRowsTogether ? B::kRows : kRowsTogether;
  static constexpr int kWanted = (kRows == 1 ? kRowSums : kBlockSums) / (kRows * V);
  static constexpr int kSums = kWanted > 1 ? kWanted : 1;
  static constexpr int kBlocks = kSums > B::kCols ? kSums / B::kCols : 1;  // in a row, each with sums of its own
};

#if defined(FASTOPS_VEC_AVX512)
// The lanes of few rows: panels of half the width stay in L1.
struct EightLanes {
  static constexpr int size = 8;
  __m256 v;
  static EightLanes set1(float x) { return {_mm256_set1_ps(x)}; }
  static EightLanes zero() { return {_mm256_setzero_ps()}; }
  static EightLanes load(const float* p) { return {_mm256_loadu_ps(p)}; }
  void store(float* p) const { _mm256_storeu_ps(p, v); }
};
inline EightLanes operator+(EightLanes a, EightLanes b) { return {_mm256_add_ps(a.v, b.v)}; }
inline EightLanes fma(EightLanes a, EightLanes b, EightLanes c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
#else
using EightLanes = Vec<float>;
#endif

// Of one row of blocks: those of them that there are.
struct BlockRange {
  int64_t begin, end;
};
inline BlockRange blocks_of(const SparseWeight& weight, const int32_t* crow, int64_t i) {
  const auto within = [&](int64_t b) { return b < 0 ? 0 : smaller(b, weight.blocks); };
  return {within(crow[i]), within(crow[i + 1])};
}

// The rows of a panel that block b meets begin at this one.
template <class Index, class B>
struct PanelRows {
  const Index* col;
  uint32_t last;
  PanelRows(const SparseWeight& weight, const void* col)
      : col(static_cast<const Index*>(col)),
        last(static_cast<uint32_t>(larger<int64_t>(ceil_div(weight.k, B::kCols), 1) - 1)) {}
  int64_t operator[](int64_t b) const {
    const uint32_t at = static_cast<uint32_t>(static_cast<int32_t>(col[b]));
    return int64_t{at < last ? at : last} * B::kCols;
  }
};

// tile[(i - i0) * B::kRows + r, lane] = the sums of rows [i0, i1) of blocks.
template <class Index, class B, class X, int V>
void multiply_rows(const SparseWeight& weight, const SparsePointers& p, const float* x, int64_t i0, int64_t i1,
                   float* tile) {
  using Tile = Tiling<B, V, X>;
  constexpr int W = Tile::kLanes, S = Tile::kSums;
  const PanelRows<Index, B> row_of(weight, p.col);
  for (int64_t i = i0; i < i1; ++i) {
    const auto [begin, end] = blocks_of(weight, p.crow, i);
    for (int r0 = 0; r0 < B::kRows; r0 += Tile::kRows) {
      X sums[S][Tile::kRows][V];
#pragma GCC unroll 8
      for (int s = 0; s < S; ++s)
#pragma GCC unroll 8
        for (int r = 0; r < Tile::kRows; ++r)
#pragma GCC unroll 2
          for (int v = 0; v < V; ++v) sums[s][r][v] = X::zero();
      const auto add = [&](int64_t b, int first) __attribute__((always_inline)) {
        const float* const rows = x + row_of[b] * W;
        const float* const values = p.values + b * B::kSize + r0 * B::kCols;
#pragma GCC unroll 4
        for (int c = 0; c < B::kCols; ++c) {
          X lanes[V];
#pragma GCC unroll 2
          for (int v = 0; v < V; ++v) lanes[v] = X::load(rows + c * W + v * X::size);
#pragma GCC unroll 8
          for (int r = 0; r < Tile::kRows; ++r) {
            const X value = X::set1(values[r * B::kCols + c]);
#pragma GCC unroll 2
            for (int v = 0; v < V; ++v) {
              X& sum = sums[(first + c) % S][r][v];
              sum = fma(lanes[v], value, sum);
            }
          }
        }
      };
      int64_t b = begin;
      for (; b + Tile::kBlocks <= end; b += Tile::kBlocks)
#pragma GCC unroll 8
        for (int u = 0; u < Tile::kBlocks; ++u) add(b + u, u * B::kCols);
      if constexpr (Tile::kBlocks > 1)
        for (; b < end; ++b) add(b, 0);
      float* const to = tile + ((i - i0) * B::kRows + r0) * W;
#pragma GCC unroll 8
      for (int r = 0; r < Tile::kRows; ++r)
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) {
          X sum = sums[0][r][v];
#pragma GCC unroll 8
          for (int s = 1; s < S; ++s) sum = sum + sums[s][r][v];
          sum.store(to + r * W + v * X::size);
        }
    }
  }
}

// The same for one row, x itself, whose columns are the lanes where blocks have several: outputs in the place of a
// tile. A weight is then loaded once for as many products.
typedef float Four __attribute__((vector_size(16)));
inline Four load_four(const float* p) {
  Four value;
  __builtin_memcpy(&value, p, sizeof value);
  return value;
}

template <class Index, class B>
void multiply_one_row(const SparseWeight& weight, const SparsePointers& p, const float* x, int64_t i0, int64_t i1,
                      float* outputs) {
  using V = Vec<float>;
  constexpr int kLoops = B::kRows == 4 ? 1 : 8 / B::kCols;  // blocks in a row, each with sums of its own
  const PanelRows<Index, B> row_of(weight, p.col);
  for (int64_t i = i0; i < i1; ++i, outputs += B::kRows) {
    const auto [begin, end] = blocks_of(weight, p.crow, i);
    int64_t b = begin;
    if constexpr (B::kRows == 16) {
      constexpr int kVectors = 16 / V::size, kSets = 4 / kVectors > 1 ? 4 / kVectors : 1;
      V sums[kSets][kVectors];
      for (int s = 0; s < kSets; ++s)
        for (int v = 0; v < kVectors; ++v) sums[s][v] = V::zero();
      const auto add = [&](int64_t b, int s) __attribute__((always_inline)) {
        const V value = V::set1(x[row_of[b]]);
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v)
          sums[s][v] = fma(V::load(p.values + b * 16 + v * V::size), value, sums[s][v]);
      };
      for (; b + kSets <= end; b += kSets)
#pragma GCC unroll 4
        for (int s = 0; s < kSets; ++s) add(b + s, s);
      for (; b < end; ++b) add(b, 0);
      for (int v = 0; v < kVectors; ++v) {
        for (int s = 1; s < kSets; ++s) sums[0][v] = sums[0][v] + sums[s][v];
        sums[0][v].store(outputs + v * V::size);
      }
    } else if constexpr (B::kCols == 4) {
      Four sums[kLoops][B::kRows] = {};
      const auto add = [&](int64_t b, int s) __attribute__((always_inline)) {
        const Four lanes = load_four(x + row_of[b]);
#pragma GCC unroll 4
        for (int r = 0; r < B::kRows; ++r) sums[s][r] += lanes * load_four(p.values + b * B::kSize + r * 4);
      };
      for (; b + kLoops <= end; b += kLoops)
#pragma GCC unroll 4
        for (int s = 0; s < kLoops; ++s) add(b + s, s);
      for (; b < end; ++b) add(b, 0);
      for (int r = 0; r < B::kRows; ++r) {
        for (int s = 1; s < kLoops; ++s) sums[0][r] += sums[s][r];
        outputs[r] = (sums[0][r][0] + sums[0][r][2]) + (sums[0][r][1] + sums[0][r][3]);
      }
    } else {
      float sums[kLoops] = {};
      for (; b + kLoops <= end; b += kLoops)
#pragma GCC unroll 8
        for (int s = 0; s < kLoops; ++s) sums[s] += x[row_of[b + s]] * p.values[b + s];
      for (; b < end; ++b) sums[0] += x[row_of[b]] * p.values[b];
      outputs[0] = ((sums[0] + sums[4]) + (sums[1] + sums[5])) + ((sums[2] + sums[6]) + (sums[3] + sums[7]));
    }
  }
}

// grad_x[p, lane] += what all rows of blocks give, of panels of grad_y.
template <class Index, class B, int V>
void scatter_rows(const SparseWeight& weight, const SparsePointers& p, const float* grad_y, float* grad_x) {
  using X = Vec<float>;
  using Tile = Tiling<B, V>;
  constexpr int W = Tile::kLanes;
  const PanelRows<Index, B> row_of(weight, p.col);
  const int64_t count = ceil_div(weight.n, B::kRows);
  for (int64_t i = 0; i < count; ++i) {
    const auto [begin, end] = blocks_of(weight, p.crow, i);
    for (int r0 = 0; r0 < B::kRows; r0 += Tile::kRows) {
      X gradient[Tile::kRows][V];
#pragma GCC unroll 8
      for (int r = 0; r < Tile::kRows; ++r)
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) gradient[r][v] = X::load(grad_y + (i * B::kRows + r0 + r) * W + v * X::size);
      for (int64_t b = begin; b < end; ++b) {
        float* const rows = grad_x + row_of[b] * W;
        const float* const values = p.values + b * B::kSize + r0 * B::kCols;
#pragma GCC unroll 4
        for (int c = 0; c < B::kCols; ++c) {
          X sums[V];
#pragma GCC unroll 2
          for (int v = 0; v < V; ++v) sums[v] = X::load(rows + c * W + v * X::size);
#pragma GCC unroll 8
          for (int r = 0; r < Tile::kRows; ++r) {
            const X value = X::set1(values[r * B::kCols + c]);
#pragma GCC unroll 2
            for (int v = 0; v < V; ++v) sums[v] = fma(gradient[r][v], value, sums[v]);
          }
#pragma GCC unroll 2
          for (int v = 0; v < V; ++v) sums[v].store(rows + c * W + v * X::size);
        }
      }
    }
  }
}

// grad_values of rows [i0, i1) of blocks: the products of two panels, summed over lanes, added to what is there unless
// they are the first.
template <class Index, class B, int V>
void multiply_lanes(const SparseWeight& weight, const SparsePointers& p, const float* grad_y, const float* x,
                    int64_t i0, int64_t i1, bool first, float* grad_values) {
  using X = Vec<float>;
  using Tile = Tiling<B, V>;
  constexpr int W = Tile::kLanes;
  const PanelRows<Index, B> row_of(weight, p.col);
  for (int64_t i = i0; i < i1; ++i) {
    const auto [begin, end] = blocks_of(weight, p.crow, i);
    for (int r0 = 0; r0 < B::kRows; r0 += Tile::kRows) {
      X gradient[Tile::kRows][V];
#pragma GCC unroll 8
      for (int r = 0; r < Tile::kRows; ++r)
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) gradient[r][v] = X::load(grad_y + (i * B::kRows + r0 + r) * W + v * X::size);
      for (int64_t b = begin; b < end; ++b) {
        const float* const rows = x + row_of[b] * W;
        float* const to = grad_values + b * B::kSize + r0 * B::kCols;
#pragma GCC unroll 4
        for (int c = 0; c < B::kCols; ++c) {
          X lanes[V];
#pragma GCC unroll 2
          for (int v = 0; v < V; ++v) lanes[v] = X::load(rows + c * W + v * X::size);
#pragma GCC unroll 8
          for (int r = 0; r < Tile::kRows; ++r) {
            X sum = gradient[r][0] * lanes[0];
#pragma GCC unroll 2
            for (int v = 1; v < V; ++v) sum = fma(gradient[r][v], lanes[v], sum);
            float& value = to[r * B::kCols + c];
            value = first ? reduce_add(sum) : value + reduce_add(sum);
          }
        }
      }
    }
  }
}

// The kernels for a layout of blocks and a width of panels; scatter and products are there for whole vectors alone.
struct SparseKernels {
  KernelName name;
  int lanes;
  void (*multiply)(const SparseWeight&, const SparsePointers&, const float* x, int64_t i0, int64_t i1, float* tile);
  void (*scatter)(const SparseWeight&, const SparsePointers&, const float* grad_y, float* grad_x);
  void (*products)(const SparseWeight&, const SparsePointers&, const float* grad_y, const float* x, int64_t i0,
                   int64_t i1, bool first, float* grad_values);
};

// lanes: 1, 8, or one vector or two.
template <class Index, class B>
SparseKernels sparse_kernels(const char* algorithm, int lanes) {
  constexpr int kSize = Vec<float>::size;
  const KernelName name{algorithm, {Tiling<B, 1>::kRows, lanes}};
  if (lanes == 1) return {name, 1, multiply_one_row<Index, B>, nullptr, nullptr};
  if (lanes == 2 * kSize)
    return {name, lanes, multiply_rows<Index, B, Vec<float>, 2>, scatter_rows<Index, B, 2>,
            multiply_lanes<Index, B, 2>};
  if (lanes == kSize)
    return {name, lanes, multiply_rows<Index, B, Vec<float>, 1>, scatter_rows<Index, B, 1>,
            multiply_lanes<Index, B, 1>};
  return {name, lanes, multiply_rows<Index, B, EightLanes, 1>, nullptr, nullptr};
}

inline SparseKernels find_sparse_kernels(const SparseWeight& weight, int lanes) {
  const auto of = [&]<class B>(B, const char* algorithm) {
    return weight.index_bytes == 2 ? sparse_kernels<int16_t, B>(algorithm, lanes)
                                   : sparse_kernels<int32_t, B>(algorithm, lanes);
  };
  if (weight.block_rows == 16) return of(Block<16, 1>{}, "sparse_16x1");
  if (weight.block_rows == 4) return of(Block<4, 4>{}, "sparse_4x4");
  if (weight.block_cols == 4) return of(Block<1, 4>{}, "sparse_1x4");
  return of(Block<1, 1>{}, "sparse");
}
