// Padded copies of planes of channels_first images, which direct convolutions read without tests for the border.
//
// A copy is in the compute type, with zeros for the padding. Its rows are split into phases of the stride: for a stride
// of two, even columns precede odd columns. The inputs of neighbouring outputs are then contiguous, and every tap is an
// ordinary vector load.
#pragma once

#include "../../activation/cpu/rows.inl"
#include "../../common/cpu/common.inl"

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
