// Depthwise int8 convolutions: each channel has one filter of its own.
//
// VNNI: of each column of taps, four neighbours along the height are interleaved to groups of 32 bits, which VPDPBUSD
// multiplies. Else in float32, in which these sums are exact.
#pragma once

#include "epilogue.inl"
#include "input.inl"

constexpr int64_t kMostDepthwiseTaps = 512;  // whose sums are below 2^24

inline bool is_int8_depthwise(const ConvGeometry& g) {
  return g.groups > 1 && g.groups == g.in_channels && g.groups == g.out_channels &&
         g.kernel[0] * g.kernel[1] * g.kernel[2] <= kMostDepthwiseTaps && g.kernel[0] == 1;
}

// Packed weights: block after block of kDepthwiseBlock channels.
#if defined(FASTOPS_HAS_AVX512_BF16)
constexpr int kDepthwiseBlock = 64;

inline int64_t depthwise_column(const ConvGeometry& g) { return ceil_div(g.kernel[1], 4) * 4; }  // taps, filled up
inline int64_t depthwise_block_bytes(const ConvGeometry& g) {
  return kDepthwiseBlock * (depthwise_column(g) * g.kernel[2] + static_cast<int64_t>(sizeof(int32_t)));
}
// Column after column of taps; in each, group after group; in each, the channels as `interleave` has them. Then what
// the sums start with.
inline void pack_depthwise(const ConvInt8Forward& call, const int8_t* w, int64_t block, int8_t* packed) {
  const ConvGeometry& g = call.geometry;
  const int64_t taps = g.kernel[1] * g.kernel[2], column = depthwise_column(g);
  packed += block * depthwise_block_bytes(g);
  int32_t* const starts = reinterpret_cast<int32_t*>(packed + kDepthwiseBlock * column * g.kernel[2]);
  for (int64_t place = 0; place < kDepthwiseBlock; ++place) {
    // Vector `place / 16` has 4 channels of each 16.
    const int64_t vector = place / 16, quarter = place % 16 / 4,
                  channel = block * 64 + 16 * quarter + 4 * vector + place % 4;
    int32_t sum = 0;
    for (int64_t t = 0; t < g.kernel[2]; ++t)
      for (int64_t s = 0; s < column; ++s) {
        const int8_t weight =
            s < g.kernel[1] && channel < g.out_channels ? w[channel * taps + s * g.kernel[2] + t] : int8_t{0};
        packed[(t * column / 4 + s / 4) * 256 + place * 4 + s % 4] = weight;
        sum += weight;
      }
    starts[place] = -call.x_zero * sum;
  }
}

// Of four rows of 64 bytes, the groups of 4: vector j has channels 4 j to 4 j + 3 of each 16.
inline __attribute__((always_inline)) void interleave(const __m512i (&row)[4], __m512i (&to)[4]) {
  const __m512i low = _mm512_unpacklo_epi8(row[0], row[1]), high = _mm512_unpackhi_epi8(row[0], row[1]);
  const __m512i low2 = _mm512_unpacklo_epi8(row[2], row[3]), high2 = _mm512_unpackhi_epi8(row[2], row[3]);
  to[0] = _mm512_unpacklo_epi16(low, low2);
  to[1] = _mm512_unpackhi_epi16(low, low2);
  to[2] = _mm512_unpacklo_epi16(high, high2);
  to[3] = _mm512_unpackhi_epi16(high, high2);
}
// Vectors of 16 channels as `interleave` has them, and back: the 4 x 4 quarters are transposed.
inline void transpose_quarters(const __m512i (&from)[4], __m512i (&to)[4]) {
  const __m512i a = _mm512_shuffle_i32x4(from[0], from[1], 0x44), b = _mm512_shuffle_i32x4(from[0], from[1], 0xee);
  const __m512i c = _mm512_shuffle_i32x4(from[2], from[3], 0x44), d = _mm512_shuffle_i32x4(from[2], from[3], 0xee);
  to[0] = _mm512_shuffle_i32x4(a, c, 0x88);
  to[1] = _mm512_shuffle_i32x4(a, c, 0xdd);
  to[2] = _mm512_shuffle_i32x4(b, d, 0x88);
  to[3] = _mm512_shuffle_i32x4(b, d, 0xdd);
}

// A row of x at a block's first channel; outside of the image zero points, again and again.
struct DepthwiseLine {
  const uint8_t* x;
  int64_t pitch;  // bytes from position to position
};

// A row of outputs of a block of channels.
struct DepthwiseRow {
  const Bound<ConvInt8Forward>* args;
  const Int8Epilogue* epilogue;
  const DepthwiseLine* lines;  // of the taps, filled up to whole groups
  const uint8_t* zeros;
  int64_t width, origin;  // of a row of x; tap 0 of output 0
  const int8_t* w;
  const int32_t* starts;
  int64_t position, k;  // of the first element of y
  int channels;
};

// Adds position `at` of the lines, each of a tap, to the sums.
inline void add_column(const DepthwiseLine* lines, const uint8_t* outside, int64_t at, int64_t groups, __mmask64 mask,
                       const int8_t* w, __m512i (&sums)[4]) {
  for (int64_t group = 0; group < groups; ++group, w += 256) {
    __m512i taps[4], x[4];
#pragma GCC unroll 4
    for (int s = 0; s < 4; ++s) {
      const DepthwiseLine& line = lines[4 * group + s];
      taps[s] = _mm512_maskz_loadu_epi8(mask, outside != nullptr ? outside : line.x + at * line.pitch);
    }
    interleave(taps, x);
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) sums[j] = _mm512_dpbusd_epi32(sums[j], x[j], _mm512_loadu_si512(w + 64 * j));
  }
}

// What the sums of a row become y with, in the order of the sums.
struct alignas(64) DepthwiseScales {
  float multiplier[64], offset[64];
};

// y of output `out` of the row. plain: f is the identity, y uint8, and there is no residual.
template <bool plain>
inline __attribute__((always_inline)) void finish_output(const DepthwiseRow& row, int64_t out, __mmask64 mask,
                                                         const __m512i (&sums)[4], const DepthwiseScales& scales,
                                                         uint8_t* y, __m512 high, __m512i low) {
  if constexpr (!plain) {
    __m512i in_order[4];
    transpose_quarters(sums, in_order);
    alignas(64) int32_t values[64];
    for (int j = 0; j < 4; ++j) _mm512_store_si512(values + 16 * j, in_order[j]);
    row.epilogue->finish([&](int v) { return float_of_sums(values + 16 * v); }, row.position + out, row.k,
                         row.channels);
    return;
  }
  __m512i levels[4];
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    __m512 value = _mm512_mul_ps(_mm512_cvtepi32_ps(sums[j]), _mm512_load_ps(scales.multiplier + 16 * j));
    value = _mm512_add_ps(value, _mm512_load_ps(scales.offset + 16 * j));
    // NaN, and what is too low for 32 bits, become the lowest integer.
    levels[j] = _mm512_cvtps_epi32(_mm512_min_ps(high, value));
  }
  const __m512i packed =
      _mm512_packus_epi16(_mm512_packs_epi32(levels[0], levels[1]), _mm512_packs_epi32(levels[2], levels[3]));
  _mm512_mask_storeu_epi8(y, mask, _mm512_max_epu8(packed, low));
}

// Column `at` of three lines, interleaved.
inline __attribute__((always_inline)) void load_column(const DepthwiseRow& row, const DepthwiseLine (&line)[3],
                                                       int64_t at, __mmask64 mask, __m512i (&x)[4]) {
  const bool inside = static_cast<uint64_t>(at) < static_cast<uint64_t>(row.width);
  const __m512i taps[4] = {_mm512_maskz_loadu_epi8(mask, inside ? line[0].x + at * line[0].pitch : row.zeros),
                           _mm512_maskz_loadu_epi8(mask, inside ? line[1].x + at * line[1].pitch : row.zeros),
                           _mm512_maskz_loadu_epi8(mask, inside ? line[2].x + at * line[2].pitch : row.zeros),
                           _mm512_setzero_si512()};
  interleave(taps, x);
}

// A row of a kernel of 3 x 3 whose columns are neighbours. Each column of x is interleaved once, for all outputs that
// read it; their sums are in registers, as long as no lambda captures the arrays (GCC 12).
template <int step, bool plain>
__attribute__((noinline)) void depthwise_row_3x3(const DepthwiseRow& row, const DepthwiseScales& scales) {
  const __mmask64 mask = row.channels == 64 ? ~__mmask64{0} : (__mmask64{1} << row.channels) - 1;
  const Bound<ConvInt8Forward>& args = *row.args;
  const int64_t outputs = args.geometry.out[2], y_pitch = args.geometry.out_channels;
  const __m512 high = _mm512_set1_ps(static_cast<float>(args.y_high));
  const __m512i low = _mm512_set1_epi8(static_cast<char>(args.y_low));
  const int32_t* const starts = row.starts;
  uint8_t* y = static_cast<uint8_t*>(args.y) + (plain ? row.position * y_pitch + row.k : 0);
  const DepthwiseLine line[3] = {row.lines[0], row.lines[1], row.lines[2]};
  __m512i w[3][4], x[4], sums[4], next[4];
  for (int t = 0; t < 3; ++t)
    for (int j = 0; j < 4; ++j) w[t][j] = _mm512_loadu_si512(row.w + t * 256 + 64 * j);
  // Of the output whose last column comes next, and with step 1 of the one after it.
  load_column(row, line, row.origin, mask, x);
  for (int j = 0; j < 4; ++j)
    next[j] = sums[j] = _mm512_dpbusd_epi32(_mm512_loadu_si512(starts + 16 * j), x[j], w[0][j]);
  if constexpr (step == 1) {
    load_column(row, line, row.origin + 1, mask, x);
    for (int j = 0; j < 4; ++j) {
      sums[j] = _mm512_dpbusd_epi32(sums[j], x[j], w[1][j]);
      next[j] = _mm512_dpbusd_epi32(_mm512_loadu_si512(starts + 16 * j), x[j], w[0][j]);
    }
  }
  int64_t at = row.origin + 2;
  for (int64_t out = 0; out < outputs; ++out, at += step, y += plain ? y_pitch : 0) {
    if constexpr (step == 2) {
      load_column(row, line, at - 1, mask, x);
      for (int j = 0; j < 4; ++j) sums[j] = _mm512_dpbusd_epi32(sums[j], x[j], w[1][j]);
    }
    load_column(row, line, at, mask, x);
    for (int j = 0; j < 4; ++j) sums[j] = _mm512_dpbusd_epi32(sums[j], x[j], w[2][j]);
    finish_output<plain>(row, out, mask, sums, scales, y, high, low);
    for (int j = 0; j < 4; ++j) {
      if constexpr (step == 1) sums[j] = _mm512_dpbusd_epi32(next[j], x[j], w[1][j]);
      next[j] = _mm512_dpbusd_epi32(_mm512_loadu_si512(starts + 16 * j), x[j], w[0][j]);
      if constexpr (step == 2) sums[j] = next[j];
    }
  }
}

// Any other kernel, output after output.
__attribute__((noinline)) void depthwise_row_any(const DepthwiseRow& row, const DepthwiseScales& scales, bool plain) {
  const ConvGeometry& g = row.args->geometry;
  const __mmask64 mask = row.channels == 64 ? ~__mmask64{0} : (__mmask64{1} << row.channels) - 1;
  const int64_t groups = ceil_div(g.kernel[1], 4), y_pitch = g.out_channels;
  const __m512 high = _mm512_set1_ps(static_cast<float>(row.args->y_high));
  const __m512i low = _mm512_set1_epi8(static_cast<char>(row.args->y_low));
  uint8_t* y = static_cast<uint8_t*>(row.args->y) + (plain ? row.position * y_pitch + row.k : 0);
  for (int64_t out = 0; out < g.out[2]; ++out) {
    __m512i sums[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) sums[j] = _mm512_loadu_si512(row.starts + 16 * j);
    for (int64_t t = 0; t < g.kernel[2]; ++t) {
      const int64_t at = out * g.stride[2] + row.origin + t * g.dilation[2];
      const uint8_t* const outside = at < 0 || at >= row.width ? row.zeros : nullptr;
      add_column(row.lines, outside, at, groups, mask, row.w + t * groups * 256, sums);
    }
    if (!plain) {
      finish_output<false>(row, out, mask, sums, scales, y, high, low);
      continue;
    }
    finish_output<true>(row, out, mask, sums, scales, y, high, low);
    y += y_pitch;
  }
}

inline void depthwise_row(const DepthwiseRow& row) {
  const ConvGeometry& g = row.args->geometry;
  DepthwiseScales scales;
  const float* const from[2] = {row.args->multiplier + row.k, row.args->offset + row.k};
  float* const to[2] = {scales.multiplier, scales.offset};
  for (int i = 0; i < 2; ++i) {
    __m512i v[4], quarters[4];
    for (int j = 0; j < 4; ++j)
      v[j] = _mm512_maskz_loadu_epi32(first16(smaller(larger(row.channels - 16 * j, 0), 16)),
                                      from[i] + smaller(16 * j, row.channels));
    transpose_quarters(v, quarters);
    for (int j = 0; j < 4; ++j) _mm512_store_si512(to[i] + 16 * j, quarters[j]);
  }
  const bool plain = row.epilogue->simple() && !row.args->with_residual;
  const bool three = g.kernel[1] == 3 && g.kernel[2] == 3 && g.dilation[2] == 1;
  if (three && g.stride[2] == 1)
    plain ? depthwise_row_3x3<1, true>(row, scales) : depthwise_row_3x3<1, false>(row, scales);
  else if (three && g.stride[2] == 2)
    plain ? depthwise_row_3x3<2, true>(row, scales) : depthwise_row_3x3<2, false>(row, scales);
  else
    depthwise_row_any(row, scales, plain);
}

inline size_t depthwise_bytes(const ConvGeometry& g) {
  return static_cast<size_t>(ceil_div(g.out_channels, kDepthwiseBlock) * depthwise_block_bytes(g));
}

#else
constexpr int kDepthwiseBlock = Int8Epilogue::kMost;

// Tap after tap of all channels as floats, then the sums of the weights times x_zero.
inline size_t depthwise_bytes(const ConvGeometry& g) {
  return static_cast<size_t>((g.kernel[1] * g.kernel[2] + 1) * g.out_channels) * sizeof(float);
}
inline void pack_depthwise(const ConvInt8Forward& call, const int8_t* w, int64_t block, int8_t* packed) {
  const ConvGeometry& g = call.geometry;
  const int64_t taps = g.kernel[1] * g.kernel[2];
  float* const to = reinterpret_cast<float*>(packed);
  for (int64_t k = block * kDepthwiseBlock; k < smaller((block + 1) * kDepthwiseBlock, g.out_channels); ++k) {
    int32_t sum = 0;
    for (int64_t r = 0; r < taps; ++r) {
      to[r * g.out_channels + k] = static_cast<float>(w[k * taps + r]);
      sum += w[k * taps + r];
    }
    to[taps * g.out_channels + k] = static_cast<float>(call.x_zero * sum);
  }
}

// Channels [k, k + channels) of one output, whose taps are at places[r stride].
inline void depthwise_output(const Bound<ConvInt8Forward>& args, const Int8Epilogue& epilogue,
                             const uint8_t* const* places, int64_t stride, int64_t taps, const float* w,
                             int64_t position, int64_t k, int channels) {
  const int64_t all = args.geometry.out_channels;
  alignas(64) float sums[kDepthwiseBlock];
  for (int j = 0; j < channels; j += VecF::size) {
    const int count = smaller(VecF::size, channels - j);
    const auto weights = [&](int64_t r) {
      const float* const from = w + r * all + k + j;
      return count == VecF::size ? VecF::load(from) : VecF::load(from, count);
    };
    VecF sum = -weights(taps);
    for (int64_t r = 0; r < taps; ++r) {
      const uint8_t* const x = places[r * stride] + k + j;
      sum = sum + (count == VecF::size ? load_levels(x) : load_levels(x, count)) * weights(r);
    }
    sum.store(sums + j);
  }
  epilogue.finish([&](int v) { return VecF::load(sums + v * VecF::size); }, position, k, channels);
}
#endif
