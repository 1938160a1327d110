// A matrix product, of a linear layer or of a convolution, as a planner decided it.
#pragma once

#include "../../common/cuda/kernels.h"

namespace fastops::cuda {

// The memory of a product. `first` is x or an incoming gradient, `second` the other operand. For the gradient of a
// weight, y is that gradient.
struct ProductPointers {
  const void *first, *second;
  const void* saved;  // y of the activation whose derivative is folded into the load of `first`
  const void* bias;
  void *y, *z, *row_sums;  // z and row_sums: nullable
  void* partial;
};

template <size_t kBytes>
struct Product {
  KernelName name;
  size_t partial;  // bytes of `partial`, for the sums of the parts of k
  Status (*launcher)(const void* task, const KernelName&, const ProductPointers&, Stream);
  alignas(8) unsigned char task[kBytes];  // a GemmTask or ConvTask, but for its pointers

  Status launch(const ProductPointers& pointers, Stream stream) const { return launcher(task, name, pointers, stream); }
};

}  // namespace fastops::cuda
