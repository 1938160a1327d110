// The products of a linear layer, which 1x1 convolutions use too.
#pragma once

#include "../../gemm/cuda/product.h"

namespace fastops::cuda {

using LinearProduct = Product<288>;

LinearProduct output_product(const LinearForward&);
// The gradients of the input, and of weight and bias. The activation is identity, or its derivative can be folded.
LinearProduct input_product(const LinearBackward&);
LinearProduct weight_product(const LinearBackward&);

}  // namespace fastops::cuda
