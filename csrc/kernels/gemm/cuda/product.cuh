// The plan of a product of gemm.cuh: the tile configurations, their choice, and the division of k.
#pragma once

#include "../../common/cuda/launch.h"
#include "gemm.cuh"
#include "product.h"

namespace fastops::cuda {
namespace {

// Large tiles read less memory; small tiles fill the chip when there is less work. Not measured.
template <class S, bool large, bool kAKMajor, bool kBKMajor>
using Tensor16 =
    std::conditional_t<large, Mma16<S, 2, 4, 64, 32, kAKMajor, kBKMajor>, Mma16<S, 2, 2, 32, 32, kAKMajor, kBKMajor>>;
template <bool large>
using Tensor32 = std::conditional_t<large, MmaTf32<2, 4, 64, 32>, MmaTf32<2, 2, 32, 32>>;
template <bool large>
using Scalar32 = std::conditional_t<large, Simt<float, 4, 2, 2>, Simt<float, 4, 2, 1>>;
using Scalar64 = Simt<double, 4, 2, 1>;

// body(std::type_identity<Multiplier>{}, large), where `large` is a constant.
template <class S, bool kAKMajor, bool kBKMajor, class Body>
void with_multiplier(bool large, Precision precision, Body&& body) {
  const auto with = [&](auto is_large) {
    constexpr bool size = decltype(is_large)::value;
    if constexpr (sizeof(S) == 2)
      body(std::type_identity<Tensor16<S, size, kAKMajor, kBKMajor>>{}, is_large);
    else if (precision == Precision::medium)
      body(std::type_identity<Tensor32<size>>{}, is_large);
    else
      body(std::type_identity<Scalar32<size>>{}, is_large);
  };
  if constexpr (sizeof(S) == 8)
    body(std::type_identity<Scalar64>{}, std::false_type{});
  else if (large)
    with(std::true_type{});
  else
    with(std::false_type{});
}

constexpr int kLarge = 128, kSmall = 64;  // of m and n, in every configuration
constexpr int step_of_k(DType dtype) { return size_of(dtype) == 2 ? 32 : 16; }
// The least number of tiles in a part of k, and the most parts. Not measured.
constexpr int64_t kTilesInSplit = 8, kMostSplits = 32;

// The names of a product by 16-bit tensor cores, by TF32 tensor cores, and by multiply-adds.
struct ProductNames {
  const char *mma, *tf32, *simt;
};
inline KernelName product_name(const ProductNames& names, DType dtype, Precision precision, bool large) {
  const bool tf32 = dtype == DType::f32 && precision == Precision::medium;
  const char* const algorithm = size_of(dtype) == 2 ? names.mma : tf32 ? names.tf32 : names.simt;
  const int tile = large ? kLarge : kSmall;
  return {algorithm, {tile, tile, step_of_k(dtype)}};
}

struct Tiling {
  bool large;
  int64_t tiles_m, tiles_n, splits, k_per_split;
};

// For `slabs` products C [m, n]. n is 0 if only row sums are wanted. may_be_large: kernels with large tiles exist.
inline Tiling tiling_of(DType dtype, bool may_be_large, int64_t m, int64_t n, int64_t k, int64_t slabs = 1) {
  const int64_t chip = multiprocessors();
  Tiling tiling{};
  tiling.large = may_be_large && dtype != DType::f64 && m > kSmall && n > kSmall &&
                 quotient_up(m, kLarge) * quotient_up(n, kLarge) * slabs >= chip;
  const int64_t tile = tiling.large ? kLarge : kSmall, tile_k = step_of_k(dtype);
  tiling.tiles_m = quotient_up(m, tile);
  tiling.tiles_n = n > 0 ? quotient_up(n, tile) : 1;
  const int64_t tiles = at_least_one(tiling.tiles_m * tiling.tiles_n * slabs), tiles_k = quotient_up(k, tile_k);
  const int64_t splits = at_least_one(smaller(smaller(chip / tiles, tiles_k / kTilesInSplit), kMostSplits));
  tiling.k_per_split = quotient_up(tiles_k, splits) * tile_k;
  tiling.splits = splits == 1 ? 1 : quotient_up(k, tiling.k_per_split);
  return tiling;
}

// The size of the partial sums, with rows of C rounded up to even, and of the partial row sums of A if wanted.
inline size_t partial_bytes(const Tiling& tiling, DType dtype, int64_t m, int64_t n, bool row_sums, int64_t slabs = 1) {
  if (tiling.splits == 1) return 0;
  const int64_t even_n = quotient_up(n, 2) * 2;
  return static_cast<size_t>(tiling.splits * slabs * m * (even_n + (row_sums ? 1 : 0))) * (dtype == DType::f64 ? 8 : 4);
}

}  // namespace
}  // namespace fastops::cuda
