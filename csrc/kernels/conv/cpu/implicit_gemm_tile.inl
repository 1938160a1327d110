// The matrix product of a convolution, and the epilogue that stores a register tile to the image.
//
//   outputs[o, n] = f(sum_k weights[o, k] patches[n, k] + bias[o])
//
// For channels first, rows of C are outputs and columns are positions; for channels last the reverse.
#pragma once

#include "../../activation/cpu/rows.inl"
#include "../../common/cpu/common.inl"
#include "../../gemm/cpu/amx.inl"
#include "../../gemm/cpu/microkernels.inl"
#include "filters.inl"
#include "patches.inl"

// The output image. Position n = (image, p0, p1, p2) and output o are at y + image * batch_stride + o * channel_stride
// + sum p[d] * stride[d].
template <class T>
struct ConvOutput {
  T* y;
  T* z;           // null, or in the layout of y
  const T* bias;  // null, or contiguous
  Rectifier relu;
  RowForward<T> f;  // null for identity and what relu says
  Activation activation;
  int64_t batch_stride, channel_stride, stride[3];
  bool dense;         // successive positions are stride[2] apart, also from one row of the grid to the next
  bool stream;        // aligned tiles are written with non-temporal stores
  const T* residual;  // null, or in the layout of y: added before f; only where T is the compute type
};

template <class T>
struct ConvProduct {
  int64_t groups, outputs, features, positions, image_positions;
  Patches<T> patches;  // this and all pointers: of the first group
  ConvWeights<T> weights;
  ConvOutput<T> out;
  int64_t x_group, w_group;  // elements between groups
  const void* w_packed;      // null, or all weights as pack_conv_weights makes them
  bool positions_are_rows() const { return patches.channels_inner; }
};

constexpr int kMaxTile = 32;  // rows and columns of the largest register tile

// to = prev + A B over one block of k. prev is null, or the sums of the blocks before. to may be prev.
template <class P, class C>
inline void product_tile(P, int64_t k, const P* a, const P* b, int rows, int cols, const C* prev, int64_t prev_rs,
                         C* to, int64_t to_rs, const void* ahead = nullptr) {
  TileOut<C> tile{};
  tile.ahead = ahead;
  tile.c = to;
  tile.c_rs = to_rs;
  tile.prev = prev;
  tile.prev_rs = prev_rs;
  micro_tile(k, a, 1, Tile<P>::mr, b, Tile<P>::nr, rows, cols, tile);
}
// The same, into a buffer of kMaxTile x kMaxTile. Elements outside the tile are undefined.
template <class P, class C>
inline void product_buffer(P, int64_t k, const P* a, const P* b, int rows, int cols, const C* prev, int64_t prev_rs,
                           C* buffer) {
  product_tile(P{}, k, a, b, rows, cols, prev, prev_rs, buffer, kMaxTile);
}
#if defined(FASTOPS_HAS_AMX)
inline void product_buffer(bf16_amx, int64_t pairs, const amx_a* a, const amx_b* b, int rows, int cols,
                           const float* prev, int64_t prev_rs, float* buffer) {
  multiply_tiles(ceil_div(pairs, kTilePairs), a, b, rows > 16, cols > 16, buffer);
  if (prev == nullptr) return;
  const int left = smaller(cols, 16), right = cols - left;
  for (int r = 0; r < rows; ++r, buffer += kMaxTile, prev += prev_rs) {
    (Vec<float>::load(buffer) + Vec<float>::load(prev, left)).store(buffer);
    (Vec<float>::load(buffer + 16) + Vec<float>::load(prev + 16, right)).store(buffer + 16);
  }
}
inline void product_tile(bf16_amx, int64_t pairs, const amx_a* a, const amx_b* b, int rows, int cols, const float* prev,
                         int64_t prev_rs, float* to, int64_t to_rs, const void* = nullptr) {
  alignas(64) float sums[kMaxTile * kMaxTile];
  product_buffer(bf16_amx{}, pairs, a, b, rows, cols, prev, prev_rs, sums);
  for (int r = 0; r < rows; ++r)
    for (int c = 0; c < cols; c += 16)
      Vec<float>::load(sums + r * kMaxTile + c).store(to + r * to_rs + c, smaller(cols - c, 16));
}
#endif

// to[i * step] = from[i]. For a step of 2 it uses vectors instead of one store per element. With AVX2, which has no
// fast masked store, they write what is between the elements again as it is: nobody else writes there meanwhile, as
// these are elements of another phase.
template <class T>
inline void store_spread(const T* from, int count, int64_t step, T* to) {
#if defined(FASTOPS_VEC_AVX512)
  if constexpr (sizeof(T) <= 4) {
    if (step == 2) {
      for (int i = 0; i < count; i += 16) {
        const int n = smaller(count - i, 16);
        if constexpr (sizeof(T) == 2) {
          const __m512i v = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first16(n), from + i));
          _mm512_mask_storeu_epi16(to + 2 * i, static_cast<__mmask32>(spread_bits(first16(n))), v);
        } else {
          const uint32_t mask = n == 16 ? 0x55555555u : static_cast<uint32_t>(spread_bits(first16(n)));
          const __m512i v = _mm512_maskz_loadu_epi32(first16(n), from + i);
          const __m512i high = _mm512_castsi256_si512(_mm512_extracti64x4_epi64(v, 1));
          _mm512_mask_storeu_epi32(to + 2 * i, static_cast<__mmask16>(mask), _mm512_maskz_expand_epi32(0x5555, v));
          _mm512_mask_storeu_epi32(to + 2 * i + 16, static_cast<__mmask16>(mask >> 16),
                                   _mm512_maskz_expand_epi32(0x5555, high));
        }
      }
      return;
    }
  }
#elif defined(FASTOPS_VEC_AVX2)
  if constexpr (sizeof(T) == 4) {
    if (step == 2) {
      int i = 0;
      for (; i + 4 < count; i += 4) {  // so it ends before what follows the last element
        const __m128 v = _mm_loadu_ps((const float*)(from + i));
        const __m256 twice =
            _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_unpacklo_ps(v, v)), _mm_unpackhi_ps(v, v), 1);
        float* const at = (float*)(to + 2 * i);
        _mm256_storeu_ps(at, _mm256_blend_ps(_mm256_loadu_ps(at), twice, 0x55));
      }
      for (; i < count; ++i) to[2 * i] = from[i];
      return;
    }
  }
#endif
  for (int i = 0; i < count; ++i) to[i * step] = from[i];
}

// The epilogue of one row of complete sums. Results are `step` elements apart, from y + at (and z + at) on. A residual
// is added to the sums, and what relu says then follows here.
template <class T>
inline void finish_run(const ConvOutput<T>& out, Compute<T>* sums, int64_t at, int64_t step, int count) {
  if constexpr (same_type<T, Compute<T>>) {
    if (out.residual != nullptr) {
      for (int i = 0; i < count; ++i) {
        const T sum = sums[i] + out.residual[at + i * step];
        sums[i] = out.relu && sum < 0 ? 0 : out.relu == kRelu6 && sum > 6 ? 6 : sum;
      }
    }
  }
  if (step == 1) {
    if (out.z != nullptr) store_row<T>(sums, out.z + at, count);
    if (out.f != nullptr)
      out.f(sums, out.y + at, count, out.activation);
    else
      store_row<T>(sums, out.y + at, count);
    return;
  }
  if constexpr (same_type<T, Compute<T>>)
    if (out.z == nullptr && out.f == nullptr) return store_spread(sums, count, step, out.y + at);
  T values[kMaxTile];
  if (out.z != nullptr) {
    store_row<T>(sums, values, count);
    store_spread(values, count, step, out.z + at);
  }
  if (out.f != nullptr)
    out.f(sums, values, count, out.activation);
  else
    store_row<T>(sums, values, count);
  store_spread(values, count, step, out.y + at);
}

// The epilogue of a tile whose rows are y_rs apart in y: bias and relu in registers, then one rounding.
template <class T>
inline void finish_dense(const ConvOutput<T>& out, const Compute<T>* sums, int64_t rs, const Compute<T>* bias,
                         bool bias_of_rows, T* y, int64_t y_rs, int rows, int cols) {
  using Lanes = Vec<Compute<T>>;
  constexpr int S = Lanes::size;
  const T* const residual = out.residual != nullptr ? out.residual + (y - out.y) : nullptr;
#if defined(FASTOPS_HAS_AMX)
  if constexpr (same_type<T, bf16_t>) {
    if (cols == 2 * S) return store_wide(out.relu, sums, rs, bias, bias_of_rows, false, y, y_rs, rows);
  }
#endif
  for (int c = 0; c < cols; c += S) {
    const int count = smaller(cols - c, S);
    const Lanes col_bias = bias_of_rows ? Lanes::zero() : Lanes::load(bias + c);
    for (int r = 0; r < rows; ++r) {
      Lanes v = Lanes::load(sums + r * rs + c) + (bias_of_rows ? Lanes::set1(bias[r]) : col_bias);
      if constexpr (same_type<T, Compute<T>>)
        if (residual != nullptr) v = v + Lanes::load(residual + r * y_rs + c, count);
      if (out.relu) v = rectified(v, out.relu);
      if (count == S)
        v.store(y + r * y_rs + c);
      else
        v.store(y + r * y_rs + c, count);
    }
  }
}

// The epilogue of a tile of complete sums: bias, activation, rounding, stores. o is the first output, n the first
// position; positions_are_rows says which of them are rows. It may read all kMaxTile columns of sums.
template <class T>
void finish_tile(const ConvProduct<T>& g, Compute<T>* sums, int64_t rs, int64_t o, int outputs, int64_t n,
                 int positions) {
  using C = Compute<T>;
  constexpr int S = Vec<C>::size;
  const ConvOutput<T>& out = g.out;
  const bool rows_are_positions = g.positions_are_rows();
  const int rows = rows_are_positions ? positions : outputs, cols = rows_are_positions ? outputs : positions;
  C bias[kMaxTile] = {};
  if (out.bias != nullptr) widen_row(out.bias + o, bias, outputs);
  const int64_t image = n / g.image_positions, within = n - image * g.image_positions;
  if (out.dense && out.f == nullptr && out.z == nullptr &&
      (rows_are_positions || within + positions <= g.image_positions)) {
    if (rows_are_positions)
      finish_dense(out, sums, rs, bias, false, out.y + n * out.stride[2] + o, out.stride[2], rows, cols);
    else
      finish_dense(out, sums, rs, bias, true, out.y + image * out.batch_stride + o * out.channel_stride + within,
                   out.channel_stride, rows, cols);
    return;
  }
  if (out.bias != nullptr || out.relu) {
    for (int r = 0; r < rows; ++r)
      for (int c = 0; c < cols; c += S) {
        const int count = smaller(cols - c, S);
        Vec<C> v = Vec<C>::load(sums + r * rs + c, count);
        v = v + (rows_are_positions ? Vec<C>::load(bias + c, count) : Vec<C>::set1(bias[r]));
        if (out.relu && out.residual == nullptr) v = rectified(v, out.relu);
        v.store(sums + r * rs + c, count);
      }
  }
  GridCursor cursor(g.patches.grid, n);
  for (int done = 0; done < positions;) {
    const int64_t at = cursor.image * out.batch_stride + cursor.p[0] * out.stride[0] + cursor.p[1] * out.stride[1] +
                       cursor.p[2] * out.stride[2] + o * out.channel_stride;
    if (rows_are_positions) {
      finish_run(out, sums + done * rs, at, 1, outputs);
      cursor.advance(g.patches.grid, 1);
      ++done;
      continue;
    }
    const int length = static_cast<int>(smaller<int64_t>(g.patches.grid[2] - cursor.p[2], positions - done));
    for (int r = 0; r < outputs; ++r)
      finish_run(out, sums + r * rs + done, at + r * out.channel_stride, out.stride[2], length);
    cursor.advance(g.patches.grid, length);
    done += length;
  }
}

// Whether the microkernel can store the tile at output o and position n directly to y; if so, `tile` says how.
template <class T>
inline bool dense_tile(const ConvProduct<T>& g, int64_t o, int64_t n, int positions, TileOut<Compute<T>>* tile) {
  if constexpr (same_type<T, Compute<T>>) {
    const ConvOutput<T>& out = g.out;
    if (!out.dense || out.f != nullptr || out.z != nullptr) return false;
    tile->relu = out.relu;
    if (g.positions_are_rows()) {
      tile->c = out.y + n * out.stride[2] + o;
      tile->c_rs = out.stride[2];
      if (out.bias != nullptr) tile->bias = out.bias + o;
    } else {
      const int64_t image = n / g.image_positions, within = n - image * g.image_positions;
      if (within + positions > g.image_positions) return false;
      tile->c = out.y + image * out.batch_stride + o * out.channel_stride + within;
      tile->c_rs = out.channel_stride;
      if (out.bias != nullptr) tile->row_bias = out.bias + o;
    }
    if (out.residual != nullptr) {
      tile->add = out.residual + (tile->c - out.y);
      tile->add_rs = tile->c_rs;
    }
    tile->stream = out.stream && reinterpret_cast<uintptr_t>(tile->c) % 64 == 0 &&
                   tile->c_rs * static_cast<int64_t>(sizeof(T)) % 64 == 0;
    return true;
  } else {
    return false;
  }
}

// A tile of the product over one block of features. ahead is null, or what is read soon (TileOut).
template <class P, class T>
inline void conv_tile(const ConvProduct<T>& g, int64_t k, const typename Tile<P>::A* a, const typename Tile<P>::B* b,
                      int64_t o, int outputs, int64_t n, int positions, bool first, bool last, Compute<T>* sums,
                      int64_t sums_rs, const void* ahead = nullptr) {
  using C = Compute<T>;
  const bool rows_are_positions = g.positions_are_rows();
  const int rows = rows_are_positions ? positions : outputs, cols = rows_are_positions ? outputs : positions;
  if (!last) return product_tile(P{}, k, a, b, rows, cols, first ? nullptr : sums, sums_rs, sums, sums_rs, ahead);
  if constexpr (same_type<P, C>) {
    TileOut<C> tile{};
    if (dense_tile(g, o, n, positions, &tile)) {
      tile.prev = first ? nullptr : sums;
      tile.prev_rs = sums_rs;
      tile.ahead = ahead;
      return micro_tile(k, a, 1, Tile<P>::mr, b, Tile<P>::nr, rows, cols, tile);
    }
  }
  alignas(64) C buffer[kMaxTile * kMaxTile];
  product_buffer(P{}, k, a, b, rows, cols, first ? nullptr : sums, sums_rs, buffer);
  finish_tile(g, buffer, kMaxTile, o, outputs, n, positions);
}
