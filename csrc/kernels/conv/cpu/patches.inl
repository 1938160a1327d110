// A convolution is a matrix product, one operand of which is gathered from the image while it is packed ("implicit
// im2col"; Chetlur et al., "cuDNN", 2014). That operand is Patches, a matrix of positions by features. Feature
// (channel, tap) of position p is the element of the channel that the tap reads for p, or zero outside the image.
//
// This file defines Patches and copies blocks of it along the dimension in which memory is contiguous.
#pragma once

#include "../../activation/cpu/rows.inl"
#include "../../common/cpu/common.inl"
#include "../../gemm/cpu/microkernels.inl"

// The taps of a product along one dimension. Tap i < count reads element position * step + offset + i * offset_step of
// the image, and its index in the kernel is first + i * first_step.
struct TapRange {
  int64_t count, offset, offset_step, first, first_step;
};

// Position n is (image, p0, p1, p2) of batch x grid. The order of features is (tap, channel) if channels_inner, else
// (channel, tap).
template <class T>
struct Patches {
  const T* x;
  const T* saved;  // as in Source, in the layout of x
  RowDerivative<T> derivative;
  Activation activation;
  bool channels_inner;
  int64_t channels, batch_stride, channel_stride;
  int64_t size[3], stride[3];  // of the image; strides in elements
  int64_t grid[3], step[3];
  TapRange taps[3];
  int64_t tap_count;
  // There is one tap, with offset 0 and step 1, so nothing has to be gathered. For channels last the batch is the
  // matrix as it is; for channels first every image is, and its positions are a single row.
  bool plain;
};

struct TapCursor {
  int64_t i[3];
  template <class Taps>
  TapCursor(const Taps& taps, int64_t t) {
    i[2] = t % taps[2].count;
    i[1] = t / taps[2].count % taps[1].count;
    i[0] = t / taps[2].count / taps[1].count;
  }
  template <class Taps>
  void advance(const Taps& taps) {  // after the last tap follows the first
    for (int d = 2; d >= 0; --d) {
      if (++i[d] < taps[d].count) return;
      i[d] = 0;
    }
  }
};

struct GridCursor {
  int64_t image, p[3];
  GridCursor(const int64_t* grid, int64_t position) {
    p[2] = position % grid[2];
    position /= grid[2];
    p[1] = position % grid[1];
    position /= grid[1];
    p[0] = position % grid[0];
    image = position / grid[0];
  }
  void advance(const int64_t* grid, int64_t count) {  // within a row, or to the start of the next row
    if ((p[2] += count) < grid[2]) return;
    p[2] = 0;
    if (++p[1] < grid[1]) return;
    p[1] = 0;
    if (++p[0] < grid[0]) return;
    p[0] = 0;
    ++image;
  }
};

template <class T>
inline void copy_run(const T* from, int64_t step, int64_t count, T* to) {
  if (step == 1)
    for (int64_t i = 0; i < count; ++i) to[i] = from[i];
  else
    for (int64_t i = 0; i < count; ++i) to[i] = from[i * step];
}
template <class T>
inline void zero_run(int64_t count, T* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = T{};
}

// The most positions that are copied at a time.
constexpr int kPatchChunk = 64;

// `count` positions in one row of the grid, which are columns [first, first + count) of a block.
struct PatchRun {
  int64_t base, p[3];
  int first, count;
};
// The elements that one tap reads for a run: from x + at on, `step` elements apart.
struct PatchPiece {
  int64_t at;
  int first, count;
};

template <class T>
inline int patch_runs(const Patches<T>& s, int64_t position, int count, PatchRun* runs) {
  GridCursor cursor(s.grid, position);
  int n = 0;
  for (int done = 0; done < count; ++n) {
    const int length = static_cast<int>(smaller<int64_t>(s.grid[2] - cursor.p[2], count - done));
    runs[n] = {cursor.image * s.batch_stride, {cursor.p[0], cursor.p[1], cursor.p[2]}, done, length};
    cursor.advance(s.grid, length);
    done += length;
  }
  return n;
}

// The pieces that `tap` reads inside the image; `covered` is the sum of their counts.
template <class T>
inline int patch_pieces(const Patches<T>& s, const TapCursor& tap, const PatchRun* runs, int run_count,
                        PatchPiece* pieces, int* covered) {
  int64_t offset[3];
  for (int d = 0; d < 3; ++d) offset[d] = s.taps[d].offset + tap.i[d] * s.taps[d].offset_step;
  // Columns p with 0 <= p * step + offset < size.
  const int64_t step = s.step[2];
  const int64_t least = offset[2] >= 0 ? 0 : ceil_div(-offset[2], step);
  const int64_t most = offset[2] >= s.size[2] ? 0 : ceil_div(s.size[2] - offset[2], step);
  int n = 0;
  *covered = 0;
  for (int r = 0; r < run_count; ++r) {
    const PatchRun& run = runs[r];
    const int64_t q0 = run.p[0] * s.step[0] + offset[0], q1 = run.p[1] * s.step[1] + offset[1];
    if (q0 < 0 || q0 >= s.size[0] || q1 < 0 || q1 >= s.size[1]) continue;
    const int64_t from = larger(run.p[2], least), to = smaller(run.p[2] + run.count, most);
    if (from >= to) continue;
    pieces[n++] = {run.base + q0 * s.stride[0] + q1 * s.stride[1] + (from * step + offset[2]) * s.stride[2],
                   run.first + static_cast<int>(from - run.p[2]), static_cast<int>(to - from)};
    *covered += static_cast<int>(to - from);
  }
  return n;
}

#if defined(FASTOPS_VEC_AVX512)
using LaneVector = __m512i;
constexpr int kLaneBytes = 64;
template <class T>
constexpr bool kHasLanes = true;

// Loads the lanes that a mask selects. Memory of the other lanes is not accessed.
template <class T>
inline LaneVector load_lanes(LaneVector other, uint32_t mask, const T* p) {
  if constexpr (sizeof(T) == 2)
    return _mm512_mask_loadu_epi16(other, static_cast<__mmask32>(mask), p);
  else if constexpr (sizeof(T) == 4)
    return _mm512_mask_loadu_epi32(other, static_cast<__mmask16>(mask), p);
  else
    return _mm512_mask_loadu_epi64(other, static_cast<__mmask8>(mask), p);
}
template <class T>
inline void store_lanes(LaneVector v, uint32_t mask, T* p) {
  if constexpr (sizeof(T) == 2)
    _mm512_mask_storeu_epi16(p, static_cast<__mmask32>(mask), v);
  else if constexpr (sizeof(T) == 4)
    _mm512_mask_storeu_epi32(p, static_cast<__mmask16>(mask), v);
  else
    _mm512_mask_storeu_epi64(p, static_cast<__mmask8>(mask), v);
}
inline void store_all(LaneVector v, void* p) { _mm512_storeu_si512(p, v); }
inline LaneVector no_lanes() { return _mm512_setzero_si512(); }
// The elements with even indices of two vectors.
template <class T>
inline LaneVector even_lanes(LaneVector low, LaneVector high) {
  if constexpr (sizeof(T) == 2) {
    return _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtepi32_epi16(low)), _mm512_cvtepi32_epi16(high), 1);
  } else if constexpr (sizeof(T) == 4) {
    return _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtepi64_epi32(low)), _mm512_cvtepi64_epi32(high), 1);
  } else {
    return _mm512_permutex2var_epi64(low, _mm512_setr_epi64(0, 2, 4, 6, 8, 10, 12, 14), high);
  }
}
#elif defined(FASTOPS_VEC_AVX2)
// Of 4 and 8 bytes: there are no masked loads of 2. Loops over the elements of each piece take longer: 3x3, 128
// channels of 28x28, step 2, forward 1.41 times as long; 5x5, 64 channels of 32x32, 1.17 times (Zen 3, one thread).
using LaneVector = __m256i;
constexpr int kLaneBytes = 32;
template <class T>
constexpr bool kHasLanes = sizeof(T) >= 4;

// Here the lanes that are selected are zero in `other`.
template <class T>
inline LaneVector load_lanes(LaneVector other, uint32_t mask, const T* p) {
  if constexpr (sizeof(T) == 4)
    return _mm256_or_si256(other, _mm256_maskload_epi32((const int*)p, _mm256_castps_si256(MaskF::from_bits(mask).m)));
  else
    return _mm256_or_si256(other,
                           _mm256_maskload_epi64((const long long*)p, _mm256_castpd_si256(MaskD::from_bits(mask).m)));
}
inline void store_all(LaneVector v, void* p) { _mm256_storeu_si256((__m256i*)p, v); }
inline LaneVector no_lanes() { return _mm256_setzero_si256(); }
template <class T>
inline LaneVector even_lanes(LaneVector low, LaneVector high) {
  LaneVector pairs;  // of both, low and high in turn
  if constexpr (sizeof(T) == 4)
    pairs = _mm256_castps_si256(_mm256_shuffle_ps(_mm256_castsi256_ps(low), _mm256_castsi256_ps(high), 0x88));
  else
    pairs = _mm256_unpacklo_epi64(low, high);
  return _mm256_permute4x64_epi64(pairs, 0xd8);
}
#endif

#if defined(FASTOPS_VEC_AVX512) || defined(FASTOPS_VEC_AVX2)
// Moves bit i of the mask to bit 2 i.
inline uint64_t spread_bits(uint64_t mask) {
  mask = (mask | mask << 16) & 0x0000ffff0000ffffu;
  mask = (mask | mask << 8) & 0x00ff00ff00ff00ffu;
  mask = (mask | mask << 4) & 0x0f0f0f0f0f0f0f0fu;
  mask = (mask | mask << 2) & 0x3333333333333333u;
  return (mask | mask << 1) & 0x5555555555555555u;
}

// The part of a piece in one vector of a row. `at` is the offset from x of the vector's first lane.
struct PatchLanes {
  int64_t at;
  uint64_t mask;
};

// Assembles rows of vectors. Vector v consists of counts[v] pieces, or of Pieces pieces if that is not 0.
template <class T, int Step, int Vectors, int Pieces>
inline void assemble_rows(const PatchLanes* lanes, const int* counts, const T* from, int64_t from_rs, int64_t rows,
                          T* to, int64_t to_rs) {
  constexpr int S = kLaneBytes / static_cast<int>(sizeof(T));
  constexpr uint64_t kAll = (uint64_t{1} << S) - 1;
  for (int64_t r = 0; r < rows; ++r, from += from_rs, to += to_rs) {
#pragma GCC unroll 2
    for (int v = 0; v < Vectors; ++v) {
      LaneVector low = no_lanes(), high = low;
#pragma GCC unroll 2
      for (int i = 0; i < (Pieces > 0 ? Pieces : counts[v]); ++i) {
        const PatchLanes piece = lanes[v * S + i];
        low = load_lanes(low, static_cast<uint32_t>(piece.mask & kAll), from + piece.at);
        if constexpr (Step == 2) high = load_lanes(high, static_cast<uint32_t>(piece.mask >> S), from + piece.at + S);
      }
      store_all(Step == 1 ? low : even_lanes<T>(low, high), to + v * S);
    }
  }
}

// Columns [first, first + Vectors * S) of rows that are assembled from pieces. Lanes are Step (1 or 2) elements apart.
template <class T, int Step, int Vectors>
inline void copy_vectors(const PatchPiece* pieces, int n, int first, const T* from, int64_t from_rs, int64_t rows,
                         T* to, int64_t to_rs) {
  constexpr int S = kLaneBytes / static_cast<int>(sizeof(T));
  constexpr uint64_t kAll = (uint64_t{1} << S) - 1;
  PatchLanes lanes[Vectors][S];
  int counts[Vectors];
  for (int v = 0; v < Vectors; ++v) {
    counts[v] = 0;
    for (int i = 0; i < n; ++i) {
      const int shift = pieces[i].first - first - v * S;  // the start of the piece in the vector
      const int begin = larger(shift, 0), end = smaller(shift + pieces[i].count, S);
      if (begin >= end) continue;
      const uint64_t mask = (kAll >> (S - (end - begin))) << begin;
      lanes[v][counts[v]++] = {pieces[i].at - Step * shift, Step == 1 ? mask : spread_bits(mask)};
    }
  }
  to += first;
  int most = 0;
  for (int v = 0; v < Vectors; ++v) most = larger(most, counts[v]);
  if (most <= 2) {  // lanes of no piece are zero
    for (int v = 0; v < Vectors; ++v)
      for (int i = counts[v]; i < 2; ++i) lanes[v][i] = {i > 0 ? lanes[v][0].at : 0, 0};
    if (most <= 1) return assemble_rows<T, Step, Vectors, 1>(&lanes[0][0], counts, from, from_rs, rows, to, to_rs);
    return assemble_rows<T, Step, Vectors, 2>(&lanes[0][0], counts, from, from_rs, rows, to, to_rs);
  }
  assemble_rows<T, Step, Vectors, 0>(&lanes[0][0], counts, from, from_rs, rows, to, to_rs);
}

template <class T, int Step>
inline void copy_wide_rows(const PatchPiece* pieces, int n, const T* from, int64_t from_rs, int64_t rows, T* to,
                           int64_t to_rs, int width) {
  constexpr int S = kLaneBytes / static_cast<int>(sizeof(T));
  int first = 0;
  for (; first + 2 * S <= width; first += 2 * S)
    copy_vectors<T, Step, 2>(pieces, n, first, from, from_rs, rows, to, to_rs);
  if (first < width) copy_vectors<T, Step, 1>(pieces, n, first, from, from_rs, rows, to, to_rs);
}
#endif

// Copies `rows` rows of `width` elements, a multiple of 64 bytes: the elements of the pieces, and zeros elsewhere.
// Lanes are `step` elements apart, rows from_rs elements.
template <class T>
inline void copy_rows(const PatchPiece* pieces, int n, bool gaps, const T* from, int64_t from_rs, int64_t step,
                      int64_t rows, T* to, int64_t to_rs, int width) {
#if defined(FASTOPS_VEC_AVX512) || defined(FASTOPS_VEC_AVX2)
  if constexpr (kHasLanes<T>) {
    if (step == 1) return copy_wide_rows<T, 1>(pieces, n, from, from_rs, rows, to, to_rs, width);
    if (step == 2) return copy_wide_rows<T, 2>(pieces, n, from, from_rs, rows, to, to_rs, width);
  }
#endif
  for (int64_t r = 0; r < rows; ++r, from += from_rs, to += to_rs) {
    if (gaps) zero_run(width, to);
    for (int i = 0; i < n; ++i) copy_run(from + pieces[i].at, step, pieces[i].count, to + pieces[i].first);
  }
}

// For channels first: to[i * rs + j] = feature f0 + i of position n0 + j, for i < features and j < count <=
// kPatchChunk, and zero for count <= j < width.
template <class T>
void copy_features(const Patches<T>& s, const T* image, int64_t n0, int count, int64_t f0, int64_t features, T* to,
                   int64_t rs, int width) {
  PatchRun runs[kPatchChunk];
  PatchPiece pieces[kPatchChunk];
  const int run_count = patch_runs(s, n0, count, runs);
  const int64_t taps = s.tap_count;
  int64_t channel = f0 / taps, t = f0 % taps;
  TapCursor tap(s.taps, t);
  for (int64_t first = 0; first < smaller(taps, features); ++first) {
    int covered;
    const int n = patch_pieces(s, tap, runs, run_count, pieces, &covered);
    copy_rows(pieces, n, covered < width, image + channel * s.channel_stride, s.channel_stride, s.step[2] * s.stride[2],
              ceil_div(features - first, taps), to + first * rs, taps * rs, width);
    tap.advance(s.taps);
    if (++t == taps) {
      t = 0;
      ++channel;
    }
  }
}

// Copies `rows` runs of `count` contiguous elements.
template <class T>
inline void copy_runs(const T* from, int64_t from_rs, int64_t rows, int64_t count, T* to, int64_t to_rs) {
#if defined(FASTOPS_VEC_AVX512)
  constexpr int64_t S = 64 / sizeof(T);
  const uint32_t tail = static_cast<uint32_t>((uint64_t{1} << count % S) - 1);
  for (int64_t r = 0; r < rows; ++r, from += from_rs, to += to_rs) {
    int64_t i = 0;
    for (; i + S <= count; i += S) _mm512_storeu_si512(to + i, _mm512_loadu_si512(from + i));
    if (tail != 0) store_lanes(load_lanes(_mm512_setzero_si512(), tail, from + i), tail, to + i);
  }
#else
#if defined(FASTOPS_VEC_AVX2)
  constexpr int64_t S = kLaneBytes / sizeof(T);
  if (count >= S) {  // the last vector may overlap the one before
    for (int64_t r = 0; r < rows; ++r, from += from_rs, to += to_rs)
      for (int64_t i = 0; i < count; i += S) {
        const int64_t at = smaller(i, count - S);
        store_all(_mm256_loadu_si256((const __m256i*)(from + at)), to + at);
      }
    return;
  }
#endif
  for (int64_t r = 0; r < rows; ++r, from += from_rs, to += to_rs) copy_run(from, 1, count, to);
#endif
}

// For channels last: body(tap, channel, first, count) for each tap in features [f0, f0 + features). Its `count`
// channels from `channel` on are the features from f0 + first on.
template <class T, class Body>
inline void for_taps(const Patches<T>& s, int64_t f0, int64_t features, Body&& body) {
  TapCursor tap(s.taps, f0 / s.channels);
  int64_t channel = f0 % s.channels;
  for (int64_t i = 0; i < features; channel = 0, tap.advance(s.taps)) {
    const int64_t count = smaller(s.channels - channel, features - i);
    body(tap, channel, i, count);
    i += count;
  }
}

// Whether the channels of all taps of a row of the kernel are contiguous in the image.
template <class T>
inline bool has_solid_rows(const Patches<T>& s) {
  return s.channels_inner && s.taps[2].count > 1 && s.taps[2].offset_step == 1 && s.stride[2] == s.channels;
}

// copy_positions if each row of the kernel is one contiguous run. A first layer of 7x7 with 3 channels then copies 7
// runs of 21 elements, not 49 runs of 3.
template <class T>
void copy_solid_rows(const Patches<T>& s, const T* image, int64_t n0, int count, int64_t f0, int64_t features, T* to,
                     int64_t rs) {
  PatchRun runs[kPatchChunk];
  const int run_count = patch_runs(s, n0, count, runs);
  const int64_t width = s.taps[2].count * s.channels, step = s.step[2], row = s.size[2] * s.channels;
  TapCursor tap(s.taps, f0 / width * s.taps[2].count);
  int64_t begin = f0 % width;
  for (int64_t done = 0; done < features; begin = 0) {
    const int64_t length = smaller(width - begin, features - done), end = begin + length;
    int64_t offset[2];
    for (int d = 0; d < 2; ++d) offset[d] = s.taps[d].offset + tap.i[d] * s.taps[d].offset_step;
    // The columns whose elements [begin, end) are all inside the image.
    const int64_t shift = s.taps[2].offset * s.channels;
    const int64_t least = larger<int64_t>(0, ceil_div(-shift - begin, step * s.channels));
    const int64_t most = row - shift - end < 0 ? 0 : (row - shift - end) / (step * s.channels) + 1;
    for (int r = 0; r < run_count; ++r) {
      const PatchRun& run = runs[r];
      T* const out = to + run.first * rs + done;
      const int64_t q0 = run.p[0] * s.step[0] + offset[0], q1 = run.p[1] * s.step[1] + offset[1];
      if (q0 < 0 || q0 >= s.size[0] || q1 < 0 || q1 >= s.size[1]) {
        for (int j = 0; j < run.count; ++j) zero_run(length, out + j * rs);
        continue;
      }
      const T* const from = image + run.base + q0 * s.stride[0] + q1 * s.stride[1];
      const int inner = static_cast<int>(smaller<int64_t>(run.count, larger<int64_t>(0, least - run.p[2])));
      const int outer = static_cast<int>(smaller<int64_t>(run.count, larger<int64_t>(inner, most - run.p[2])));
      const auto edge = [&](int j) {
        const int64_t at = (run.p[2] + j) * step * s.channels + shift;  // element 0, from the start of the row
        const int64_t low = smaller(larger(begin, -at), end), high = larger(low, smaller(end, row - at));
        zero_run(low - begin, out + j * rs);
        copy_run(from + at + low, 1, high - low, out + j * rs + low - begin);
        zero_run(end - high, out + j * rs + high - begin);
      };
      for (int j = 0; j < inner; ++j) edge(j);
      copy_runs(from + (run.p[2] + inner) * step * s.channels + shift + begin, step * s.channels, outer - inner, length,
                out + inner * rs, rs);
      for (int j = outer; j < run.count; ++j) edge(j);
    }
    done += length;
    tap.i[2] = s.taps[2].count - 1;
    tap.advance(s.taps);
  }
}

// For channels last: to[j * rs + i] = feature f0 + i of position n0 + j, for i < features and j < count <= kPatchChunk.
template <class T>
void copy_positions(const Patches<T>& s, const T* image, int64_t n0, int count, int64_t f0, int64_t features, T* to,
                    int64_t rs) {
  if (has_solid_rows(s)) return copy_solid_rows(s, image, n0, count, f0, features, to, rs);
  PatchRun runs[kPatchChunk];
  PatchPiece pieces[kPatchChunk];
  const int run_count = patch_runs(s, n0, count, runs);
  const int64_t step = s.step[2] * s.stride[2];
  for_taps(s, f0, features, [&](const TapCursor& tap, int64_t channel, int64_t first, int64_t length) {
    int covered;
    const int n = patch_pieces(s, tap, runs, run_count, pieces, &covered);
    if (covered < count)
      for (int j = 0; j < count; ++j) zero_run(length, to + j * rs + first);
    for (int i = 0; i < n; ++i)
      copy_runs(image + pieces[i].at + channel, step, pieces[i].count, length, to + pieces[i].first * rs + first, rs);
  });
}
