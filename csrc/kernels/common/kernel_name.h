// The names of kernels, as record(), FASTOPS_VERBOSE and error messages show them.
#pragma once

namespace fastops {

// The rule, for every kernel of every device:
//
//   <algorithm>[_<tile>]_<tier>      gemm_12x32_avx512, winograd_2x2_avx2, gemm_mma_128x128x32_cuda, elementwise_cuda
//
// algorithm  words of lower-case letters and digits, joined by underscores. "bf16" at its end: products are formed by
//            the tier's own bfloat16 instruction.
// tile       the outputs that are computed together, where the algorithm has such a tile: its sizes joined by "x". Of a
//            matrix product rows and columns, on CUDA also the step along k; of Winograd's the m x m of F(m x m, 3 x
//            3); of a direct convolution output channels and positions; of the fused MLP its width. Kernels without a
//            register tile have none.
// tier       KernelTable::isa on a CPU, cuda::kTier on a GPU.
//
// A kernel states algorithm and tile. record::kernel_text (csrc/torch/record.h) alone puts the three together.
struct KernelName {
  const char* algorithm = nullptr;
  int tile[3] = {};  // zeros behind the last size
};

}  // namespace fastops
