// Every kernel body of the library, in the namespace of the tier that includes this page.
// clang-format off
#include "vec.h"
#include "math.inl"
#include "activation_math.inl"
#include "activation.inl"
#include "gemm_kernel.inl"
#include "gemm_pack.inl"
#include "gemm_amx.inl"
#include "gemm.inl"
#include "gemm_dot.inl"
#include "linear.inl"
#include "peak.inl"
#include "table.inl"
// clang-format on
