// The matrix product of all layers: C[m, n] = sum over k of A[m, k] B[n, k]. A block computes one tile of C.
//
// A Layout is the layout of an operand's tile in shared memory. A Loader copies the tile there. A Multiplier multiplies
// two tiles and keeps the sum in registers. multiply_tiles is the loop around them: while one tile is multiplied, the
// next kStages - 1 are being loaded. An operand that is not a matrix, like the patches of a convolution, only needs its
// own Loader.
#pragma once

#include "../../common/cuda/formulas.cuh"

namespace fastops::cuda {
namespace {

// ---- tiles in shared memory

// A tile of extent (along m or n) x depth (along k) elements. Rows run along k if kKMajor, else along m or n. Rows are
// padded, so that one access of a warp touches different banks. 16 bytes suffice for vectors.
template <class Element, int kExtent_, int kDepth_, bool kKMajor_, int kPad = kVector<Element>>
struct Layout {
  using S = Element;
  static constexpr int kExtent = kExtent_, kDepth = kDepth_;
  static constexpr bool kKMajor = kKMajor_;
  static constexpr int kRows = kKMajor ? kExtent : kDepth, kCols = kKMajor ? kDepth : kExtent;
  static constexpr int kRow = kCols + kPad;  // elements from row to row
  static constexpr int kSize = kRows * kRow;
  static __device__ int offset(int mn, int k) { return kKMajor ? mn * kRow + k : k * kRow + mn; }
};

// ---- loaders

// An operand in global memory: element (mn, k) is at data + mn mn_stride + k k_stride. Strides may be any number.
template <class S>
struct Operand {
  const S* data;
  int64_t mn_stride, k_stride;
};

// f' of a fused activation, computed from y. An operand that is an incoming gradient is multiplied by it.
template <class S>
struct Derivative {
  ActivationKind kind = ActivationKind::identity;
  Parameters<S> parameters{};
  Operand<S> y{};
};

// Whether f' is computed from y in a few instructions. The other kinds need an exponential of x, which every tile that
// reads the element would compute again. Their gradient is computed once, by a separate kernel.
inline bool can_fold(const Activation& activation) { return saved_by_linear(activation) == Saved::output; }

template <class Body>
__device__ inline void with_folded(ActivationKind kind, Body body) {
  switch (kind) {
    case ActivationKind::relu:
      return body(Piecewise<Relu>{});
    case ActivationKind::leaky_relu:
      return body(Piecewise<LeakyRelu>{});
    case ActivationKind::hardshrink:
      return body(Piecewise<Hardshrink>{});
    case ActivationKind::softshrink:
      return body(PiecewiseFromOutput<Softshrink>{});
    case ActivationKind::sigmoid:
      return body(FromOutput<Sigmoid>{});
    case ActivationKind::tanh:
      return body(FromOutput<Tanh>{});
    default:
      return body(Piecewise<Hardtanh>{});
  }
}

// How elements are copied from global to shared memory: asynchronously by vectors of 16 bytes, asynchronously by
// elements of at least 4 bytes, or through registers.
enum class Path : int { vectors, elements, registers };

// The paths that a kernel is compiled for. async: only asynchronous copies. any: also through registers. folded: like
// any, and elements that go through registers are multiplied by a Derivative.
enum class Loads : int { async, any, folded };

// An operand, and how this launch loads it.
template <class S>
struct Load {
  Operand<S> operand;
  Path path;
  bool rows_fastest;  // threads of a warp step from row to row of the tile, as memory is contiguous in that direction
};

// Loads the tiles of one operand to shared memory, from k_begin on. fetch(stage) starts to load the next tile;
// place(stage) stores the elements that went through registers. Elements outside the operand are zero and are not read.
//
// A thread loads either the same columns of several rows, or the same row of several columns, so it only keeps a
// pointer and a step.
template <class TileLayout, int threads, Loads loads>
struct Loader {
  using S = typename TileLayout::S;
  static constexpr int kRows = TileLayout::kRows, kCols = TileLayout::kCols;
  static constexpr int kWidth = kVector<S>;
  static constexpr int kElements = kRows * kCols / threads, kVectors = kElements / kWidth;
  static constexpr bool kRegisters = loads != Loads::async;
  static constexpr int kHeld = kRegisters ? kVectors : 1, kHeldSaved = loads == Loads::folded ? kVectors : 1;
  static_assert(kVectors * kWidth * threads == kRows * kCols && threads % kRows == 0);
  static_assert(threads % (kCols / kWidth) == 0 && (sizeof(S) < 4 || threads % kCols == 0));

  const Load<S>& load;
  const Derivative<S>* derivative;
  int row, col, row_step, col_step;  // of this thread's elements or vectors in the tile
  int mn_left;                       // the rows or columns of C that exist from the start of the tile on
  int64_t k_left;
  const S *next, *next_saved;
  alignas(16) S held[kHeld][kWidth];
  alignas(16) S held_saved[kHeldSaved][kWidth];

  static __device__ int64_t row_stride(const Operand<S>& o) { return TileLayout::kKMajor ? o.mn_stride : o.k_stride; }
  static __device__ int64_t col_stride(const Operand<S>& o) { return TileLayout::kKMajor ? o.k_stride : o.mn_stride; }

  __device__ Loader(const Load<S>& load, const Derivative<S>* derivative, int64_t mn_begin, int64_t mn_end,
                    int64_t k_begin, int64_t k_end)
      : load(load),
        derivative(derivative),
        mn_left(static_cast<int>(mn_end - mn_begin < TileLayout::kExtent ? mn_end - mn_begin : TileLayout::kExtent)),
        k_left(k_end - k_begin) {
    const int thread = static_cast<int>(threadIdx.x), width = load.path == Path::elements ? 1 : kWidth;
    const bool rows_fastest = (kRegisters || sizeof(S) >= 4) && load.rows_fastest;
    row = rows_fastest ? thread % kRows : thread * width / kCols;
    col = rows_fastest ? thread / kRows * width : thread * width % kCols;
    row_step = rows_fastest ? 0 : threads * width / kCols;
    col_step = rows_fastest ? threads / kRows * width : 0;
    const auto first = [&](const Operand<S>& o) {
      return o.data + (mn_begin * o.mn_stride + k_begin * o.k_stride + row * row_stride(o) + col * col_stride(o));
    };
    next = first(load.operand);
    if constexpr (loads == Loads::folded) next_saved = first(derivative->y);
  }

  __device__ void fetch(S* stage) {
    const Operand<S>& operand = load.operand;
    const int k = static_cast<int>(k_left < TileLayout::kDepth ? k_left : TileLayout::kDepth);
    const int rows = TileLayout::kKMajor ? mn_left : k, cols = TileLayout::kKMajor ? k : mn_left;
    const int64_t step = row_step * row_stride(operand) + col_step * col_stride(operand);
    S* const to = stage + row * TileLayout::kRow + col;
    const int to_step = row_step * TileLayout::kRow + col_step;
    if (load.path == Path::vectors) {
#pragma unroll
      for (int u = 0; u < kVectors; ++u) {
        const int count = count_of(u, rows, cols);
        cp_async_16(to + u * to_step, count > 0 ? next + u * step : operand.data, count * static_cast<int>(sizeof(S)));
      }
    } else if (sizeof(S) >= 4 && load.path == Path::elements) {
      if constexpr (sizeof(S) >= 4)
#pragma unroll
        for (int u = 0; u < kElements; ++u) {
          const bool inside = count_of(u, rows, cols) > 0;
          cp_async_element<sizeof(S)>(to + u * to_step, inside ? next + u * step : operand.data,
                                      inside ? sizeof(S) : 0);
        }
    } else if constexpr (kRegisters) {
#pragma unroll
      for (int u = 0; u < kVectors; ++u)
        load_strided(held[u], next + u * step, col_stride(operand), count_of(u, rows, cols));
      if constexpr (loads == Loads::folded)
        if (derivative->kind != ActivationKind::identity) {
          const Operand<S>& y = derivative->y;
          const int64_t y_step = row_step * row_stride(y) + col_step * col_stride(y);
#pragma unroll
          for (int u = 0; u < kVectors; ++u)
            load_strided(held_saved[u], next_saved + u * y_step, col_stride(y), count_of(u, rows, cols));
        }
    }
    next += TileLayout::kDepth * operand.k_stride;
    if constexpr (loads == Loads::folded) next_saved += TileLayout::kDepth * derivative->y.k_stride;
    k_left -= TileLayout::kDepth;
  }

  __device__ void place(S* stage) {
    if constexpr (kRegisters) {
      if (load.path != Path::registers) return;
      if constexpr (loads == Loads::folded) {
        if (derivative->kind != ActivationKind::identity)
          with_folded(derivative->kind, [&](auto kind) {
            using V = Vec<Compute<S>>;
#pragma unroll
            for (int u = 0; u < kVectors; ++u)
#pragma unroll
              for (int i = 0; i < kWidth; ++i)
                decltype(kind)::backward(V::load(held[u] + i), V::load(held_saved[u] + i), derivative->parameters)
                    .store(held[u] + i);
          });
      }
#pragma unroll
      for (int u = 0; u < kVectors; ++u)
        store_unit(stage + (row + u * row_step) * TileLayout::kRow + col + u * col_step, held[u], kWidth, true);
    }
  }

 private:
  // The number of elements that exist in the row from this thread's u-th place on.
  __device__ int count_of(int u, int rows, int cols) const {
    const int left = cols - (col + u * col_step);
    return row + u * row_step >= rows || left <= 0 ? 0 : left < kWidth ? left : kWidth;
  }
  static __device__ void load_strided(S (&to)[kWidth], const S* from, int64_t stride, int count) {
    if (stride == 1) {
      load_unit(to, from, count, reinterpret_cast<uintptr_t>(from) % 16 == 0);
      return;
    }
#pragma unroll
    for (int i = 0; i < kWidth; ++i) to[i] = i < count ? from[i * stride] : S{};
  }
};

// ---- multipliers: the block's tile of C, in the registers of its threads
//
//   A, B, kThreads, sum  the layouts of the tiles, the threads of a block, this thread's part of C
//   multiply(a, b)       sum += a b^T for two tiles in shared memory
//   store(tile, row)     stores the sum to a tile in shared memory, whose rows are `row` elements apart
//   each_pair(body)      body(row, col, first, second) for pairs of neighbours in a row of this thread's sum
//
// kAPad and kBPad are the pads of the layouts. For a tile that is part of a wider one, they also cover the rest of it.

// The fragments of C: lane 4 g + t has rows g and g + 8, columns 2 t and 2 t + 1.
template <int kWarpsN, int kM, int kN>
__device__ inline void store_fragments(const float (&sum)[kM / 16][kN / 8][4], float* tile, int row) {
  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
  float* const corner = tile + (warp / kWarpsN * kM + lane / 4) * row + warp % kWarpsN * kN + lane % 4 * 2;
#pragma unroll
  for (int i = 0; i < kM / 16; ++i)
#pragma unroll
    for (int j = 0; j < kN / 8; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) corner[(i * 16 + e / 2 * 8) * row + j * 8 + e % 2] = sum[i][j][e];
}

template <int kWarpsN, int kM, int kN, class Body>
__device__ inline void each_fragment_pair(const float (&sum)[kM / 16][kN / 8][4], Body body) {
  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
  const int row = warp / kWarpsN * kM + lane / 4, col = warp % kWarpsN * kN + lane % 4 * 2;
#pragma unroll
  for (int i = 0; i < kM / 16; ++i)
#pragma unroll
    for (int j = 0; j < kN / 8; ++j)
#pragma unroll
      for (int e = 0; e < 2; ++e) body(row + i * 16 + e * 8, col + j * 8, sum[i][j][2 * e], sum[i][j][2 * e + 1]);
}

// 16-bit products by mma.m16n8k16. There are kWarpsM x kWarpsN warps, each with kM x kN elements of C.
template <class Element, int kWarpsM, int kWarpsN, int kM, int kN, bool kAKMajor, bool kBKMajor,
          int kAPad = kVector<Element>, int kBPad = kVector<Element>>
struct Mma16 {
  using S = Element;
  using C = float;
  static constexpr int kTileM = kWarpsM * kM, kTileN = kWarpsN * kN, kTileK = 32;
  static constexpr int kThreads = kWarpsM * kWarpsN * 32;
  using A = Layout<S, kTileM, kTileK, kAKMajor, kAPad>;
  using B = Layout<S, kTileN, kTileK, kBKMajor, kBPad>;
  float sum[kM / 16][kN / 8][4] = {};

  __device__ void multiply(const S* a, const S* b) {
    const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
    const int m0 = warp / kWarpsN * kM, n0 = warp % kWarpsN * kN;
    // The row, and the one of four matrices, whose address this lane passes to ldmatrix.
    const int row = lane % 8, first = lane / 8 % 2 * 8, second = lane / 16 * 8;
#pragma unroll
    for (int k = 0; k < kTileK; k += 16) {
      unsigned fa[kM / 16][4], fb[kN / 8][2];
#pragma unroll
      for (int i = 0; i < kM / 16; ++i) {  // matrices in the order of a fragment: m and m + 8, then k + 8
        const int m = m0 + i * 16;
        if constexpr (kAKMajor)
          ldmatrix_x4(fa[i], a + A::offset(m + first + row, k + second));
        else
          ldmatrix_x4_trans(fa[i], a + A::offset(m + first, k + second + row));
      }
#pragma unroll
      for (int j = 0; j < kN / 8; j += 2) {  // two fragments: k and k + 8, then n + 8
        const int n = n0 + j * 8;
        unsigned r[4];
        if constexpr (kBKMajor)
          ldmatrix_x4(r, b + B::offset(n + second + row, k + first));
        else
          ldmatrix_x4_trans(r, b + B::offset(n + second, k + first + row));
        fb[j][0] = r[0];
        fb[j][1] = r[1];
        fb[j + 1][0] = r[2];
        fb[j + 1][1] = r[3];
      }
#pragma unroll
      for (int i = 0; i < kM / 16; ++i)
#pragma unroll
        for (int j = 0; j < kN / 8; ++j) mma_m16n8k16(sum[i][j], fa[i], fb[j], S{});
    }
  }

  __device__ void store(C* tile, int row) const { store_fragments<kWarpsN, kM, kN>(sum, tile, row); }
  template <class Body>
  __device__ void each_pair(Body body) const {
    each_fragment_pair<kWarpsN, kM, kN>(sum, body);
  }
};

// float32 products, rounded to tf32, by mma.m16n8k8.
template <int kWarpsM, int kWarpsN, int kM, int kN, bool kAKMajor = false, int kAPad = 8, int kBPad = 8>
struct MmaTf32 {
  using S = float;
  using C = float;
  static constexpr int kTileM = kWarpsM * kM, kTileN = kWarpsN * kN, kTileK = 16;
  static constexpr int kThreads = kWarpsM * kWarpsN * 32;
  // One access of a warp reads 8 columns of 4 rows.
  using A = Layout<S, kTileM, kTileK, kAKMajor, kAPad>;
  using B = Layout<S, kTileN, kTileK, false, kBPad>;
  float sum[kM / 16][kN / 8][4] = {};

  __device__ void multiply(const S* a, const S* b) {
    const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
    const int m0 = warp / kWarpsN * kM + lane / 4, n0 = warp % kWarpsN * kN + lane / 4;
#pragma unroll
    for (int k0 = 0; k0 < kTileK; k0 += 8) {
      const int k = k0 + lane % 4;
      unsigned fa[kM / 16][4], fb[kN / 8][2];
#pragma unroll
      for (int i = 0; i < kM / 16; ++i)
#pragma unroll
        for (int e = 0; e < 4; ++e) fa[i][e] = cvt_rna_tf32(a[A::offset(m0 + i * 16 + e % 2 * 8, k + e / 2 * 4)]);
#pragma unroll
      for (int j = 0; j < kN / 8; ++j)
#pragma unroll
        for (int e = 0; e < 2; ++e) fb[j][e] = cvt_rna_tf32(b[B::offset(n0 + j * 8, k + e * 4)]);
#pragma unroll
      for (int i = 0; i < kM / 16; ++i)
#pragma unroll
        for (int j = 0; j < kN / 8; ++j) mma_m16n8k8_tf32(sum[i][j], fa[i], fb[j]);
    }
  }

  __device__ void store(C* tile, int row) const { store_fragments<kWarpsN, kM, kN>(sum, tile, row); }
  template <class Body>
  __device__ void each_pair(Body body) const {
    each_fragment_pair<kWarpsN, kM, kN>(sum, body);
  }
};

// float32 and float64 products by multiply-adds. The 4 x 8 lanes of a warp have kBlocks x kBlocks squares of 4 x 4
// each, 16 rows and 32 columns apart, so that a warp reads 16-byte vectors of neighbouring columns.
template <class Element, int kWarpsM, int kWarpsN, int kBlocks, bool kAKMajor = false, int kAPad = kVector<Element>,
          int kBPad = kVector<Element>>
struct Simt {
  using S = Element;
  using C = Element;
  static constexpr int kTileM = kWarpsM * 16 * kBlocks, kTileN = kWarpsN * 32 * kBlocks, kTileK = 16;
  static constexpr int kThreads = kWarpsM * kWarpsN * 32;
  using A = Layout<S, kTileM, kTileK, kAKMajor, kAPad>;
  using B = Layout<S, kTileN, kTileK, false, kBPad>;
  C sum[kBlocks][4][kBlocks][4] = {};

  static __device__ int first_row() {
    return static_cast<int>(threadIdx.x) / 32 / kWarpsN * 16 * kBlocks + static_cast<int>(threadIdx.x) % 32 / 8 * 4;
  }
  static __device__ int first_col() {
    return static_cast<int>(threadIdx.x) / 32 % kWarpsN * 32 * kBlocks + static_cast<int>(threadIdx.x) % 8 * 4;
  }

  __device__ void multiply(const S* a, const S* b) {
    const S* const from_a = a + A::offset(first_row(), 0);
    const S* const from_b = b + first_col();
#pragma unroll
    for (int k = 0; k < kTileK; ++k) {
      alignas(16) S fa[kBlocks][4], fb[kBlocks][4];
#pragma unroll
      for (int i = 0; i < kBlocks; ++i) {
        if constexpr (kAKMajor) {
#pragma unroll
          for (int r = 0; r < 4; ++r) fa[i][r] = from_a[A::offset(i * 16 + r, k)];
        } else {
          load_unit(fa[i], from_a + A::offset(i * 16, k), 4, true);
        }
        load_unit(fb[i], from_b + B::offset(i * 32, k), 4, true);
      }
#pragma unroll
      for (int i = 0; i < kBlocks * 4; ++i)
#pragma unroll
        for (int j = 0; j < kBlocks * 4; ++j) {
          C& c = sum[i / 4][i % 4][j / 4][j % 4];
          c = fma(Vec<C>{fa[i / 4][i % 4]}, Vec<C>{fb[j / 4][j % 4]}, Vec<C>{c}).v;
        }
    }
  }

  __device__ void store(C* tile, int row) const {
    C* const corner = tile + first_row() * row + first_col();
#pragma unroll
    for (int i = 0; i < kBlocks * 4; ++i)
#pragma unroll
      for (int j = 0; j < kBlocks; ++j)
        store_unit(corner + (i / 4 * 16 + i % 4) * row + j * 32, sum[i / 4][i % 4][j], 4, true);
  }
  template <class Body>
  __device__ void each_pair(Body body) const {
#pragma unroll
    for (int i = 0; i < kBlocks * 4; ++i)
#pragma unroll
      for (int j = 0; j < kBlocks * 2; ++j) {
        const C* const pair = sum[i / 4][i % 4][j / 2] + j % 2 * 2;
        body(first_row() + i / 4 * 16 + i % 4, first_col() + j / 2 * 32 + j % 2 * 2, pair[0], pair[1]);
      }
  }
};

// ---- the loop

// The number of stages, and the shared memory of a block: the stages, and after the loop the tile of C.
template <class Multiplier>
struct Stages {
  using S = typename Multiplier::S;
  using C = typename Multiplier::C;
  static constexpr int kStages = sizeof(S) == 8 ? 3 : 4;
  static constexpr int kStage = Multiplier::A::kSize + Multiplier::B::kSize;  // elements
  static constexpr int kRow = Multiplier::kTileN + 8;                         // of the tile of C
  static constexpr size_t kBytes = kStages * kStage * sizeof(S) > Multiplier::kTileM * kRow * sizeof(C)
                                       ? kStages * kStage * sizeof(S)
                                       : Multiplier::kTileM * kRow * sizeof(C);
};

// multiplier.sum += A B^T over the k of the loaders. If wanted, row_sum is the sum of row threadIdx.x of A, which must
// not be kKMajor.
template <class Multiplier, class LoaderA, class LoaderB>
__device__ inline void multiply_tiles(Multiplier& multiplier, LoaderA& a, LoaderB& b, int64_t k,
                                      typename Multiplier::S* shared, bool want_row_sum,
                                      typename Multiplier::C& row_sum) {
  using St = Stages<Multiplier>;
  using A = typename Multiplier::A;
  const auto stage_of = [&](int tile) { return shared + tile % St::kStages * St::kStage; };
  const int tiles = static_cast<int>((k + Multiplier::kTileK - 1) / Multiplier::kTileK);
  for (int tile = 0; tile < St::kStages - 1; ++tile) {
    if (tile < tiles) {
      typename Multiplier::S* const stage = stage_of(tile);
      a.fetch(stage);
      b.fetch(stage + A::kSize);
      a.place(stage);
      b.place(stage + A::kSize);
    }
    cp_async_commit();
  }
  for (int tile = 0; tile < tiles; ++tile) {
    cp_async_wait<St::kStages - 2>();
    __syncthreads();  // this tile is there for all, and nobody reads the stage of the last one any more
    const int next = tile + St::kStages - 1;
    typename Multiplier::S *const stage = stage_of(tile), *const next_stage = stage_of(next);
    if (next < tiles) {
      a.fetch(next_stage);
      b.fetch(next_stage + A::kSize);
    }
    multiplier.multiply(stage, stage + A::kSize);
    if constexpr (!A::kKMajor)
      if (want_row_sum && static_cast<int>(threadIdx.x) < Multiplier::kTileM)
        for (int k = 0; k < Multiplier::kTileK; ++k)
          row_sum += to_compute(stage[A::offset(static_cast<int>(threadIdx.x), k)]);
    if (next < tiles) {
      a.place(next_stage);
      b.place(next_stage + A::kSize);
    }
    cp_async_commit();
  }
  cp_async_wait<0>();
  __syncthreads();  // the stages are free
}

// ---- the epilogue

template <class S>
struct Epilogue {
  int64_t m, n;
  const S* bias;  // nullable
  int64_t bias_stride;
  ActivationKind kind;
  Parameters<S> parameters;
  S* y;
  S* z;  // nullable
  int64_t row_stride;
  bool pairs;  // y and z can be written two elements at a time
};

template <class T>
struct alignas(2 * sizeof(T)) Pair {
  T first, second;
};

// A function that is not inlined, so that the code of all activations is not in every kernel.
template <class S>
__device__ __noinline__ Pair<Compute<S>> activate(ActivationKind kind, Parameters<S> p, Pair<Compute<S>> z) {
  using V = Vec<Compute<S>>;
  return with_kind(kind, [&](auto k) -> Pair<Compute<S>> {
    return {decltype(k)::forward(V{z.first}, p).v, decltype(k)::forward(V{z.second}, p).v};
  });
}

template <class S>
__device__ inline void store_pair(S* to, Pair<Compute<S>> values, bool both, bool pairs) {
  Pair<S> stored;
  to_storage(values.first, &stored.first);
  to_storage(values.second, &stored.second);
  if (pairs && both) {
    *reinterpret_cast<Pair<S>*>(to) = stored;
    return;
  }
  to[0] = stored.first;
  if (both) to[1] = stored.second;
}

// Stores y (and z) at (row, col) and, if it exists, (row, col + 1), from their sums.
template <class S>
__device__ inline void finish(const Epilogue<S>& e, int64_t row, int64_t col, Pair<Compute<S>> value) {
  const bool both = col + 1 < e.n;
  if (e.bias != nullptr) {
    value.first += to_compute(e.bias[col * e.bias_stride]);
    if (both) value.second += to_compute(e.bias[(col + 1) * e.bias_stride]);
  }
  const int64_t at = row * e.row_stride + col;
  if (e.z != nullptr) store_pair(e.z + at, value, both, e.pairs);
  if (e.kind != ActivationKind::identity) value = activate<S>(e.kind, e.parameters, value);
  store_pair(e.y + at, value, both, e.pairs);
}

// ---- the kernel

// If k is split, `partial` has the sums of every part, [splits][m][n rounded up to even], followed by the row sums of
// A, [splits][m]. reduce_kernel adds them.
template <class S>
struct GemmTask {
  int64_t m, n, k;
  Load<S> a, b;
  Derivative<S> derivative;  // of A
  Epilogue<S> epilogue;
  S* row_sums;  // nullable: [m], the sums of the rows of A
  Compute<S>* partial;
  int64_t tiles_m, tiles_n, splits, k_per_split;
};

// Tiles of C are computed in groups of this many rows of tiles, so that blocks running together share operands in L2.
// Not measured.
constexpr int64_t kGroupRows = 8;

// The number of blocks for which a multiprocessor must have registers, so that one computes while another waits. With
// two, large float32 tiles would spill. Not measured.
template <class S>
constexpr int kBlocksAtOnce = sizeof(S) == 2 ? 2 : 1;

template <class Multiplier, Loads loads>
__global__ void __launch_bounds__(Multiplier::kThreads, kBlocksAtOnce<typename Multiplier::S>)
    gemm_kernel(const __grid_constant__ GemmTask<typename Multiplier::S> task) {
  using S = typename Multiplier::S;
  using C = typename Multiplier::C;
  using St = Stages<Multiplier>;
  constexpr int threads = Multiplier::kThreads;

  const int64_t tiles = task.tiles_m * task.tiles_n;
  const int64_t split = blockIdx.x / tiles, index = blockIdx.x % tiles;
  const int64_t group = index / (kGroupRows * task.tiles_n), first_row = group * kGroupRows;
  const int64_t rows = task.tiles_m - first_row < kGroupRows ? task.tiles_m - first_row : kGroupRows;
  const int64_t in_group = index - group * kGroupRows * task.tiles_n;
  const int64_t m0 = (first_row + in_group % rows) * Multiplier::kTileM, n0 = in_group / rows * Multiplier::kTileN;

  const int64_t k_begin = split * task.k_per_split;
  const int64_t k_end = k_begin + task.k_per_split < task.k ? k_begin + task.k_per_split : task.k;
  S* const shared = static_cast<S*>(shared_memory());
  Loader<typename Multiplier::A, threads, loads> a(task.a, &task.derivative, m0, task.m, k_begin, k_end);
  Loader<typename Multiplier::B, threads, loads == Loads::folded ? Loads::any : loads> b(task.b, nullptr, n0, task.n,
                                                                                         k_begin, k_end);
  Multiplier multiplier;
  const bool want_row_sum = task.row_sums != nullptr && n0 == 0;
  C row_sum = 0;
  multiply_tiles(multiplier, a, b, k_end - k_begin, shared, want_row_sum, row_sum);

  const int64_t even_n = (task.n + 1) / 2 * 2;
  const int64_t own_row = m0 + threadIdx.x;
  if (want_row_sum && static_cast<int>(threadIdx.x) < Multiplier::kTileM && own_row < task.m) {
    if (task.splits > 1)
      task.partial[task.splits * task.m * even_n + split * task.m + own_row] = row_sum;
    else
      to_storage(row_sum, task.row_sums + own_row);
  }

  C* const tile = reinterpret_cast<C*>(shared);
  multiplier.store(tile, St::kRow);
  __syncthreads();
  constexpr int pairs = Multiplier::kTileN / 2;
  for (int i = static_cast<int>(threadIdx.x); i < Multiplier::kTileM * pairs; i += threads) {
    const int row = i / pairs, col = i % pairs * 2;
    if (m0 + row >= task.m || n0 + col >= task.n) continue;
    const auto value = *reinterpret_cast<const Pair<C>*>(tile + row * St::kRow + col);
    if (task.splits > 1)
      *reinterpret_cast<Pair<C>*>(task.partial + (split * task.m + m0 + row) * even_n + n0 + col) = value;
    else
      finish(task.epilogue, m0 + row, n0 + col, value);
  }
}

constexpr int kReduceThreads = 256;

// Adds the parts in order, with the epilogue of gemm_kernel. One thread per pair of elements of C, then one per row
// sum.
template <class S>
__global__ void __launch_bounds__(kReduceThreads) reduce_kernel(const __grid_constant__ GemmTask<S> task) {
  using C = Compute<S>;
  const int64_t even_n = (task.n + 1) / 2 * 2, pairs = task.m * even_n / 2;
  int64_t index = static_cast<int64_t>(blockIdx.x) * kReduceThreads + threadIdx.x;
  if (index < pairs) {
    Pair<C> value{};
    for (int64_t split = 0; split < task.splits; ++split) {
      const auto part = *reinterpret_cast<const Pair<C>*>(task.partial + split * task.m * even_n + index * 2);
      value.first += part.first;
      value.second += part.second;
    }
    finish(task.epilogue, index / (even_n / 2), index % (even_n / 2) * 2, value);
    return;
  }
  index -= pairs;
  if (task.row_sums == nullptr || index >= task.m) return;
  C sum = 0;
  for (int64_t split = 0; split < task.splits; ++split)
    sum += task.partial[task.splits * task.m * even_n + split * task.m + index];
  to_storage(sum, task.row_sums + index);
}

}  // namespace
}  // namespace fastops::cuda
