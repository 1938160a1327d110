// Packing of Patches. If elements are copied without conversion, panels are packed directly from the image, else
// through a buffer in L1.
#pragma once

#include "../../common/cpu/common.inl"
#include "../../gemm/cpu/amx.inl"
#include "../../gemm/cpu/microkernels.inl"
#include "../../gemm/cpu/pack.inl"
#include "patches.inl"

// Channels first, 1x1: whether the rows of an image are packed for many panels at a time, or panel by panel, a cache
// line of each row. AVX2, Zen 3, one thread, forward: 512 -> 128 of 28x28 2.0 and 256 -> 64 of 56x56 2.6 times as fast.
#if defined(FASTOPS_VEC_AVX2)
constexpr bool kPlainRuns = true;
#else
constexpr bool kPlainRuns = false;
#endif

// One panel from lanes at any addresses, each contiguous along k; a null lane is zero. pack_along_k does the same for
// lanes at equal distances.
template <class P, class T, int W>
inline void pack_lanes(const T* const* lanes, int64_t k, P* to) {
  using As = PackAs<P, T>;
  using Value = typename As::Value;
  constexpr int S = Value::size;
  for (int64_t p = 0; p < k; p += S) {
    const int count = static_cast<int>(smaller<int64_t>(k - p, S));
#pragma GCC unroll 1
    for (int l = 0; l < W; l += S) {
      const int width = W - l < S ? W - l : S;
      Value r[S];
#pragma GCC unroll 16
      for (int i = 0; i < S; ++i) {
        const T* const lane = i < width ? lanes[l + i] : nullptr;
        r[i] = lane == nullptr ? Value::zero()
               : count == S    ? As::load_along_k(lane + p)
                               : As::load_along_k(lane + p, count);
      }
      transpose(r);
      P* const out = to + p * W + l;
      if (width == S && count == S) {
#pragma GCC unroll 16
        for (int i = 0; i < S; ++i) As::store(r[i], out + i * W);
      } else {
#pragma GCC unroll 16
        for (int i = 0; i < S; ++i)
          if (i < count) As::store(r[i], out + i * W, width);
      }
    }
  }
}
// Whether panels of P can be packed one tap at a time: the first k of a tap must begin a panel element.
template <class P, class T>
inline bool packs_lanes(int64_t channels) {
  (void)channels;
  if constexpr (same_type<P, Compute<T>>) return true;
#if defined(FASTOPS_HAS_AMX)
  if constexpr (same_type<P, amx_a>) return channels % kTileK == 0;
#endif
  return false;
}
#if defined(FASTOPS_HAS_AMX)
template <>
inline void pack_lanes<amx_a, bf16_t, 32>(const bf16_t* const* lanes, int64_t k, amx_a* to) {
  for (int l = 0; l < 32; ++l) {
    amx_a* out = to + l * kTilePairs;
    const bf16_t* const lane = lanes[l];
    for (int64_t p = 0; p < k; p += kTileK, out += 32 * kTilePairs)
      _mm512_storeu_si512(out, lane == nullptr ? _mm512_setzero_si512() : _mm512_loadu_si512(lane + p));
  }
}
#endif

// One panel of positions, directly from a channels_last image.
template <class P, class T, int W>
void pack_positions(const Patches<T>& s, int64_t n0, int count, int64_t k0, int64_t k, P* to) {
  PatchRun runs[kPatchChunk];
  PatchPiece pieces[kPatchChunk];
  const T* lanes[W];
  const int run_count = patch_runs(s, n0, count, runs);
  const int64_t step = s.step[2] * s.stride[2];
  for_taps(s, k0, k, [&](const TapCursor& tap, int64_t channel, int64_t first, int64_t length) {
    int covered;
    const int n = patch_pieces(s, tap, runs, run_count, pieces, &covered);
    for (int l = 0; l < W; ++l) lanes[l] = nullptr;
    for (int i = 0; i < n; ++i)
      for (int j = 0; j < pieces[i].count; ++j) lanes[pieces[i].first + j] = s.x + pieces[i].at + channel + j * step;
    constexpr int kStep = PackAs<P, T>::kStep;
    pack_lanes<P, T, W>(lanes, length, to + first / kStep * W);
  });
}

// sums[i] += the sum of row i.
template <class C>
inline void add_rows(const C* from, int64_t rs, int rows, int count, C* sums) {
  constexpr int S = Vec<C>::size;
  for (int i = 0; i < rows; ++i, from += rs) {
    Vec<C> sum = Vec<C>::zero();
    for (int j = 0; j < count; j += S) sum = sum + Vec<C>::load(from + j, smaller(count - j, S));
    sums[i] += reduce_add(sum);
  }
}

// Patches with a single tap as a Source, from element `at` on.
template <class T>
inline Source<T> plain_patches(const Patches<T>& s, bool positions_are_lanes, int64_t position_stride,
                               int64_t channel_stride, int64_t at) {
  Source<T> source = positions_are_lanes ? plain_source(s.x + at, position_stride, channel_stride)
                                         : plain_source(s.x + at, channel_stride, position_stride);
  if (s.derivative == nullptr) return source;
  source.derivative = s.derivative;
  source.saved = s.saved + at;
  source.saved_ls = source.ls;
  source.saved_ks = source.ks;
  source.activation = s.activation;
  return source;
}

// The positions from n0 on, at most `most`, that are whole panels of one image and so need no gathering; 0 where the
// next panel goes on in another image.
template <int W, class T>
inline int64_t plain_run(const Patches<T>& s, int64_t n0, int64_t most) {
  if (!kPlainRuns || !s.plain) return 0;
  const int64_t left = s.grid[2] - n0 % s.grid[2];
  return left >= most ? most : left / W * W;
}

// pack() for Patches. Lanes are positions and k is features, or the reverse.
template <class P, class T, int W>
void pack_patches(const Patches<T>& s, bool positions_are_lanes, int64_t lane, int64_t lanes, int64_t k0, int64_t k,
                  P* to, int64_t panel_stride, Compute<T>* sums) {
  using C = Compute<T>;
  using Stage = typename StageOf<P, T>::type;
  constexpr int kStep = PackAs<P, Stage>::kStep;
  if (k == 0) return;
  if (s.plain && s.channels_inner) {
    const Source<T> source = plain_patches(s, positions_are_lanes, s.stride[2], 1, 0);
    return pack<P, T, W>(source, lane, lanes, k0, k, to, panel_stride, sums);
  }
  if (s.plain && !positions_are_lanes && (same_type<P, C> || s.grid[2] % kPatchChunk == 0)) {
    for (int64_t p = 0; p < k;) {
      const int64_t image = (k0 + p) / s.grid[2], within = (k0 + p) % s.grid[2];
      const int64_t length = smaller(k - p, s.grid[2] - within);
      const Source<T> source = plain_patches(s, false, 1, s.channel_stride, image * s.batch_stride);
      pack<P, T, W>(source, lane, lanes, within, length, to + p / kStep * W, panel_stride, sums);
      p += length;
    }
    return;
  }
  const bool rows_are_lanes = positions_are_lanes == s.channels_inner;
  if (s.derivative == nullptr && sums == nullptr) {
    if (positions_are_lanes && s.channels_inner) {
      if (packs_lanes<P, T>(s.channels)) {
        for (int64_t l = 0; l < lanes; l += W, to += panel_stride)
          pack_positions<P, T, W>(s, lane + l, static_cast<int>(smaller<int64_t>(lanes - l, W)), k0, k, to);
        return;
      }
    }
    if constexpr (same_type<P, T>) {
      if (positions_are_lanes && !s.channels_inner) {
        for (int64_t l = 0; l < lanes;) {
          int64_t run = smaller<int64_t>(lanes - l, W);
          if (const int64_t whole = plain_run<W>(s, lane + l, lanes - l); whole > 0) {
            const int64_t at = (lane + l) / s.grid[2] * s.batch_stride + (lane + l) % s.grid[2];
            pack_along_lanes<P, T, W>(s.x + at + k0 * s.channel_stride, s.channel_stride, whole, k, to, panel_stride);
            run = whole;
          } else {
            copy_features(s, s.x, lane + l, static_cast<int>(run), k0, k, to, W, W);
          }
          l += run;
          to += ceil_div(run, W) * panel_stride;
        }
        return;
      }
      if (!positions_are_lanes && s.channels_inner) {
        for (int64_t l = 0; l < lanes; l += W, to += panel_stride) {
          const int width = static_cast<int>(smaller<int64_t>(lanes - l, W));
          for (int64_t p = 0; p < k; p += kPatchChunk) {
            const int count = static_cast<int>(smaller<int64_t>(k - p, kPatchChunk));
            copy_positions(s, s.x, k0 + p, count, lane + l, width, to + p * W, W);
            for (int j = 0; j < count && width < W; ++j) zero_run(W - width, to + (p + j) * W + width);
          }
        }
        return;
      }
    }
  }
  // Finding the elements that a tap reads costs more than copying a row of them. So, for channels first, it is done
  // once for many channels.
  constexpr int kElements = sizeof(T) == 8 ? 4096 : 8192;
  const int most_lanes = rows_are_lanes && !s.channels_inner ? kElements / kPatchChunk / W * W : W;
  const int most_k = rows_are_lanes || s.channels_inner ? kPatchChunk : kElements / W / kPatchChunk * kPatchChunk;
  const int rs = rows_are_lanes ? kPatchChunk : W;
  alignas(64) T values[kElements];
  alignas(64) T saved[kElements];
  alignas(64) C block[kElements];
  const auto copy = [&](const T* image, int64_t l, int width, int64_t p, int count, T* into) {
    const int64_t n = positions_are_lanes ? l : p, f = positions_are_lanes ? p : l;
    const int positions = positions_are_lanes ? width : count, features = positions_are_lanes ? count : width;
    if (s.channels_inner)
      copy_positions(s, image, n, positions, f, features, into, rs);
    else
      copy_features(s, image, n, positions, f, features, into, rs, rs);
  };
  for (int64_t l = 0; l < lanes; l += most_lanes) {
    const int width = static_cast<int>(smaller<int64_t>(lanes - l, most_lanes));
    for (int64_t p = 0; p < k; p += most_k) {
      const int count = static_cast<int>(smaller<int64_t>(k - p, most_k));
      const int rows = rows_are_lanes ? width : count, cols = rows_are_lanes ? count : width;
      const auto pack_rows = [&]<class From>(const From* from) {
        P* panel = to + l / W * panel_stride + p / kStep * W;
        for (int q = 0; q < width; q += W, panel += panel_stride) {
          const int part = smaller(width - q, W);
          if (rows_are_lanes)
            pack_along_k<P, From, W>(from + q * rs, rs, part, count, panel);
          else
            pack_along_lanes<P, From, W>(from, rs, part, count, panel, 0);
          pad_panel<P, W, PackAs<P, From>::kStep>(panel, count);
        }
      };
      copy(s.x, lane + l, width, k0 + p, count, values);
      if (s.derivative != nullptr) {
        copy(s.saved, lane + l, width, k0 + p, count, saved);
        for (int r = 0; r < rows; ++r)
          s.derivative(values + r * rs, saved + r * rs, block + r * rs, cols, s.activation);
        if constexpr (same_type<Stage, C>) {
          pack_rows(static_cast<const C*>(block));
        } else {
          for (int r = 0; r < rows; ++r) store_row<T>(block + r * rs, values + r * rs, cols);
          pack_rows(static_cast<const T*>(values));
        }
      } else {
        pack_rows(static_cast<const T*>(values));
        if (sums != nullptr)
          for (int r = 0; r < rows; ++r) widen_row(values + r * rs, block + r * rs, cols);
      }
      if (sums == nullptr) continue;
      if (rows_are_lanes)
        add_rows(block, rs, rows, cols, sums + l);
      else
        add_columns(block, rs, cols, rows, sums + l);
    }
  }
}
