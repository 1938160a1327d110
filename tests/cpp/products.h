// What the C++ tests of the products share: storage types by arithmetic that shares nothing with vec.h, activations,
// buffers, and when a result is close enough.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "tiers.h"

namespace {

// ----------------------------------------------------------------------------------------------------------------
// values

inline float float_of_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
inline uint32_t bits_of_float(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline double widen(float x) { return x; }
inline double widen(double x) { return x; }
inline double widen(bf16_t x) { return float_of_bits(static_cast<uint32_t>(x.bits) << 16); }
// 2^exponent: ldexp would take longer than the product that it is for.
inline double power_of_two(int exponent) {
  const uint64_t bits = static_cast<uint64_t>(exponent + 1023) << 52;
  double x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
inline double widen(f16_t x) {
  const int exponent = x.bits >> 10 & 31, fraction = x.bits & 1023;
  const double magnitude = exponent == 31  ? (fraction != 0 ? NAN : INFINITY)
                           : exponent == 0 ? fraction * 0x1p-24
                                           : (1024 + fraction) * power_of_two(exponent - 25);
  return (x.bits & 0x8000) != 0 ? -magnitude : magnitude;
}

template <class T>
T narrow(double x) {
  return static_cast<T>(x);
}
template <>
inline bf16_t narrow<bf16_t>(double x) {  // float32 first, as the kernels do
  const uint32_t bits = bits_of_float(static_cast<float>(x));
  if (x != x) return {0x7fc0};
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
template <>
inline f16_t narrow<f16_t>(double x) {
  if (x != x) return {0x7e00};
  const double magnitude = std::fabs(x);
  int exponent = 0;
  std::frexp(magnitude, &exponent);
  const double unit = std::ldexp(1.0, std::max(exponent - 11, -24));
  const double rounded = std::nearbyint(magnitude / unit) * unit;
  uint16_t bits;
  if (rounded >= 65536) {
    bits = 0x7c00;
  } else if (rounded < std::ldexp(1.0, -14)) {
    bits = static_cast<uint16_t>(rounded * 0x1p24);
  } else {
    std::frexp(rounded, &exponent);
    bits =
        static_cast<uint16_t>(((exponent + 14) << 10) + (static_cast<int>(std::ldexp(rounded, 11 - exponent)) - 1024));
  }
  return {static_cast<uint16_t>(bits | (std::signbit(x) ? 0x8000 : 0))};
}

inline double unit_roundoff(DType dtype) {
  return dtype == DType::f64 ? 0x1p-53 : dtype == DType::f32 ? 0x1p-24 : dtype == DType::f16 ? 0x1p-11 : 0x1p-8;
}

// ------------------------------------------------------------------------------------------------------------------
// activations

inline double activate(ActivationKind kind, double z) {
  switch (kind) {
    case ActivationKind::relu:
      return z > 0 ? z : 0;
    case ActivationKind::tanh:
      return std::tanh(z);
    case ActivationKind::silu:
      return z / (1 + std::exp(-z));
    default:
      return z;
  }
}

// From y for relu and tanh, from z for silu.
inline double derivative(ActivationKind kind, double saved) {
  switch (kind) {
    case ActivationKind::relu:
      return saved > 0 ? 1 : 0;
    case ActivationKind::tanh:
      return 1 - saved * saved;
    case ActivationKind::silu: {
      const double s = 1 / (1 + std::exp(-saved));
      return s * (1 + saved * (1 - s));
    }
    default:
      return 1;
  }
}

// ------------------------------------------------------------------------------------------------------------------
// buffers and comparisons

// `size` elements between two guard pages, against the one in front or the one behind.
template <class T>
class Guarded {
 public:
  Guarded(int64_t size, bool at_end)
      : size_(static_cast<size_t>(size)),
        pages_(size_ * sizeof(T), at_end, sizeof(T)),
        data_(static_cast<T*>(pages_.data())) {}

  T* data() const { return data_; }
  T& operator[](int64_t i) const { return data_[i]; }
  double operator()(int64_t i) const { return widen(data_[i]); }
  std::vector<T> values() const { return std::vector<T>(data_, data_ + size_); }
  template <class Draw>
  void fill(Draw&& draw) {
    for (size_t i = 0; i < size_; ++i) data_[i] = narrow<T>(draw());
  }

 private:
  size_t size_;
  Pages pages_;
  T* data_;
};

// got against expected, where the sum of the products' magnitudes is `magnitude`.
template <class T>
bool close(T got, double expected, double magnitude, int64_t k, bool exact, double slack) {
  const double value = widen(got);
  if (exact) return value == widen(narrow<T>(expected));
  const double eps = unit_roundoff(kDType<T>), compute = kDType<T> == DType::f64 ? 0x1p-53 : 0x1p-24;
  const double bound =
      2 * eps * std::fabs(expected) + static_cast<double>(k + 8) * compute * magnitude + slack * magnitude + 1e-30;
  const double floor = kDType<T> == DType::f16 ? 0x1p-24 : 0;
  return std::fabs(value - expected) <= bound + floor;
}

template <class T>
bool same_bits(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0);
}

}  // namespace
