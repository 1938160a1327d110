// Padded copies of planes of channels_first images, which direct convolutions read without tests for the border.
//
// A copy is in the compute type, with zeros for the padding. Its rows are split into phases of the stride: for a stride
// of two, even columns precede odd columns. The inputs of neighbouring outputs are then contiguous, and every tap is an
// ordinary vector load.

// Whether the convolution is two-dimensional and not empty.
inline bool is_flat(const ConvGeometry& g) {
  const bool flat = g.in[0] == 1 && g.out[0] == 1 && g.kernel[0] == 1 && g.padding[0] == 0;
  return flat && g.batch * g.in[1] * g.in[2] * g.out[1] * g.out[2] * g.kernel[1] * g.kernel[2] > 0;
}

// The source of a plane: its elements, or grad_y * f'(saved) for an activation f.
template <class T>
struct Plane {
  const T* p;
  int64_t rs;                   // elements between rows, also of saved
  RowDerivative<T> derivative;  // null: the elements themselves
  const T* saved;
  Activation activation;
};

template <class T>
inline Plane<T> gradient_plane(const void* grad_y, const void* saved, const Activation& activation, int64_t rs) {
  const bool plain = activation.kind == ActivationKind::identity;
  return {static_cast<const T*>(grad_y), rs, plain ? nullptr : row_derivative<T>(activation.kind),
          static_cast<const T*>(saved), activation};
}

template <class T>
inline Plane<T> offset(Plane<T> plane, int64_t elements) {
  plane.p += elements;
  if (plane.derivative != nullptr) plane.saved += elements;
  return plane;
}

// A row of a copy. Element u in [0, size) is at at(u). It holds source element u - pad if that is one of the `in`
// elements of the source, else zero. A negative pad crops the source.
struct PaddedRow {
  int64_t in, pad, size, phases, pitch, shift;
  int64_t elements() const { return phases * pitch; }
  int64_t at(int64_t u) const { return u % phases * pitch + u / phases + shift; }
};

// The row has room for vectors that start at any element. The first source element starts a whole vector, so that half
// of the loads and stores cross no cache line.
template <class C>
inline PaddedRow padded_row(int64_t in, int64_t pad, int64_t size, int64_t phases) {
  constexpr int64_t S = Vec<C>::size;
  const int64_t shift = pad > 0 ? S - 1 - (ceil_div(pad, phases) - 1) % S : 0;
  return {in, pad, size, phases, round_up(shift + ceil_div(size, phases), S) + S, shift};
}

// Keeps a loaded vector in a register for several multiply-adds. GCC would make the load an operand of each of them.
template <class C>
inline void keep_loaded(Vec<C>& x) {
#if defined(FASTOPS_VEC_AVX512)
  __asm__("" : "+v"(x.v));
#elif defined(FASTOPS_VEC_AVX2)
  __asm__("" : "+x"(x.v));
#else
  (void)x;
#endif
}

#if defined(FASTOPS_VEC_AVX512)
inline void deinterleave(VecF a, VecF b, VecF& even, VecF& odd) {
  const __m512i i = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  even = {_mm512_permutex2var_ps(a.v, i, b.v)};
  odd = {_mm512_permutex2var_ps(a.v, _mm512_add_epi32(i, _mm512_set1_epi32(1)), b.v)};
}
inline void deinterleave(VecD a, VecD b, VecD& even, VecD& odd) {
  const __m512i i = _mm512_setr_epi64(0, 2, 4, 6, 8, 10, 12, 14);
  even = {_mm512_permutex2var_pd(a.v, i, b.v)};
  odd = {_mm512_permutex2var_pd(a.v, _mm512_add_epi64(i, _mm512_set1_epi64(1)), b.v)};
}
inline void interleave(VecF even, VecF odd, VecF& a, VecF& b) {
  const __m512i i = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  a = {_mm512_permutex2var_ps(even.v, i, odd.v)};
  b = {_mm512_permutex2var_ps(even.v, _mm512_add_epi32(i, _mm512_set1_epi32(8)), odd.v)};
}
inline void interleave(VecD even, VecD odd, VecD& a, VecD& b) {
  const __m512i i = _mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11);
  a = {_mm512_permutex2var_pd(even.v, i, odd.v)};
  b = {_mm512_permutex2var_pd(even.v, _mm512_add_epi64(i, _mm512_set1_epi64(4)), odd.v)};
}
#elif defined(FASTOPS_VEC_AVX2)
inline void deinterleave(VecF a, VecF b, VecF& even, VecF& odd) {
  const auto in_order = [](__m256 x) { return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(x), 0xd8)); };
  even = {in_order(_mm256_shuffle_ps(a.v, b.v, 0x88))};
  odd = {in_order(_mm256_shuffle_ps(a.v, b.v, 0xdd))};
}
inline void deinterleave(VecD a, VecD b, VecD& even, VecD& odd) {
  even = {_mm256_permute4x64_pd(_mm256_unpacklo_pd(a.v, b.v), 0xd8)};
  odd = {_mm256_permute4x64_pd(_mm256_unpackhi_pd(a.v, b.v), 0xd8)};
}
inline void interleave(VecF even, VecF odd, VecF& a, VecF& b) {
  const __m256 low = _mm256_unpacklo_ps(even.v, odd.v), high = _mm256_unpackhi_ps(even.v, odd.v);
  a = {_mm256_permute2f128_ps(low, high, 0x20)};
  b = {_mm256_permute2f128_ps(low, high, 0x31)};
}
inline void interleave(VecD even, VecD odd, VecD& a, VecD& b) {
  const __m256d low = _mm256_unpacklo_pd(even.v, odd.v), high = _mm256_unpackhi_pd(even.v, odd.v);
  a = {_mm256_permute2f128_pd(low, high, 0x20)};
  b = {_mm256_permute2f128_pd(low, high, 0x31)};
}
#else
template <class C>
inline void deinterleave(Vec<C> a, Vec<C> b, Vec<C>& even, Vec<C>& odd) {
  constexpr int H = Vec<C>::size / 2;
  for (int i = 0; i < H; ++i) {
    even.v[i] = a.v[2 * i];
    even.v[H + i] = b.v[2 * i];
    odd.v[i] = a.v[2 * i + 1];
    odd.v[H + i] = b.v[2 * i + 1];
  }
}
template <class C>
inline void interleave(Vec<C> even, Vec<C> odd, Vec<C>& a, Vec<C>& b) {
  constexpr int H = Vec<C>::size / 2;
  for (int i = 0; i < H; ++i) {
    a.v[2 * i] = even.v[i];
    a.v[2 * i + 1] = odd.v[i];
    b.v[2 * i] = even.v[H + i];
    b.v[2 * i + 1] = odd.v[H + i];
  }
}
#endif

template <class T>
inline Compute<T> widen_one(const T* p) {
  if constexpr (same_type<T, Compute<T>>)
    return *p;
  else
    return load_one(p);
}

template <class T>
inline void widen_all(const T* from, int64_t n, Compute<T>* to) {
  using Lanes = Vec<Compute<T>>;
  int64_t i = 0;
  for (; i + Lanes::size <= n; i += Lanes::size) Lanes::load(from + i).store(to + i);
  if (i < n) Lanes::load(from + i, static_cast<int>(n - i)).store(to + i, static_cast<int>(n - i));
}

// even[i] = from[2 i] and odd[i] = from[2 i + 1], for n elements of `from`.
template <class T>
inline void deinterleave_row(const T* from, int64_t n, Compute<T>* even, Compute<T>* odd) {
  using Lanes = Vec<Compute<T>>;
  constexpr int S = Lanes::size;
  Lanes e, o;
  int64_t i = 0;
  for (; i + 2 * S <= n; i += 2 * S) {
    deinterleave(Lanes::load(from + i), Lanes::load(from + i + S), e, o);
    e.store(even + i / 2);
    o.store(odd + i / 2);
  }
  const int rest = static_cast<int>(n - i);
  if (rest == 0) return;
  const int low = smaller(rest, S), high = rest - low;
  deinterleave(Lanes::load(from + i, low), high > 0 ? Lanes::load(from + i + S, high) : Lanes::zero(), e, o);
  e.store(even + i / 2, (rest + 1) / 2);
  o.store(odd + i / 2, rest / 2);
}

// The inverse, for n elements of `to`.
template <class C>
inline void interleave_row(const C* even, const C* odd, int64_t n, C* to) {
  using Lanes = Vec<C>;
  constexpr int S = Lanes::size;
  Lanes a, b;
  int64_t i = 0;
  for (; i + 2 * S <= n; i += 2 * S) {
    interleave(Lanes::load(even + i / 2), Lanes::load(odd + i / 2), a, b);
    a.store(to + i);
    b.store(to + i + S);
  }
  const int rest = static_cast<int>(n - i);
  if (rest == 0) return;
  interleave(Lanes::load(even + i / 2, (rest + 1) / 2), Lanes::load(odd + i / 2, rest / 2), a, b);
  a.store(to + i, smaller(rest, S));
  if (rest > S) b.store(to + i + S, rest - S);
}

// Copies rows [first, first + rows) of a plane with in_rows rows. Elements without a source are not written: `to` was
// zero at first. Rows outside the plane are cleared, unless `to` always holds the same rows.
template <class T>
void copy_rows(const Plane<T>& plane, int64_t in_rows, int64_t first, int64_t rows, bool same_rows,
               const PaddedRow& layout, Compute<T>* to) {
  const int64_t left = larger<int64_t>(layout.pad, 0), n = smaller(layout.pad + layout.in, layout.size) - left;
  if (!same_rows)
    for (int64_t i = 0; i < rows; ++i)
      if (first + i < 0 || first + i >= in_rows)
        __builtin_memset(to + i * layout.elements(), 0, static_cast<size_t>(layout.elements()) * sizeof(Compute<T>));
  const int64_t begin = larger<int64_t>(first, 0), end = smaller(first + rows, in_rows);
  if (n <= 0 || begin >= end) return;
  const Plane<T> from = offset(plane, begin * plane.rs + left - layout.pad);
  const int64_t step = layout.elements(), even = layout.at(left), odd = layout.at(left + 1);
  to += (begin - first) * step;
  if (layout.phases == 1 && plane.derivative != nullptr) {
    for (int64_t i = 0; i < end - begin; ++i)
      plane.derivative(from.p + i * plane.rs, from.saved + i * plane.rs, to + i * step + even, n, plane.activation);
  } else if (layout.phases == 1) {
    for (int64_t i = 0; i < end - begin; ++i) widen_all(from.p + i * plane.rs, n, to + i * step + even);
  } else if (layout.phases == 2) {
    for (int64_t i = 0; i < end - begin; ++i)
      deinterleave_row(from.p + i * plane.rs, n, to + i * step + even, to + i * step + odd);
  } else {
    for (int64_t i = 0; i < end - begin; ++i)
      for (int64_t j = 0; j < n; ++j) to[i * step + layout.at(left + j)] = widen_one(from.p + i * plane.rs + j);
  }
}
