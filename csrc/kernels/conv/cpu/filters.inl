// The weights of a convolution as an operand: a matrix of lanes by features, in the order of the features of Patches.
#pragma once

#include "../../common/cpu/common.inl"
#include "../../gemm/cpu/amx.inl"
#include "../../gemm/cpu/pack.inl"
#include "patches.inl"

// Lane l is an output of the product. Its weight for channel c and a tap is at w + l * lane_stride + c * channel_stride
// + tap_stride * (the index of the tap in the kernel). The order of features is that of the patches.
template <class T>
struct ConvWeights {
  const T* w;
  bool channels_inner;
  int64_t channels, lane_stride, channel_stride, tap_stride;
  int64_t kernel[3];
  TapRange taps[3];
  int64_t tap_count;
  int64_t feature_stride;  // elements between successive features; 0 if the distance varies (it is never 0 in dense w)

  void set_channels_inner() {
    channels_inner = true;
    feature_stride = kernel[0] * kernel[1] * kernel[2] == 1 ? channel_stride : 0;
  }
};

template <class T>
inline int64_t tap_place(const ConvWeights<T>& s, const TapCursor& tap) {
  int64_t r[3];
  for (int d = 0; d < 3; ++d) r[d] = s.taps[d].first + tap.i[d] * s.taps[d].first_step;
  return (r[0] * s.kernel[1] + r[1]) * s.kernel[2] + r[2];
}

// A position in the features of a lane.
template <class T>
struct WeightCursor {
  const ConvWeights<T>& s;
  int64_t channel, t;
  TapCursor tap;
  WeightCursor(const ConvWeights<T>& weights, int64_t k)
      : s(weights),
        channel(s.channels_inner ? k % s.channels : k / s.tap_count),
        t(s.channels_inner ? k / s.channels : k % s.tap_count),
        tap(s.taps, t) {}
  int64_t at() const { return channel * s.channel_stride + tap_place(s, tap) * s.tap_stride; }
  void advance() {
    if (s.channels_inner) {
      if (++channel < s.channels) return;
      channel = 0;
      tap.advance(s.taps);
    } else {
      tap.advance(s.taps);
      if (++t < s.tap_count) return;
      t = 0;
      ++channel;
    }
  }
};

// to[i * to_rs + l] = from[l * stride + i] for l < lanes, i < count <= 16.
template <class T>
inline void transpose_run(const T* from, int64_t stride, int lanes, int count, T* to, int64_t to_rs) {
#if defined(FASTOPS_VEC_AVX512)
  if constexpr (sizeof(T) <= 4) {
    for (int l = 0; l < lanes; l += 16) {
      const __mmask16 used = first16(smaller(lanes - l, 16)), mask = first16(count);
      Vec<float> r[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) {
        const T* const p = from + (l + i) * stride;
        const __mmask16 m = (used >> i & 1) != 0 ? mask : __mmask16{0};
        __m512i v;
        if constexpr (sizeof(T) == 2)
          v = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(m, p));
        else
          v = _mm512_maskz_loadu_epi32(m, p);
        r[i].v = _mm512_castsi512_ps(v);
      }
      transpose(r);
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) {
        if (i >= count) continue;
        const __m512i v = _mm512_castps_si512(r[i].v);
        if constexpr (sizeof(T) == 2)
          _mm512_mask_cvtepi32_storeu_epi16(to + i * to_rs + l, used, v);
        else
          _mm512_mask_storeu_epi32(to + i * to_rs + l, used, v);
      }
    }
    return;
  }
#endif
  for (int i = 0; i < count; ++i) copy_run(from + i, stride, lanes, to + i * to_rs);
}

// pack() for ConvWeights. Every k is packed for all panels before the next k, as their runs are contiguous.
template <class P, class T, int W>
void pack_weights(const ConvWeights<T>& s, int64_t lane, int64_t lanes, int64_t k0, int64_t k, P* to,
                  int64_t panel_stride) {
  if (k == 0) return;
  if (s.feature_stride != 0)
    return pack<P, T, W>(plain_source(s.w, s.lane_stride, s.feature_stride), lane, lanes, k0, k, to, panel_stride,
                         nullptr);
  constexpr int kStep = PackAs<P, T>::kStep;
  constexpr int kRun = 16;
  alignas(64) T rows[kPatchChunk * W];
  int64_t at[kPatchChunk];
  WeightCursor<T> cursor(s, k0);
  for (int64_t p = 0; p < k; p += kPatchChunk) {
    const int count = static_cast<int>(smaller<int64_t>(k - p, kPatchChunk));
    for (int i = 0; i < count; ++i, cursor.advance()) at[i] = cursor.at();
    P* panel = to + p / kStep * W;
    for (int64_t l = 0; l < lanes; l += W, panel += panel_stride) {
      const int width = static_cast<int>(smaller<int64_t>(lanes - l, W));
      const T* const base = s.w + (lane + l) * s.lane_stride;
      for (int i = 0; i < count;) {
        int run = 1;
        while (s.lane_stride != 1 && i + run < count && run < kRun && at[i + run] == at[i] + run) ++run;
        if (run > 1)
          transpose_run(base + at[i], s.lane_stride, width, run, rows + i * W, W);
        else
          copy_run(base + at[i], s.lane_stride, width, rows + i * W);
        i += run;
      }
      pack_along_lanes<P, T, W>(rows, W, width, count, panel, 0);
      pad_panel<P, W, kStep>(panel, count);
    }
  }
}

#if defined(FASTOPS_HAS_AMX)
// The most taps for split_taps.
constexpr int64_t kSplitTaps = 32;

// to[t * to_rs + i] = from[i * taps + t] for i < count <= 32. Each vector of `from` provides contiguous lanes of every
// tap.
inline void split_taps(const bf16_t* from, int count, int64_t taps, bf16_t* to, int64_t to_rs) {
  const int64_t length = count * taps;
  __m512i line[kSplitTaps];
  for (int64_t v = 0; v < taps; ++v) {
    const int64_t left = smaller<int64_t>(32, larger<int64_t>(0, length - 32 * v));
    line[v] = _mm512_maskz_loadu_epi16(static_cast<__mmask32>((uint64_t{1} << left) - 1), from + 32 * v);
  }
  const __m512i lanes = _mm512_set_epi16(31, 30, 29, 28, 27, 26, 25, 24, 23, 22, 21, 20, 19, 18, 17, 16, 15, 14, 13, 12,
                                         11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  __m512i place = _mm512_mullo_epi16(lanes, _mm512_set1_epi16(static_cast<int16_t>(taps)));
  for (int64_t t = 0; t < taps; ++t, to += to_rs) {
    __m512i row = _mm512_setzero_si512();
    const __m512i which = _mm512_srli_epi16(place, 5);
    for (int64_t v = 0; v < taps; ++v) {
      const __mmask32 mask = _mm512_cmpeq_epi16_mask(which, _mm512_set1_epi16(static_cast<int16_t>(v)));
      row = _mm512_mask_permutexvar_epi16(row, mask, place, line[v]);
    }
    _mm512_storeu_si512(to, row);
    place = _mm512_add_epi16(place, _mm512_set1_epi16(1));
  }
}

// One panel of lanes [lane, lane + lanes), lanes <= 32, with all taps. The channels of each tap are padded to `padded`.
inline void pack_tap_panel(const ConvWeights<bf16_t>& s, int64_t lane, int lanes, int64_t padded, amx_b* to) {
  constexpr int W = 32, kStep = 2;
  const int64_t taps = s.tap_count;
  const bf16_t* const w = s.w + lane * s.lane_stride;
  if (s.feature_stride != 0 && s.channels == padded)
    return pack_weights<amx_b, bf16_t, W>(s, lane, lanes, 0, taps * padded, to, 0);
  const bool all_taps = taps == s.kernel[0] * s.kernel[1] * s.kernel[2];
  const bool of_lanes = s.lane_stride == taps, of_channels = s.channel_stride == taps;
  if (all_taps && s.tap_stride == 1 && taps <= kSplitTaps && (of_lanes || of_channels)) {
    alignas(64) bf16_t rows[kSplitTaps * W * 32];
    for (int64_t c = 0; c < s.channels; c += 32) {
      const int count = static_cast<int>(smaller<int64_t>(32, s.channels - c));
      const bf16_t* const from = w + c * s.channel_stride;
      if (of_channels)
        for (int l = 0; l < lanes; ++l) split_taps(from + l * s.lane_stride, count, taps, rows + l * 32, W * 32);
      else
        for (int k = 0; k < count; ++k) split_taps(from + k * s.channel_stride, lanes, taps, rows + k * 32, W * 32);
      for (int64_t t = 0; t < taps; ++t) {
        amx_b* const panel = to + (t * padded + c) / kStep * W;
        if (of_channels)
          pack_along_k<amx_b, bf16_t, W>(rows + t * W * 32, 32, lanes, count, panel);
        else
          pack_along_lanes<amx_b, bf16_t, W>(rows + t * W * 32, 32, lanes, count, panel, 0);
        pad_panel<amx_b, W, kStep>(panel, count);
      }
    }
    return;
  }
  TapCursor tap(s.taps, 0);
  for (int64_t t = 0; t < taps; ++t, tap.advance(s.taps)) {
    amx_b* const panel = to + t * padded / kStep * W;
    if (s.lane_stride == 1) {
      pack_along_lanes<amx_b, bf16_t, W>(w + tap_place(s, tap) * s.tap_stride, s.channel_stride, lanes, s.channels,
                                         panel, 0);
      pad_panel<amx_b, W, kStep>(panel, s.channels);
    } else {
      pack_weights<amx_b, bf16_t, W>(s, lane, lanes, t * s.channels, s.channels, panel, 0);
    }
  }
}
#endif
