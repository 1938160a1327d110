// Contract of the linear kernels with sparse weights: y = f(x W^T + b), and the gradients of x and of the weights kept.
#pragma once

#include "../activation/activation.h"
#include "../common/tensor.h"

namespace fastops {

// W (n, k) in blocks of block_rows x block_cols, compressed by rows of blocks (BSR; with blocks of 1 x 1, CSR):
//   row i of blocks has blocks crow[i], crow[i] + 1, ... crow[i + 1] - 1
//   W[i block_rows + r, col[b] block_cols + c] = values[b, r, c]        for each of these b, zero elsewhere
// Blocks may reach past n and k; what is there counts as zero. crow has ceil(n / block_rows) + 1 elements. col has
// elements of index_bytes, 2 or 4, signed. values is contiguous.
//
// col and crow should have been checked. Whatever is in them, the kernels read and write nothing outside of x, values
// and the gradients: an index out of range is taken for the last one.
struct SparseWeight {
  int64_t n, k, blocks;
  int block_rows, block_cols;  // 1 x 1, 1 x 4, 4 x 4 or 16 x 1
  int index_bytes;
  bool operator==(const SparseWeight&) const = default;
};

struct SparsePointers {
  const int32_t* crow;
  const void* col;
  const float* values;
};

// y[i] = f(x[i] W^T + b) for `images` matrices x[i] (m, k) and y[i] (m, n), which are image_stride elements apart. Each
// has strides of its own: a linear layer's rows lie one after the other, and an image's pixels are the rows of a 1 x 1
// convolution, contiguous or with contiguous channels.
//
// Products accumulate in float32; y is rounded once to its type, after bias and f. The result is bitwise the same for
// any number of threads. x has any strides. In y rows or columns are contiguous. bias is contiguous. y overlaps no
// operand. Without blocks y is f(bias).
struct SparseLinearForward {
  DType dtype;  // of x, bias and y: f32, bf16 or f16
  int64_t images, m;
  SparseWeight weight;
  Strides x_strides, y_strides;
  int64_t x_image_stride, y_image_stride;
  bool with_bias = false;
  Activation activation = {};

  struct Pointers {
    const void* x;
    SparsePointers sparse;
    const void* bias = nullptr;
    void* y;
  };
  bool operator==(const SparseLinearForward&) const = default;
};

// grad_x[i] = grad_y[i] W, and grad_values[b, r, c] = the sum over images and rows of grad_y[i, row] x[i, col], of the
// element that values[b, r, c] is; zero past n and k. grad_x is rounded once to its type.
struct SparseLinearBackward {
  DType dtype;  // of x, grad_y and grad_x
  int64_t images, m;
  SparseWeight weight;
  Strides grad_y_strides, x_strides, grad_x_strides;
  int64_t grad_y_image_stride, x_image_stride, grad_x_image_stride;
  bool with_grad_x = false, with_grad_values = false;

  struct Pointers {
    const void* grad_y;
    const void* x = nullptr;  // read for grad_values
    SparsePointers sparse;    // values are read for grad_x
    void* grad_x = nullptr;
    float* grad_values = nullptr;
  };
  bool operator==(const SparseLinearBackward&) const = default;
};

#define FASTOPS_CALLS_sparse_linear(X) X(SparseLinearForward) X(SparseLinearBackward)

}  // namespace fastops
