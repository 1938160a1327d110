// The operations on a window: its maximum, with or without indices, and its average.
#pragma once

#include "../../common/cpu/common.inl"
#include "../../common/cpu/some.inl"
#include "taps.inl"
#include "windows.inl"

template <class C>
constexpr C kMinusInfinity = -static_cast<C>(__builtin_inf());

template <class S>
inline Compute<S> value_at(const S* p) {
  if constexpr (same_type<S, Compute<S>>)
    return *p;
  else if constexpr (same_type<S, bf16_t>)
    return __builtin_bit_cast(float, static_cast<uint32_t>(p->bits) << 16);
  else
    return load_one(p);
}

// Takes an element if (v > max) || isnan(v), as in PyTorch: the first of equal maxima counts, and the last NaN.
template <class C, bool kIndexed>
struct Maximum {
  Vec<C> value = Vec<C>::set1(kMinusInfinity<C>);
  Taps<C> tap;

  explicit Maximum(Taps<C> first) : tap(first) {}
  void take(Vec<C> v, int64_t t) {
    const Mask<C> better = gt(v, value) | unordered(v, v);
    value = select(better, v, value);
    tap = select(better, Taps<C>::set1(static_cast<int>(t)), tap);
  }
};

template <class C>
struct Maximum<C, false> {
  Vec<C> value = Vec<C>::set1(kMinusInfinity<C>);

  explicit Maximum(Taps<C>) {}
  void take(Vec<C> v, int64_t) { value = select(unordered(v, v), v, max(v, value)); }
};

template <class C>
struct Sum {
  Vec<C> value = Vec<C>::zero();

  explicit Sum(Taps<C>) {}
  void take(Vec<C> v, int64_t) { value = value + v; }
};

// The place of a vector of results. Lane i is the window that starts at position + i * step of its plane; its divisor
// is `divisor`, times divisors[i] if divisors is not null.
template <class C>
struct PoolPlace {
  int64_t position, step;
  C divisor;
  const C* divisors;
};

struct NoIndices {};

// I, the type of indices: uint8_t (position in the window), int64_t (position in the plane) or NoIndices.
template <class S, class I>
struct MaxPool {
  using C = Compute<S>;
  static constexpr bool kIndexed = !same_type<I, NoIndices>;
  static constexpr bool kPlane = same_type<I, int64_t>;
  static constexpr bool kSums = false, include_pad = true;
  using Accumulator = Maximum<C, kIndexed>;
  static constexpr C kOutside = kMinusInfinity<C>;

  S* y;
  I* indices;
  const TapOffsets* offsets;  // for positions in the plane and windows of at most 256 elements

  int64_t divisor(const PoolAxis&, int64_t) const { return 1; }
  C whole_divisor(C divisor) const { return divisor; }
  const C* lane_divisors(const C*) const { return nullptr; }

  __attribute__((always_inline)) void finish(int64_t at, int count, const Accumulator& result,
                                             const PoolPlace<C>& place) const {
    store_some(result.value, y + at, count);
    if constexpr (kPlane) {
      uint8_t taps[Vec<C>::size];
      result.tap.store(taps, count);
      for (int i = 0; i < count; ++i) indices[at + i] = place.position + i * place.step + offsets->at[taps[i]];
    } else if constexpr (kIndexed) {
      result.tap.store(indices + at, count);
    }
  }
};

template <class S>
struct AvgPool {
  using C = Compute<S>;
  static constexpr bool kIndexed = false;
  static constexpr bool kSums = true;
  using Accumulator = Sum<C>;
  static constexpr C kOutside = 0;

  S* y;
  bool include_pad;
  int64_t override;  // divisor_override, or 0

  // The factor of an axis in the divisor, and the divisor from the product of these factors.
  int64_t divisor(const PoolAxis& axis, int64_t p) const { return divisor_of(axis, p, include_pad); }
  C whole_divisor(C divisor) const { return override != 0 ? static_cast<C>(override) : divisor; }
  const C* lane_divisors(const C* divisors) const { return override != 0 ? nullptr : divisors; }

  __attribute__((always_inline)) void finish(int64_t at, int count, const Accumulator& result,
                                             const PoolPlace<C>& place) const {
    Vec<C> divisor = Vec<C>::set1(place.divisor);
    if (place.divisors != nullptr) divisor = divisor * Vec<C>::load(place.divisors, count);
    store_some(result.value / divisor, y + at, count);
  }
};

// The taps of the windows of one row of outputs: depths * heights rows of elements, the first at p.
template <class E>
struct PoolRows {
  const E* p;
  int64_t depth_step, row_step;  // elements between the rows of successive taps
  int64_t depths, heights;
  int64_t tap, tap_depth, tap_row;  // the number of the first tap, and the difference to the next depth and row
  int64_t width, dilation, stride;

  PoolRows offset(int64_t elements) const {
    PoolRows rows = *this;
    rows.p += elements;
    return rows;
  }
};

// The elements p[0], p[stride], p[2 * stride] ... for `count` lanes. Nothing after the last of them is read, also for a
// whole vector. kStride is the stride if that is 1 or 2; else it is 0 and elements are gathered.
template <class C, int kStride, bool kPartial, class E>
inline Vec<C> strided(const E* p, int64_t stride, int count) {
  constexpr int S = Vec<C>::size;
  if constexpr (kStride == 0) {
    if constexpr (same_type<E, C>)
      return gather(p, stride, count);
    else
      return Vec<C>::zero();  // never called: 16-bit elements are first widened into a band
  } else if constexpr (kStride == 1) {
    return kPartial ? Vec<C>::load(p, count) : Vec<C>::load(p);
  } else {
    Vec<C> even, odd;
    const int elements = 2 * count - 1, low = elements < S ? elements : S;
    const Vec<C> a = kPartial ? Vec<C>::load(p, low) : Vec<C>::load(p);
    const Vec<C> b = kPartial ? Vec<C>::load(p + low, elements - low) : Vec<C>::load(p + S);
    deinterleave(a, b, even, odd);
    return even;
  }
}

// Neighbouring windows of one row, one per lane. kWidth is the width of a window with dilation 1, as a constant, or 0.
// If not kPartial, another window follows these, so that loads of whole vectors stay inside the row.
template <class Accumulator, class C, int kStride, int kWidth, bool kPartial, class E>
inline void take_windows(Accumulator& result, const PoolRows<E>& rows, int count) {
  constexpr int S = Vec<C>::size;
  for (int64_t d = 0; d < rows.depths; ++d) {
    for (int64_t h = 0; h < rows.heights; ++h) {
      const E* p = rows.p + d * rows.depth_step + h * rows.row_step;
      const int64_t t = rows.tap + d * rows.tap_depth + h * rows.tap_row;
      if constexpr (kWidth != 0 && kStride == 2) {
        Vec<C> even, odd;
        const int elements = 2 * count, low = elements < S ? elements : S;
        const Vec<C> a = kPartial ? Vec<C>::load(p, low) : Vec<C>::load(p);
        const Vec<C> b = kPartial ? Vec<C>::load(p + low, elements - low) : Vec<C>::load(p + S);
        deinterleave(a, b, even, odd);
        result.take(even, t);
        result.take(odd, t + 1);
        if constexpr (kWidth == 3) result.take(strided<C, 2, kPartial>(p + 2, 2, count), t + 2);
      } else {
        for (int64_t w = 0; w < rows.width; ++w)
          result.take(strided<C, kStride, kPartial>(p + w * rows.dilation, rows.stride, count), t + w);
      }
    }
  }
}

// A row of n windows. first_taps has the first tap of each window, or is null if that is the same for all.
template <class Op, int kStride, int kWidth, class E>
void pool_row(const Op& op, const PoolRows<E>& rows, int64_t n, const uint8_t* first_taps, int64_t at,
              PoolPlace<typename Op::C> place) {
  using C = typename Op::C;
  constexpr int S = Vec<C>::size;
  const Taps<C> first = Taps<C>::set1(static_cast<int>(rows.tap));
  for (int64_t j = 0; j < n; j += S) {
    const int count = static_cast<int>(smaller(n - j, S));
    typename Op::Accumulator result(Op::kIndexed && first_taps != nullptr ? Taps<C>::load(first_taps + j, count) + first
                                                                          : first);
    const PoolRows<E> here = rows.offset(j * rows.stride);
    if (j + S < n)
      take_windows<typename Op::Accumulator, C, kStride, kWidth, false>(result, here, S);
    else
      take_windows<typename Op::Accumulator, C, kStride, kWidth, true>(result, here, count);
    op.finish(at + j, count, result, place);
    place.position += S * place.step;
    if (place.divisors != nullptr) place.divisors += S;
  }
}
