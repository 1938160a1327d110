// Contract of the pools of uint8 images, whose levels have one scale and zero point: see conv_int8.h.
#pragma once

#include "../common/tensor.h"
#include "../pool/pool.h"

namespace fastops {

// x [batch, channels, in] and y [batch, channels, out] are dense, channels last. Windows are as in PoolGeometry. y
// overlaps no operand.
//
//   maximum: y = the greatest level of the window, 0 where none of it is inside the input
//   average: v = (sum of the levels of the window - zero * their number) * factor / divisor + offset, the sum exact,
//            the rest in float32, one rounding for each operation; y = v, or round(min(max(v, 0), 255)), halves to
//            even, where y is uint8. divisor is what AvgPoolForward says. sums_fit says which windows are too large.
struct PoolInt8Forward {
  static constexpr bool integer_products = true;

  DType dtype = DType::f32;  // of y, where that is a float tensor: f32, bf16 or f16
  PoolGeometry geometry;
  bool average = false;
  bool float_y = false;  // only of an average
  bool count_include_pad = true;
  int64_t divisor_override = 0;
  int zero = 0;
  float factor = 1, offset = 0;

  struct Pointers {
    const uint8_t* x;
    void* y;
  };
  bool operator==(const PoolInt8Forward&) const = default;
};

// Whether sums over the windows fit 32 bits: none has more than 2^23 elements inside the input.
inline bool sums_fit(const PoolGeometry& g) {
  double elements = 1;
  for (int i = 0; i < 3; ++i) elements *= static_cast<double>(pool_box(g, i) < g.in[i] ? pool_box(g, i) : g.in[i]);
  return elements <= (1 << 23);
}

#define FASTOPS_CALLS_pool_int8(X) X(PoolInt8Forward)

}  // namespace fastops
