// The plain types that every kernel contract is written in. No torch header is included below csrc/kernels.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fastops {

enum class DType : int { f32, f64, bf16, f16 };

// 16-bit storage types. Kernels widen them to float32, compute, and round the result once, to nearest even.
struct bf16_t {
  uint16_t bits;
};
struct f16_t {
  uint16_t bits;
};

inline constexpr size_t size_of(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }

// The strides of a matrix: element (i, j) is at i * row + j * col. Any stride is legal: zero (an expanded tensor),
// negative, and strides that make rows overlap.
struct Strides {
  int64_t row = 0, col = 0;
  bool operator==(const Strides&) const = default;
};

// How much accuracy a kernel may give up for speed. `highest`: none. The others: what the contract of the op says.
enum class Precision : int { highest, high, medium };

}  // namespace fastops
