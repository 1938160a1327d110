// Channels first, bfloat16 by AMX: the product without panels of the image (conv_gemm_rows.inl). The copy has a plane
// for every two channels, whose elements are what a tile of B holds: two neighbours in k. A tap's tile is 16 such
// planes from any column on. Channels are padded with planes of zeros to whole tiles.
#if defined(FASTOPS_HAS_AMX)

// The elements [begin, end) of two rows, side by side, in 32-bit elements of `to`, and zeros in the rest of `width`
// columns, whole vectors of which may be written. low[i] is column i; null is a row of zeros.
inline void interleave_rows(const bf16_t* low, const bf16_t* high, int64_t begin, int64_t end, int64_t width,
                            uint32_t* to) {
  const __m512i order = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37,
                                         5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
  const __m512i upper = _mm512_add_epi16(order, _mm512_set1_epi16(16));
  for (int64_t i = 0; i < width; i += 32) {
    const int64_t first = smaller<int64_t>(larger<int64_t>(begin - i, 0), 32);
    const int64_t last = smaller<int64_t>(larger<int64_t>(end - i, first), 32);
    const __mmask32 mask = static_cast<__mmask32>((uint64_t{1} << last) - (uint64_t{1} << first));
    const __m512i a = low != nullptr ? _mm512_maskz_loadu_epi16(mask, low + i) : _mm512_setzero_si512();
    const __m512i b = high != nullptr ? _mm512_maskz_loadu_epi16(mask, high + i) : _mm512_setzero_si512();
    _mm512_storeu_si512(to + i, _mm512_permutex2var_epi16(a, order, b));
    if (i + 16 < width) _mm512_storeu_si512(to + i + 16, _mm512_permutex2var_epi16(a, upper, b));
  }
}

// The copy for output rows from p1 on and columns from p2 on of the slice (image, p0).
inline void copy_image_pairs(const Patches<bf16_t>& s, const RowsPlan& plan, int64_t image, const int64_t* p,
                             uint32_t* copy) {
  constexpr int64_t kChunk = 256;
  const int64_t first = p[2] * s.step[2] + plan.low[2];
  const int64_t begin = smaller(larger<int64_t>(-first, 0), plan.copy_cols);
  const int64_t end = larger(begin, smaller(s.size[2] - first, plan.copy_cols));
  for (int64_t slab = 0; slab < s.taps[0].count; ++slab)
    for (int64_t row = 0; row < plan.copy_rows; ++row) {
      uint32_t* to = copy + slab * plan.slab + row * plan.row;
      const int64_t q0 = p[0] * s.step[0] + s.taps[0].offset + slab * s.taps[0].offset_step;
      const int64_t q1 = p[1] * s.step[1] + plan.low[1] + row;
      const bool inside = q0 >= 0 && q0 < s.size[0] && q1 >= 0 && q1 < s.size[1] && begin < end;
      int64_t at = image * s.batch_stride + q0 * s.stride[0] + q1 * s.stride[1] + first;
      for (int64_t pair = 0; pair < plan.pairs; ++pair, to += plan.channel, at += 2 * s.channel_stride) {
        const int64_t channels = inside ? smaller<int64_t>(2, s.channels - 2 * pair) : 0;
        if (channels <= 0 || s.derivative == nullptr) {
          const bf16_t* const low = channels > 0 ? s.x + at : nullptr;
          interleave_rows(low, channels > 1 ? s.x + at + s.channel_stride : nullptr, begin, end, plan.copy_cols, to);
          continue;
        }
        bf16_t rows[2][kChunk];
        for (int64_t i = 0; i < plan.copy_cols; i += kChunk) {
          const int64_t from = larger<int64_t>(begin - i, 0), until = smaller(end - i, kChunk);
          for (int64_t c = 0; c < channels && from < until; ++c)
            copy_pixels(s, at + c * s.channel_stride + i + from, until - from, rows[c] + from);
          interleave_rows(rows[0], channels > 1 ? rows[1] : nullptr, from, until, smaller(kChunk, plan.copy_cols - i),
                          to + i);
        }
      }
    }
}

// 2 x 2 tiles of C, or 1 x 4; taps[t] is where tap t reads in the copy. Weights lie tap by tap, `chunks` tiles of k
// each; of the copy, a chunk of channels is used for all taps in turn, so that it is read from L1.
template <int Height>
__attribute__((noinline)) void multiply_pairs(int64_t chunks, const amx_a* a, const uint32_t* b, int64_t plane,
                                              const int64_t* taps, int64_t tap_count, float* sums) {
  constexpr int64_t kAStride = 64, kCStride = 4 * kPairsColumns;
  constexpr int64_t kAChunk = 32 * kTilePairs;
  const int64_t stride = 4 * plane;
  memory_fence_for_compiler();
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t chunk = 0; chunk < chunks; ++chunk, a += kAChunk, b += 16 * plane) {
    const amx_a* w = a;
    for (int64_t t = 0; t < tap_count; ++t, w += chunks * kAChunk) {
      const uint32_t* const at = b + taps[t];
      _tile_loadd(4, w, kAStride);
      _tile_loadd(6, at, stride);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(7, at + 16, stride);
      _tile_dpbf16ps(1, 4, 7);
      if constexpr (Height == 2) {
        _tile_loadd(5, w + 16 * kTilePairs, kAStride);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      } else {
        _tile_loadd(6, at + 32, stride);
        _tile_dpbf16ps(2, 4, 6);
        _tile_loadd(7, at + 48, stride);
        _tile_dpbf16ps(3, 4, 7);
      }
    }
  }
  constexpr int64_t kDown = 16 * kPairsColumns;
  _tile_stored(0, sums, kCStride);
  _tile_stored(1, sums + 16, kCStride);
  _tile_stored(2, sums + (Height == 2 ? kDown : 32), kCStride);
  _tile_stored(3, sums + (Height == 2 ? kDown + 16 : 48), kCStride);
  memory_fence_for_compiler();
}

// The product of a job whose copy is ready: columns run on through the padding into the next row.
inline void conv_pairs(const ConvProduct<bf16_t>& g, const RowsPlan& plan, const amx_a* w, int64_t w_panel, int64_t o0,
                       int64_t o1, int64_t n0, int64_t rows, int64_t cols, const int64_t* taps, const uint32_t* copy) {
  alignas(64) float sums[kMaxTile * kPairsColumns];
  const int64_t length = (rows - 1) * plan.copy_cols + cols, pitch = plan.copy_cols;
  for (int64_t o = o0; o < o1; o += kMaxTile, w += w_panel) {
    const int outputs = static_cast<int>(smaller<int64_t>(kMaxTile, o1 - o));
    const int64_t width = outputs > 16 ? 32 : kPairsColumns;
    for (int64_t m = 0; m < length; m += width) {
      if (outputs > 16)
        multiply_pairs<2>(plan.pairs / 16, w, copy + m, plan.channel, taps, g.patches.tap_count, sums);
      else
        multiply_pairs<1>(plan.pairs / 16, w, copy + m, plan.channel, taps, g.patches.tap_count, sums);
      for (int64_t part = m; part < smaller(m + width, length); part += kMaxTile)
        for_stored(part, smaller(part + kMaxTile, length), pitch, cols, n0, g.patches.grid[2],
                   [&](int64_t first, int64_t position, int count) {
                     finish_tile(g, sums + (part - m) + first, kPairsColumns, o, outputs, position, count);
                   });
    }
  }
}
#endif
