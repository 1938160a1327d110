// Contract of fake quantization: numbers rounded to the levels that a quantized tensor would have, and its gradients by
// the straight-through estimator.
//
//   r = round(x (1 / s)) + z     whole_zero: z is an integer, as in torch.fake_quantize_per_tensor_affine
//   r = round(x (1 / s) + z)     otherwise, as torch.fake_quantize_per_channel_affine does with a float zero point
//   q = min(max(r, low), high)   NaN becomes low
//   y = (q - z) s
//
// Halves are rounded to even. Everything is computed in float32, of float64 tensors in float64, but for 1 / s, which is
// a float32 number. +-inf become the ends of the range, also where PyTorch's conversion to an integer makes both of
// them the lowest. An element is inside where low <= r <= high.
//
//   grad_x = grad_y where x is inside, else 0
//   grad_s = sum of grad_y ((y - x) (1 / s) where x is inside, else q - z)     over the elements that share s
//   grad_z = sum of grad_y (0 where x is inside, else -s)
//
// Tensors are outer x inner, contiguous. An element (i, j) has the scale and zero point number j (by_column, channels
// == inner) or i mod channels. low and high are at most 2^20 in magnitude. y may be x, and grad_x may be grad_y;
// nothing else overlaps. Results have the same bits for any number of threads.
//
// Sources: Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference"
// (2018); Bengio, Leonard, Courville, "Estimating or Propagating Gradients Through Stochastic Neurons" (2013); for the
// gradients of s and z, Esser et al., "Learned Step Size Quantization" (2020), and LSQ+ (Bhalgat et al., 2020).
#pragma once

#include "../common/tensor.h"

namespace fastops {

inline constexpr int kMostFakeLevel = 1 << 20;

struct FakeQuantizeForward {
  DType dtype;
  int64_t outer, inner, channels;
  bool by_column, whole_zero, with_mask;
  int low, high;

  struct Pointers {
    const void* x;
    const float* scale;
    const float* zero;
    void* y;
    uint8_t* mask;  // [outer, inner], 1 where x is inside, else 0; null without
  };
  bool operator==(const FakeQuantizeForward&) const = default;
};

// grad_x alone.
struct FakeQuantizeBackward {
  DType dtype;
  int64_t outer, inner;

  struct Pointers {
    const void* grad_y;
    const uint8_t* mask;
    void* grad_x;
  };
  bool operator==(const FakeQuantizeBackward&) const = default;
};

// The gradients of s and z, and that of x with_grad_x.
struct FakeQuantizeLearnedBackward {
  DType dtype;
  int64_t outer, inner, channels;
  bool by_column, whole_zero, with_grad_x;
  int low, high;

  struct Pointers {
    const void* grad_y;
    const void* x;
    const float* scale;
    const float* zero;
    void* grad_x;  // null without
    float* grad_scale;
    float* grad_zero;
  };
  bool operator==(const FakeQuantizeLearnedBackward&) const = default;
};

#define FASTOPS_CALLS_fake_quantize(X) X(FakeQuantizeForward) X(FakeQuantizeBackward) X(FakeQuantizeLearnedBackward)

}  // namespace fastops
