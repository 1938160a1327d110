// The plain types every kernel contract is written in. No torch below csrc/kernels.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fastops {

enum class DType : int { f32, f64, bf16, f16 };

// 16-bit storage types. Kernels compute on them in float32 and round once, to nearest even, on the way out.
struct bf16_t {
  uint16_t bits;
};
struct f16_t {
  uint16_t bits;
};

inline constexpr size_t size_of(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }

// A read-only matrix with arbitrary strides, counted in elements: (i, j) lies at data + i * row_stride + j *
// col_stride. Strides may be zero (an expanded tensor) or negative.
struct Matrix {
  const void* data = nullptr;
  int64_t row_stride = 0;
  int64_t col_stride = 0;
};

}  // namespace fastops
