// What the C++ tests of the products share: storage types by arithmetic that shares nothing with vec.h, teams of
// threads, activations, workspaces, and when a result is close enough.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <thread>
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

// -----------------------------------------------------------------------------------------------------------------
// teams

inline void run_threads(int threads, void (*body)(void*, int, int), void* context) {
  std::vector<std::thread> others;
  for (int t = 1; t < threads; ++t) others.emplace_back(body, context, t, threads);
  body(context, 0, threads);
  for (std::thread& t : others) t.join();
}
inline void run_at_most_two(int threads, void (*body)(void*, int, int), void* context) {
  run_threads(threads < 2 ? threads : 2, body, context);
}

const Team kTeams[] = {{1, nullptr}, {2, run_threads}, {3, run_threads}, {3, run_at_most_two}};

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

struct FreeDeleter {
  void operator()(void* p) const { std::free(p); }
};
using Workspace = std::unique_ptr<void, FreeDeleter>;

// Aligned as an allocator of tensors aligns, which the stores that bypass the caches ask for.
template <class T>
using AlignedBuffer = std::unique_ptr<T[], FreeDeleter>;
template <class T>
AlignedBuffer<T> make_buffer(size_t size) {
  void* p = nullptr;
  if (posix_memalign(&p, 64, size * sizeof(T)) != 0) std::abort();
  return AlignedBuffer<T>(static_cast<T*>(p));
}

inline Workspace make_workspace(size_t bytes) {
  void* p = nullptr;
  if (bytes > 0 && posix_memalign(&p, 64, bytes) != 0) std::abort();
  if (p != nullptr) std::memset(p, 0xff, bytes);  // NaN, whatever the type
  return Workspace(p);
}

// `size` elements between two guard pages, against the one in front or the one behind.
template <class T>
class Guarded {
 public:
  Guarded(int64_t size, bool at_end) : size_(static_cast<size_t>(size)) {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE)), bytes = size_ * sizeof(T);
    const size_t inner = (bytes + page - 1) / page * page;
    length_ = inner + 2 * page;
    memory_ = static_cast<char*>(mmap(nullptr, length_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (memory_ == MAP_FAILED) std::abort();
    if (inner > 0 && mprotect(memory_ + page, inner, PROT_READ | PROT_WRITE) != 0) std::abort();
    data_ = reinterpret_cast<T*>(memory_ + page + (at_end ? inner - bytes : 0));
    for (size_t i = 0; i < size_; ++i) data_[i] = narrow<T>(NAN);
  }
  ~Guarded() { munmap(memory_, length_); }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;

  T* data() const { return data_; }
  T& operator[](int64_t i) const { return data_[i]; }
  double operator()(int64_t i) const { return widen(data_[i]); }
  std::vector<T> values() const { return std::vector<T>(data_, data_ + size_); }
  template <class Draw>
  void fill(Draw&& draw) {
    for (size_t i = 0; i < size_; ++i) data_[i] = narrow<T>(draw());
  }

 private:
  size_t size_, length_;
  char* memory_;
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
