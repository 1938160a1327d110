// Packing: copies an operand with any strides and any storage type into panels that the microkernel reads sequentially.
//
// An operand is a matrix of lanes (rows of A, columns of B) by k. Panel q of width W holds lanes [q W, q W + W):
//   panel[p * W + lane] = source(q W + lane, k0 + p)      zero for lanes past the end
// A source may have a derivative. Then its elements are the gradient of an activation's input, computed while packing.
#pragma once

#include "../../activation/cpu/activation.inl"
#include "../../activation/cpu/rows.inl"
#include "../../common/cpu/common.inl"
#include "microkernels.inl"

template <class T>
struct Source {
  const T* p;
  int64_t ls, ks;  // the strides of lanes and of k, in elements; any number
  // If derivative is not null, the source is p * f'(saved). saved has strides of its own:
  RowDerivative<T> derivative;
  const T* saved;
  int64_t saved_ls, saved_ks;
  Activation activation;
};

template <class T>
inline Source<T> plain_source(const T* p, int64_t ls, int64_t ks) {
  return {p, ls, ks, nullptr, nullptr, 0, 0, {}};
}

// Transposes the square block held in S registers of S lanes.
#if defined(FASTOPS_VEC_AVX512)
inline void transpose(Vec<float>* r) {
  __m512 t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(r[i].v, r[i + 1].v);
    t[i + 1] = _mm512_unpackhi_ps(r[i].v, r[i + 1].v);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    r[i].v = _mm512_shuffle_ps(t[i], t[i + 2], 0x44);
    r[i + 1].v = _mm512_shuffle_ps(t[i], t[i + 2], 0xee);
    r[i + 2].v = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    r[i + 3].v = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_f32x4(r[i].v, r[i + 4].v, 0x88);
    t[i + 4] = _mm512_shuffle_f32x4(r[i].v, r[i + 4].v, 0xdd);
    t[i + 8] = _mm512_shuffle_f32x4(r[i + 8].v, r[i + 12].v, 0x88);
    t[i + 12] = _mm512_shuffle_f32x4(r[i + 8].v, r[i + 12].v, 0xdd);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    r[i].v = _mm512_shuffle_f32x4(t[i], t[i + 8], 0x88);
    r[i + 8].v = _mm512_shuffle_f32x4(t[i], t[i + 8], 0xdd);
  }
}
inline void transpose(Vec<double>* r) {
  __m512d t[8];
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm512_unpacklo_pd(r[i].v, r[i + 1].v);
    t[i + 1] = _mm512_unpackhi_pd(r[i].v, r[i + 1].v);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    r[i].v = _mm512_shuffle_f64x2(t[i], t[i + 2], 0x88);
    r[i + 2].v = _mm512_shuffle_f64x2(t[i], t[i + 2], 0xdd);
    r[i + 4].v = _mm512_shuffle_f64x2(t[i + 4], t[i + 6], 0x88);
    r[i + 6].v = _mm512_shuffle_f64x2(t[i + 4], t[i + 6], 0xdd);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_f64x2(r[i].v, r[i + 4].v, 0x88);
    t[i + 4] = _mm512_shuffle_f64x2(r[i].v, r[i + 4].v, 0xdd);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) r[i].v = t[i];
}
#elif defined(FASTOPS_VEC_AVX2)
inline void transpose(Vec<float>* r) {
  __m256 t[8];
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(r[i].v, r[i + 1].v);
    t[i + 1] = _mm256_unpackhi_ps(r[i].v, r[i + 1].v);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {
    r[i].v = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
    r[i + 1].v = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
    r[i + 2].v = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    r[i + 3].v = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm256_permute2f128_ps(r[i].v, r[i + 4].v, 0x20);
    t[i + 4] = _mm256_permute2f128_ps(r[i].v, r[i + 4].v, 0x31);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) r[i].v = t[i];
}
inline void transpose(Vec<double>* r) {
  const __m256d t0 = _mm256_unpacklo_pd(r[0].v, r[1].v), t1 = _mm256_unpackhi_pd(r[0].v, r[1].v);
  const __m256d t2 = _mm256_unpacklo_pd(r[2].v, r[3].v), t3 = _mm256_unpackhi_pd(r[2].v, r[3].v);
  r[0].v = _mm256_permute2f128_pd(t0, t2, 0x20);
  r[1].v = _mm256_permute2f128_pd(t1, t3, 0x20);
  r[2].v = _mm256_permute2f128_pd(t0, t2, 0x31);
  r[3].v = _mm256_permute2f128_pd(t1, t3, 0x31);
}
#elif defined(FASTOPS_VEC_NEON)
inline void transpose(Vec<double>* r) {
  const float64x2_t low = vzip1q_f64(r[0].v, r[1].v);
  r[1].v = vzip2q_f64(r[0].v, r[1].v);
  r[0].v = low;
}
inline void transpose(Vec<float>* r) {
  Vec<double> t[4];
#pragma GCC unroll 2
  for (int i = 0; i < 4; i += 2) {
    t[i / 2].v = vreinterpretq_f64_f32(vtrn1q_f32(r[i].v, r[i + 1].v));
    t[i / 2 + 2].v = vreinterpretq_f64_f32(vtrn2q_f32(r[i].v, r[i + 1].v));
  }
  transpose(t);
  transpose(t + 2);
  r[0].v = vreinterpretq_f32_f64(t[0].v);
  r[1].v = vreinterpretq_f32_f64(t[2].v);
  r[2].v = vreinterpretq_f32_f64(t[1].v);
  r[3].v = vreinterpretq_f32_f64(t[3].v);
}
#else
template <class C>
inline void transpose(Vec<C>* r) {
  constexpr int S = Vec<C>::size;
  for (int i = 0; i < S; ++i)
    for (int j = 0; j < i; ++j) {
      const C t = r[i].v[j];
      r[i].v[j] = r[j].v[i];
      r[j].v[i] = t;
    }
}
#endif

// The conversion of elements of T to panel elements P, one vector at a time.
template <class P, class T>
struct PackAs {
  using Value = Vec<P>;
  static constexpr int kStep = 1;  // steps of k in one element of the panel
  static Value load_along_k(const T* p) { return Value::load(p); }
  static Value load_along_k(const T* p, int count) { return Value::load(p, count); }
  static Value load_along_lanes(const T* p, int64_t, int, int lanes) {
    return lanes == Value::size ? Value::load(p) : Value::load(p, lanes);
  }
  static void store(Value v, P* to) { v.store(to); }
  static void store(Value v, P* to, int count) { v.store(to, count); }
};

#if defined(FASTOPS_HAS_AVX512_BF16)
template <>
struct PackAs<bf16_pair, bf16_t> {
  using Value = Vec<float>;  // 32-bit patterns that are only moved
  static constexpr int kStep = 2;
  static Value load_along_k(const bf16_t* p) { return {_mm512_loadu_ps(p)}; }
  static Value load_along_k(const bf16_t* p, int count) {
    const __mmask32 mask = static_cast<__mmask32>((uint64_t{1} << count) - 1);
    return {_mm512_castsi512_ps(_mm512_maskz_loadu_epi16(mask, p))};
  }
  // One or two rows (k and k + 1) of up to 16 lanes.
  static Value load_along_lanes(const bf16_t* p, int64_t ks, int rows, int lanes) {
    const __mmask16 mask = first16(lanes);
    const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, p));
    if (rows == 1) return {_mm512_castsi512_ps(low)};
    const __m512i high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, p + ks));
    return {_mm512_castsi512_ps(_mm512_or_si512(low, _mm512_slli_epi32(high, 16)))};
  }
  static void store(Value v, bf16_pair* to) { _mm512_storeu_ps(to, v.v); }
  static void store(Value v, bf16_pair* to, int count) { _mm512_mask_storeu_ps(to, first16(count), v.v); }
};
#endif

// One row of a panel (kStep rows, interleaved) from a source that is contiguous along the lanes.
template <class P, class T, int W>
inline void pack_row(const T* from, int64_t ks, int rows, int lanes, P* to) {
  using As = PackAs<P, T>;
  constexpr int S = As::Value::size;
#pragma GCC unroll 4
  for (int l = 0; l < W; l += S) {
    const int width = W - l < S ? W - l : S;
    const int valid = lanes == W ? width : smaller(larger(lanes - l, 0), width);
    const auto value = As::load_along_lanes(from + (valid > 0 ? l : 0), ks, rows, valid);
    if (width == S)
      As::store(value, to + l);
    else
      As::store(value, to + l, width);
  }
}

// Panels from a source that is contiguous along the lanes. It goes row by row over all panels, so that each row is read
// sequentially.
template <class P, class T, int W>
void pack_along_lanes(const T* from, int64_t ks, int64_t lanes, int64_t k, P* to, int64_t panel_stride) {
  using As = PackAs<P, T>;
  const int tail = static_cast<int>(lanes % W);
  for (int64_t p = 0; p < k; p += As::kStep, from += As::kStep * ks, to += W) {
    const int rows = static_cast<int>(smaller<int64_t>(k - p, As::kStep));
    const T* at = from;
    P* panel = to;
#if defined(FASTOPS_VEC_AVX2)
    // Whole vectors where the next row overwrites the excess. 2% of the weight's gradient of 512^3, one thread, Zen 3.
    constexpr int S = As::Value::size;
    if (W < S && p + 1 < k)
      for (; at + S <= from + lanes; at += W, panel += panel_stride)
        As::store(As::load_along_lanes(at, ks, 1, S), panel);
#endif
    if (rows == As::kStep)
      for (const T* const end = from + (lanes - tail); at < end; at += W, panel += panel_stride)
        pack_row<P, T, W>(at, ks, As::kStep, W, panel);
    else
      for (const T* const end = from + (lanes - tail); at < end; at += W, panel += panel_stride)
        pack_row<P, T, W>(at, ks, rows, W, panel);
    if (tail > 0) pack_row<P, T, W>(at, ks, rows, tail, panel);
  }
}

// One panel from a source that is contiguous along k. Square blocks are transposed in registers.
template <class P, class T, int W>
void pack_along_k(const T* from, int64_t ls, int lanes, int64_t k, P* to) {
  using As = PackAs<P, T>;
  using Value = typename As::Value;
  constexpr int S = Value::size;
  constexpr int64_t kBlock = S * As::kStep;
  const int64_t panel_rows = ceil_div(k, As::kStep);
  for (int64_t p = 0; p < k; p += kBlock) {
    const int64_t row = p / As::kStep;
    const int count = static_cast<int>(smaller(k - p, kBlock));
    const int block_rows = static_cast<int>(smaller<int64_t>(panel_rows - row, S));
#pragma GCC unroll 1
    for (int l = 0; l < W; l += S) {
      Value r[S];
      const int width = W - l < S ? W - l : S;
      const T* at = from + l * ls + p;
      if (lanes - l >= S && count == kBlock) {
#pragma GCC unroll 16
        for (int i = 0; i < S; ++i) r[i] = As::load_along_k(at + i * ls);
      } else {
#pragma GCC unroll 16
        for (int i = 0; i < S; ++i)
          r[i] = l + i < lanes && i < width ? As::load_along_k(at + i * ls, count) : Value::zero();
      }
      transpose(r);
      P* out = to + row * W + l;
      if (width == S && block_rows == S) {
#pragma GCC unroll 16
        for (int i = 0; i < S; ++i) As::store(r[i], out + i * W);
      } else {
#pragma GCC unroll 16
        for (int i = 0; i < S; ++i)
          if (i < block_rows) As::store(r[i], out + i * W, width);
      }
    }
  }
}

// Copies a block with any strides into lane-major rows: to[l * to_rs + p] = from[l * ls + p * ks].
template <class T>
void gather(const T* from, int64_t ls, int64_t ks, int lanes, int k, T* to, int to_rs) {
  for (int l = 0; l < lanes; ++l)
    for (int p = 0; p < k; ++p) to[l * to_rs + p] = from[l * ls + p * ks];
}

inline bool along_lanes(int64_t ls, int64_t ks) { return ls == 1 && ks != 1; }

// One panel of a source without a derivative.
template <class P, class T, int W>
void pack_plain(const T* from, int64_t ls, int64_t ks, int lanes, int64_t k, P* to) {
  if (along_lanes(ls, ks)) return pack_along_lanes<P, T, W>(from, ks, lanes, k, to, 0);
  if (ks == 1) return pack_along_k<P, T, W>(from, ls, lanes, k, to);
  constexpr int kChunk = 64;
  T block[W * kChunk];
  for (int64_t p = 0; p < k; p += kChunk) {
    const int count = static_cast<int>(smaller<int64_t>(k - p, kChunk));
    gather(from + p * ks, ls, ks, lanes, count, block, kChunk);
    pack_along_k<P, T, W>(block, kChunk, lanes, count, to + p / PackAs<P, T>::kStep * W);
  }
}

// The gradient of a block of lanes x k, in the compute type. Rows are to_rs apart: they run along the lanes if
// along_lanes, else along k.
template <class T>
void derivative_block(const Source<T>& s, int64_t lane, int64_t k0, int lanes, int k, bool along_lanes, Compute<T>* to,
                      int to_rs) {
  constexpr int kChunk = 64;
  const int64_t ls = along_lanes ? s.ks : s.ls, ks = along_lanes ? s.ls : s.ks;
  const int64_t saved_ls = along_lanes ? s.saved_ks : s.saved_ls, saved_ks = along_lanes ? s.saved_ls : s.saved_ks;
  const T* grad = s.p + lane * s.ls + k0 * s.ks;
  const T* saved = s.saved + lane * s.saved_ls + k0 * s.saved_ks;
  const int rows = along_lanes ? k : lanes, cols = along_lanes ? lanes : k;
  T grad_row[kChunk], saved_row[kChunk];
  for (int r = 0; r < rows; ++r) {
    if (ks == 1 && saved_ks == 1) {
      s.derivative(grad + r * ls, saved + r * saved_ls, to + r * to_rs, cols, s.activation);
      continue;
    }
    for (int c = 0; c < cols; c += kChunk) {
      const int count = smaller(cols - c, kChunk);
      gather(grad + r * ls + c * ks, 0, ks, 1, count, grad_row, kChunk);
      gather(saved + r * saved_ls + c * saved_ks, 0, saved_ks, 1, count, saved_row, kChunk);
      s.derivative(grad_row, saved_row, to + r * to_rs + c, count, s.activation);
    }
  }
}

// sums[lane] += the sum over k of a block whose rows hold `lanes` contiguous elements. There are four partial sums per
// lane.
template <class C>
void add_columns(const C* from, int64_t rs, int lanes, int64_t k, C* sums) {
  using Lanes = Vec<C>;
  constexpr int S = Lanes::size;
  for (int l = 0; l < lanes; l += S) {
    const int count = smaller(lanes - l, S);
    Lanes s[4] = {Lanes::zero(), Lanes::zero(), Lanes::zero(), Lanes::zero()};
    int64_t p = 0;
    for (; p + 4 <= k; p += 4)
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) s[i] = s[i] + Lanes::load(from + (p + i) * rs + l, count);
    for (; p < k; ++p) s[0] = s[0] + Lanes::load(from + p * rs + l, count);
    (Lanes::load(sums + l, count) + ((s[0] + s[1]) + (s[2] + s[3]))).store(sums + l, count);
  }
}

// The type to which a derivative's values are converted before they are packed.
template <class P, class T>
struct StageOf {
  using type = Compute<T>;
};
#if defined(FASTOPS_HAS_AVX512_BF16)
template <>
struct StageOf<bf16_pair, bf16_t> {
  using type = bf16_t;
};
#endif

// Panels are padded with zeros to a multiple of this many steps of k.
template <class P>
constexpr int kPanelAlign = 1;

template <class P, int W, int Step>
inline void pad_panel(P* panel, int64_t k) {
  if constexpr (kPanelAlign<P> > Step) {
    for (int64_t at = ceil_div(k, Step) * W; at < round_up(k, kPanelAlign<P>) / Step * W; ++at) panel[at] = P{};
  }
}

// Packs lanes [lane, lane + lanes) and k [k0, k0 + k) into panels of width W, panel_stride elements apart. If sums is
// not null, the sum of source(lane + i, k) over k, unrounded, is added to sums[i].
template <class P, class T, int W>
void pack(const Source<T>& s, int64_t lane, int64_t lanes, int64_t k0, int64_t k, P* to, int64_t panel_stride,
          Compute<T>* sums) {
  using C = Compute<T>;
  constexpr int kStep = PackAs<P, typename StageOf<P, T>::type>::kStep;
  if (s.derivative == nullptr) {
    const bool all_at_once = along_lanes(s.ls, s.ks);
    if (all_at_once) pack_along_lanes<P, T, W>(s.p + lane * s.ls + k0 * s.ks, s.ks, lanes, k, to, panel_stride);
    for (int64_t l = 0; l < lanes; l += W, to += panel_stride) {
      const int width = static_cast<int>(smaller<int64_t>(lanes - l, W));
      if (!all_at_once) pack_plain<P, T, W>(s.p + (lane + l) * s.ls + k0 * s.ks, s.ls, s.ks, width, k, to);
      pad_panel<P, W, kStep>(to, k);
      if (sums == nullptr) continue;
      if constexpr (kStep == 1) {
        add_columns<C>(to, W, width, k, sums + l);
      } else {
        constexpr int kChunk = 32;
        C block[kChunk * W];
        for (int64_t p = 0; p < k; p += kChunk) {
          const int count = static_cast<int>(smaller<int64_t>(k - p, kChunk));
          pack_plain<C, T, W>(s.p + (lane + l) * s.ls + (k0 + p) * s.ks, s.ls, s.ks, width, count, block);
          add_columns<C>(block, W, width, count, sums + l);
        }
      }
    }
    return;
  }
  // The derivative is computed for rows that span several panels. Each panel then copies its part from the cache.
  constexpr int kPanels = 96 / W, kLanes = kPanels * W;
  constexpr int kChunk = 32;
  const bool lane_rows = s.ls == 1 || s.ks != 1;  // rows of a block run along the lanes, else along k
  alignas(64) C block[kLanes * kChunk];
  typename StageOf<P, T>::type rounded[same_type<typename StageOf<P, T>::type, C> ? 1 : kLanes * kChunk];
  for (int64_t l = 0; l < lanes; l += kLanes) {
    const int width = static_cast<int>(smaller<int64_t>(lanes - l, kLanes));
    for (int64_t p = 0; p < k; p += kChunk) {
      const int count = static_cast<int>(smaller<int64_t>(k - p, kChunk));
      const int rs = lane_rows ? kLanes : kChunk;
      derivative_block(s, lane + l, k0 + p, width, count, lane_rows, block, rs);
      const typename StageOf<P, T>::type* stage;
      if constexpr (same_type<typename StageOf<P, T>::type, C>) {
        stage = block;
      } else {
        const int rows = lane_rows ? count : width, cols = lane_rows ? width : count;
        for (int r = 0; r < rows; ++r) store_row<T>(block + r * rs, rounded + r * rs, cols);
        stage = rounded;
      }
      for (int q = 0; q * W < width; ++q) {
        const int part = smaller(width - q * W, W);
        P* const panel = to + (l / W + q) * panel_stride + p / kStep * W;
        using Stage = typename StageOf<P, T>::type;
        if (lane_rows)
          pack_along_lanes<P, Stage, W>(stage + q * W, rs, part, count, panel, 0);
        else
          pack_along_k<P, Stage, W>(stage + q * W * rs, rs, part, count, panel);
        pad_panel<P, W, kStep>(panel, count);
        if (sums == nullptr) continue;
        if constexpr (kStep == 1) {
          add_columns<C>(panel, W, part, count, sums + l + q * W);
        } else if (lane_rows) {
          add_columns<C>(block + q * W, rs, part, count, sums + l + q * W);
        } else {
          for (int i = 0; i < part; ++i)
            for (int j = 0; j < count; ++j) sums[l + q * W + i] += block[(q * W + i) * rs + j];
        }
      }
    }
  }
}
