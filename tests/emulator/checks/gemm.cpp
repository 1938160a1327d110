// The matrix product on integers, whose results are exact: every multiplier and way to load, tiles that are not full,
// more tiles of k than stages, k in two parts, sums of rows.
#include "gemm/cuda/gemm.cuh"

#include "check.h"

namespace fastops::cuda {
namespace {

template <class S>
S stored(int value) {
  S result;
  to_storage(static_cast<Compute<S>>(value), &result);
  return result;
}

// C = A B^T with rows of A and B `pad` elements longer than k; those hold NaNs. folded: A times relu' of y.
template <class Multiplier, Loads loads>
bool product_is_right(Path path, int64_t k, int64_t splits, bool folded) {
  using S = typename Multiplier::S;
  using C = typename Multiplier::C;
  constexpr int64_t m = Multiplier::kTileM + 6, n = Multiplier::kTileN + 2;
  constexpr bool row_sums = !Multiplier::A::kKMajor;
  const int64_t a_row = Multiplier::A::kKMajor ? (k + 15) / 8 * 8 : (m + 15) / 8 * 8;
  const int64_t b_row = Multiplier::B::kKMajor ? (k + 15) / 8 * 8 : (n + 15) / 8 * 8;
  const int64_t a_rows = Multiplier::A::kKMajor ? m : k, a_cols = Multiplier::A::kKMajor ? k : m;
  const int64_t b_rows = Multiplier::B::kKMajor ? n : k, b_cols = Multiplier::B::kKMajor ? k : n;
  // The last row ends with its last element.
  const Guarded<S> a(static_cast<size_t>((a_rows - 1) * a_row + (a_cols + 7) / 8 * 8));
  const Guarded<S> b(static_cast<size_t>((b_rows - 1) * b_row + (b_cols + 7) / 8 * 8));
  const Guarded<S> y(a.size());
  const auto a_at = [&](int64_t i, int64_t j) {
    return static_cast<size_t>(Multiplier::A::kKMajor ? i * a_row + j : j * a_row + i);
  };
  const auto b_at = [&](int64_t i, int64_t j) {
    return static_cast<size_t>(Multiplier::B::kKMajor ? i * b_row + j : j * b_row + i);
  };
  const auto a_value = [](int64_t i, int64_t j) { return static_cast<int>((i * 5 + j * 3 + i * j) % 5) - 2; };
  const auto b_value = [](int64_t i, int64_t j) { return static_cast<int>((i * 7 + j * 2 + i * j) % 7) - 3; };
  const auto y_value = [&](int64_t i, int64_t j) { return folded ? static_cast<int>((i + j) % 3) - 1 : 1; };
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < k; ++j) {
      a[a_at(i, j)] = stored<S>(a_value(i, j));
      y[a_at(i, j)] = stored<S>(y_value(i, j));
    }
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < k; ++j) b[b_at(i, j)] = stored<S>(b_value(i, j));

  const Guarded<S> c(static_cast<size_t>(m * n)), sums(static_cast<size_t>(m));
  const Guarded<C> partial(static_cast<size_t>(splits * m * (n + 1)));
  const auto operand = [](const S* data, int64_t row, bool k_major) {
    return Operand<S>{data, k_major ? row : 1, k_major ? 1 : row};
  };
  GemmTask<S> task{};
  task.m = m;
  task.n = n;
  task.k = k;
  task.a = {operand(a.get(), a_row, Multiplier::A::kKMajor), folded ? Path::registers : path, false};
  task.b = {operand(b.get(), b_row, Multiplier::B::kKMajor), path, false};
  if (folded) task.derivative = {ActivationKind::relu, {}, operand(y.get(), a_row, Multiplier::A::kKMajor)};
  task.epilogue.m = m;
  task.epilogue.n = n;
  task.epilogue.y = c.get();
  task.epilogue.row_stride = n;
  task.epilogue.pairs = true;
  task.row_sums = row_sums ? sums.get() : nullptr;
  task.partial = partial.get();
  task.tiles_m = task.tiles_n = 2;
  task.splits = splits;
  task.k_per_split = (k / splits + Multiplier::kTileK - 1) / Multiplier::kTileK * Multiplier::kTileK;
  const Launch how{{"gemm"}, 4 * splits, Multiplier::kThreads, Stages<Multiplier>::kBytes, nullptr};
  permit_shared<gemm_kernel<Multiplier, loads>>(how.shared);
  if (!succeeded(launch(how, gemm_kernel<Multiplier, loads>, task))) return false;
  const Launch then{{"reduce"}, (m * n / 2 + m + kReduceThreads - 1) / kReduceThreads, kReduceThreads, 0, nullptr};
  if (splits > 1 && !succeeded(launch(then, reduce_kernel<S>, task))) return false;

  for (int64_t i = 0; i < m; ++i) {
    int sum = 0;
    for (int64_t j = 0; j < k; ++j) sum += y_value(i, j) > 0 ? a_value(i, j) : 0;
    if (row_sums && to_compute(sums[static_cast<size_t>(i)]) != to_compute(stored<S>(sum))) return false;
    for (int64_t j = 0; j < n; ++j) {
      int expected = 0;
      for (int64_t l = 0; l < k; ++l) expected += (y_value(i, l) > 0 ? a_value(i, l) : 0) * b_value(j, l);
      if (to_compute(c[static_cast<size_t>(i * n + j)]) != to_compute(stored<S>(expected))) return false;
    }
  }
  return true;
}

bool all_are_right() {
  using Half = Mma16<bf16_t, 2, 2, 32, 32, true, true>;
  using Transposed = Mma16<bf16_t, 2, 2, 32, 32, false, false>;
  return product_is_right<Half, Loads::async>(Path::vectors, 203, 1, false) &&
         product_is_right<Half, Loads::folded>(Path::registers, 203, 1, true) &&
         product_is_right<Transposed, Loads::async>(Path::vectors, 203, 2, false) &&
         product_is_right<Simt<float, 4, 2, 1>, Loads::async>(Path::vectors, 83, 1, false) &&
         product_is_right<Simt<float, 4, 2, 1>, Loads::async>(Path::elements, 83, 1, false) &&
         product_is_right<MmaTf32<2, 2, 32, 32>, Loads::async>(Path::vectors, 83, 1, false);
}

}  // namespace
}  // namespace fastops::cuda

int main() { return in_every_schedule(fastops::cuda::all_are_right); }
