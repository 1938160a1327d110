// How a gradient goes back through a window.
#pragma once

#include "../../common/cpu/common.inl"
#include "taps.inl"
#include "window_ops.inl"
#include "windows.inl"

// The tap of window p that is element i, or -1.
inline int64_t tap_of(const PoolAxis& axis, int64_t p, int64_t i) {
  if (axis.ragged) {
    const PoolWindow window = window_of(axis, p);
    return i - window.first < window.end ? i - window.first : -1;
  }
  const int64_t offset = i + axis.padding - p * axis.stride;
  if (axis.dilation == 1) return offset;
  return offset % axis.dilation == 0 ? offset / axis.dilation : -1;
}

// Adds a gradient to its sum, or where T is the dtype of the gradients, gives it to an element that gets no other.
template <class T, class S>
inline void give(T& to, const S* grad) {
  if constexpr (same_type<T, Compute<S>>)
    to += value_at(grad);
  else
    to = *grad;
}

// The gradient of a maximum: grad_y goes to the element that the index names.
template <class S, class I>
struct MaxRoute {
  using C = Compute<S>;
  static constexpr bool kAverages = false;
  static constexpr bool kWindow = same_type<I, uint8_t>;
  const I* indices;
  const TapOffsets* offsets;  // for positions in the window

  // The value of the index that names an element: its tap, or its position in the plane.
  int64_t name(int64_t tap, int64_t position) const { return kWindow ? tap : position; }
  // The gradient that windows [at, at + count) send to the element with this name.
  Vec<C> sent(int64_t name, Vec<C> g, int64_t at, int count) const {
    return select(equal<C>(indices + at, count, name), g, Vec<C>::zero());
  }
  bool pads() const { return true; }
  MaxRoute from(int64_t window) const { return {indices + window, offsets}; }
  // The position of the maximum of a window that starts at `first`; an index into the plane is counted from there.
  int64_t position(int64_t at, int64_t first) const {
    if constexpr (kWindow)
      return first + offsets->at[indices[at]];
    else
      return first + indices[at];
  }
};

// The gradient of an average: every element gets an equal share of grad_y.
template <class S>
struct AvgRoute {
  using C = Compute<S>;
  static constexpr bool kAverages = true, kWindow = false;
  bool include_pad;
  int64_t override;  // divisor_override, or 0

  // The factor of an axis in the divisor. first_divisor() is divisor_override, or 1.
  C divisor(const PoolAxis& axis, int64_t p) const {
    return override != 0 ? C(1) : static_cast<C>(divisor_of(axis, p, include_pad));
  }
  C divisor(const PoolWindows& windows, int64_t p) const {
    return override != 0 ? C(1) : static_cast<C>(windows.divisor(p));
  }
  C first_divisor() const { return override != 0 ? static_cast<C>(override) : C(1); }

  bool pads() const { return include_pad; }
  AvgRoute from(int64_t) const { return *this; }

  // The share of an element in the gradient of its window.
  Vec<C> share(const PlaneWindows& windows, int64_t d, int64_t h, int64_t w) const {
    return Vec<C>::set1(1 / (first_divisor() * divisor(windows.d, d) * divisor(windows.h, h) * divisor(windows.w, w)));
  }
  int64_t name(int64_t, int64_t) const { return 0; }
  Vec<C> sent(int64_t, Vec<C> g, int64_t, int) const { return g; }
};
