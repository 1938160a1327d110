// The weights of a convolution as the operand that meets Patches: in the order of their features, and of the taps that
// take part.

// The weights that a product meets: lane l (an output of the product), channel c and a tap at
// w + l * lane_stride + c * channel_stride + tap_stride * (the tap's place in the kernel), features in the order of
// the patches that they are multiplied with.
template <class T>
struct ConvWeights {
  const T* w;
  bool channels_inner;
  int64_t channels, lane_stride, channel_stride, tap_stride;
  int64_t kernel[3];
  TapRange taps[3];
  int64_t tap_count;
  int64_t feature_stride;  // elements between features, 0 where that is not one number

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

// Element k of a lane, counted in the order of features.
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

// As pack() of a Source. Runs of all panels are read before the next k: they lie side by side.
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
