// Products of 8-bit integers by a matrix unit, TDPBUSD on 2 x 2 tiles of 16 x 16 sums. Rows of x are read where they
// lie, if the taps of neighbours have the same distance everywhere; else their taps are gathered, 32 rows at a time.
// The vector units finish the tile before while the matrix unit multiplies.
//
// Weights are panels of kInt8Nr columns, as linear_int8/cpu/int8_products.inl packs them. Behind each, what the sums
// start with: -x_zero times the sum of the column's weights.
#pragma once

#include "../../linear_int8/cpu/int8_products.inl"
#include "epilogue.inl"
#include "input.inl"

#if defined(FASTOPS_HAS_AMX)

// Configures the tile registers as configure_tiles does, with `rows` rows for both tiles of x.
inline void configure_halves(int rows) {
  const uint8_t n = static_cast<uint8_t>(rows);
  struct alignas(64) {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16];
  } config = {.rows = {n, n, n, n, n, n, 16, 16}};
  // GCC believes that the instruction reads 8 bytes, and may drop the stores to the rest of the struct.
  __asm__ volatile("" : : "r"(&config) : "memory");
  _tile_loadconfig(&config);
}

// The sums of a tile that wait to become y.
class WaitingSums {
 public:
  WaitingSums(const Bound<ConvInt8Forward>& args, const Int8Epilogue& epilogue)
      : args_(args),
        epilogue_(epilogue),
        simple_(epilogue.simple()),
        low_(_mm512_set1_epi8(static_cast<char>(args.y_low))),
        high_(_mm512_set1_ps(static_cast<float>(args.y_high))),
        residual_scale_(_mm512_set1_ps(args.residual_scale)) {}
  WaitingSums(const WaitingSums&) = delete;
  WaitingSums& operator=(const WaitingSums&) = delete;

  // Row r is output positions[r], or none where that is negative, as behind an odd number of rows; channels [k, k +
  // columns).
  void set(const int32_t* sums, const int64_t* positions, int64_t k, int rows, int columns) {
    sums_ = sums;
    positions_ = positions;
    k_ = k;
    rows_ = rows;
    columns_ = columns;
    done_ = 0;
    mask_ = columns == kInt8Nr ? ~__mmask32{0} : (__mmask32{1} << columns) - 1;
    for (int v = 0; v < 2; ++v) {
      const __mmask16 part = static_cast<__mmask16>(mask_ >> (16 * v));
      multiplier_[v] = _mm512_maskz_loadu_ps(part, args_.multiplier + k + 16 * v);
      offset_[v] = _mm512_maskz_loadu_ps(part, args_.offset + k + 16 * v);
    }
  }

  // Rows before this one, an even number, go to y.
  inline __attribute__((always_inline)) void finish(int end) {
    const int last = smaller(end, rows_);
    if (!simple_) {
      for (; done_ < last; ++done_)
        if (positions_[done_] >= 0)
          epilogue_.finish([&](int v) { return float_of_sums(sums_ + done_ * kInt8Nr + 16 * v); }, positions_[done_],
                           k_, columns_);
      return;
    }
    for (; done_ < last; done_ += 2) finish_pair();
  }
  void finish() { finish(kInt8Mr); }

 private:
  // Two rows: y is a uint8 tensor and f the identity.
  inline __attribute__((always_inline)) void finish_pair() {
    const int64_t channels = args_.geometry.out_channels;
    const int64_t position[2] = {positions_[done_], positions_[done_ + 1]};
    if (position[0] < 0 && position[1] < 0) return;
    __m512i levels[4];
#pragma GCC unroll 2
    for (int r = 0; r < 2; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < 2; ++v) {
        __m512 value = _mm512_cvtepi32_ps(_mm512_load_si512(sums_ + (done_ + r) * kInt8Nr + 16 * v));
        value = _mm512_add_ps(_mm512_mul_ps(value, multiplier_[v]), offset_[v]);
        if (args_.with_residual) {
          const __mmask16 part = position[r] < 0 ? __mmask16{0} : static_cast<__mmask16>(mask_ >> (16 * v));
          const __m128i added = _mm_maskz_loadu_epi8(part, args_.residual + position[r] * channels + k_ + 16 * v);
          value = _mm512_add_ps(value, _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(added)), residual_scale_));
        }
        // NaN, and what is too low for 32 bits, become the lowest integer.
        levels[2 * r + v] = _mm512_cvtps_epi32(_mm512_min_ps(high_, value));
      }
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const __m512i words =
        _mm512_packus_epi16(_mm512_packs_epi32(levels[0], levels[1]), _mm512_packs_epi32(levels[2], levels[3]));
    const __m512i bytes = _mm512_max_epu8(_mm512_permutexvar_epi32(order, words), low_);
    uint8_t* const y = static_cast<uint8_t*>(args_.y) + k_;
    if (position[0] >= 0) _mm256_mask_storeu_epi8(y + position[0] * channels, mask_, _mm512_castsi512_si256(bytes));
    if (position[1] >= 0)
      _mm256_mask_storeu_epi8(y + position[1] * channels, mask_, _mm512_extracti64x4_epi64(bytes, 1));
  }

  const Bound<ConvInt8Forward>& args_;
  const Int8Epilogue& epilogue_;
  const bool simple_;
  const __m512i low_;
  const __m512 high_, residual_scale_;
  const int32_t* sums_ = nullptr;
  const int64_t* positions_ = nullptr;
  int64_t k_ = 0;
  int rows_ = 0, columns_ = 0, done_ = 0;
  __mmask32 mask_ = 0;
  __m512 multiplier_[2], offset_[2];
};

// What is prefetched while a tile is multiplied: so many lines with every chunk.
struct Int8Ahead {
  const uint8_t* at[3] = {};  // the next rows of x, of the residual and of y
  int lines[3] = {};
};

// sums[32][32] = starts + A B; a[h]: the tile of half h, with rows `stride` bytes apart, whose chunk c is at
// offsets[c].
template <bool two_rows, bool two_cols>
__attribute__((noinline)) void multiply_matrix(int64_t chunks, const uint8_t* const* a, int64_t stride,
                                               const int64_t* offsets, const Int8B* b, const int32_t* starts,
                                               int32_t* sums, WaitingSums& waiting, Int8Ahead ahead) {
  constexpr int kStride = 4 * kInt8Nr;
  memory_fence_for_compiler();
  _tile_loadd(0, starts, 0);
  if (two_cols) _tile_loadd(1, starts + 16, 0);
  if (two_rows) _tile_loadd(2, starts, 0);
  if (two_rows && two_cols) _tile_loadd(3, starts + 16, 0);
  const int step = static_cast<int>(round_up(ceil_div(kInt8Mr, chunks), 2));
  for (int64_t c = 0; c < chunks; ++c, b += kInt8Nr * kInt8Chunk) {
    _tile_loadd(6, b, kStride);
    _tile_loadd(4, a[0] + offsets[c], stride);
    _tile_dpbusd(0, 4, 6);
    if (two_cols) {
      _tile_loadd(7, b + 64, kStride);
      _tile_dpbusd(1, 4, 7);
    }
    if (two_rows) {
      _tile_loadd(5, a[1] + offsets[c], stride);
      _tile_dpbusd(2, 5, 6);
      if (two_cols) _tile_dpbusd(3, 5, 7);
    }
    waiting.finish(static_cast<int>(c + 1) * step);
    for (int i = 0; i < 3; ++i)
      for (int line = 0; line < ahead.lines[i]; ++line, ahead.at[i] += 64) _mm_prefetch(ahead.at[i], _MM_HINT_T0);
  }
  _tile_stored(0, sums, kStride);
  if (two_cols) _tile_stored(1, sums + 16, kStride);
  if (two_rows) _tile_stored(2, sums + 16 * kInt8Nr, kStride);
  if (two_rows && two_cols) _tile_stored(3, sums + 16 * kInt8Nr + 16, kStride);
  memory_fence_for_compiler();
}

// ---- the pieces of a sum

// Neighbours along a row of taps are one piece, where they lie side by side.
struct Int8Pieces {
  int64_t across, count, length, padded;               // taps of a piece; pieces; their bytes; the same in whole chunks
  Int8Pieces(const ConvGeometry& g, int64_t channels)  // channels: of a group, as they lie in x or in its copy
      : across(g.groups == 1 && g.dilation[2] == 1 ? g.kernel[2] : 1),
        count(g.kernel[0] * g.kernel[1] * (g.kernel[2] / across)),
        length(across * channels),
        padded(round_up(length, kInt8Chunk)) {}
  int64_t chunks() const { return count * (padded / kInt8Chunk); }
  // Of each chunk, from a position's first tap.
  void offsets(const ConvGeometry& g, const Int8Input& in, int64_t* to) const {
    for (int64_t p = 0; p < count; ++p) {
      const int64_t t = across > 1 ? 0 : p % g.kernel[2], rest = across > 1 ? p : p / g.kernel[2];
      const int64_t r = rest / g.kernel[1] * g.dilation[0], s = rest % g.kernel[1] * g.dilation[1];
      const int64_t at = ((r * in.extent[1] + s) * in.extent[2] + t * g.dilation[2]) * in.pitch;
      for (int64_t c = 0; c < padded; c += kInt8Chunk) *to++ = at + c;
    }
  }
};

// ---- lines

constexpr int kHalf = 16;
// Rows of outputs up to this long are read as planes.
constexpr int64_t kShortRow = 8;

struct Int8Lines {
  int64_t length, count;  // positions of a line, with what is dropped; lines
  int64_t halves;         // of a line
  int rows;               // of each of them; the last begins earlier, so that it ends where the line does
  bool all, planes;

  Int8Lines() = default;
  Int8Lines(const ConvGeometry& g, const Int8Input& in) : all(true), planes(false) {
    const int64_t rows_of_all = g.batch * g.out[0] * g.out[1];
    for (int i = 0; i < 3; ++i)
      all = all && g.kernel[i] == 1 && in.extent[i] == g.out[i] && (g.stride[i] == 1 || g.out[i] == 1);
    if (all) {
      length = rows_of_all * g.out[2];
      count = 1;
    } else if (g.out[2] <= kShortRow && g.stride[1] == 1 && g.stride[2] == 1) {
      planes = true;
      length = (g.out[1] - 1) * in.extent[2] + g.out[2];
      count = g.batch * g.out[0];
    } else {
      length = g.out[2];
      count = rows_of_all;
    }
    halves = ceil_div(length, kHalf);
    rows = static_cast<int>(ceil_div(length, halves));
  }
  int64_t all_halves() const { return count * halves; }

  // Where x of half `half` begins, and which outputs its rows are.
  const uint8_t* place(const ConvGeometry& g, const Int8Input& in, const uint8_t* x, int64_t half,
                       int64_t* positions) const {
    for (int r = rows; r < kHalf; ++r) positions[r] = -1;
    const int64_t line = half / halves, from = half % halves * rows, begin = smaller(from, length - rows);
    if (planes) {
      for (int r = 0; r < rows; ++r) {
        const int64_t v = begin + r, row = v / in.extent[2], column = v % in.extent[2];
        positions[r] = v < from || column >= g.out[2] ? -1 : (line * g.out[1] + row) * g.out[2] + column;
      }
    } else {
      for (int r = 0; r < rows; ++r) positions[r] = begin + r < from ? -1 : line * length + begin + r;
    }
    if (all) return x + begin * in.pitch;
    const int64_t h = planes ? 0 : line % g.out[1], plane = planes ? line : line / g.out[1];
    const int64_t row =
        (plane / g.out[0] * in.extent[0] + plane % g.out[0] * g.stride[0]) * in.extent[1] + h * g.stride[1];
    return x + (row * in.extent[2] + begin * g.stride[2]) * in.pitch;
  }
};

constexpr int64_t kWaitingBytes =
    2 * kInt8Mr * (kInt8Nr * static_cast<int64_t>(sizeof(int32_t)) + static_cast<int64_t>(sizeof(int64_t)));

#endif
