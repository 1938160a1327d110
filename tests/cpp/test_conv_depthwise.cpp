// Depthwise and first-layer convolutions on every tier this machine has (convolutions.h says how): the shapes that
// direct kernels take, in both layouts.
#include "convolutions.h"

namespace {

template <class T>
void test_dtype(bool quick) {
  unsigned seed = 1;
  const ActivationKind kinds[] = {ActivationKind::identity, ActivationKind::relu, ActivationKind::tanh,
                                  ActivationKind::silu};
  const auto check = [&](const ConvGeometry& geometry, Layout layout, const char* kernel) {
    Case c{geometry, layout, layout};
    c.kind = kinds[++seed % 4];
    c.bias = seed % 3 != 0;
    c.z = seed % 5 == 0;
    c.integers = seed % 3 != 1;
    c.at_end = seed % 2 == 0;
    c.outputs = 1 + seed % 3;
    const auto plan = plan_of(ConvForward{kDType<T>, c.layout, c.w_layout, c.geometry});
    if (kernel != nullptr && std::strcmp(plan.name.algorithm, kernel) != 0) fail(c, kDType<T>, kernel, 0, 0, 0);
    test<T>(c, seed);
  };
  const auto depthwise = [&](int64_t batch, int64_t channels, int64_t multiplier, const std::vector<int64_t>& in,
                             const std::vector<int64_t>& kernel, const std::vector<int64_t>& stride,
                             const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation) {
    const ConvGeometry g =
        make(batch, channels, channels * multiplier, channels, in, kernel, stride, padding, dilation, padding);
    if (g.out[1] * g.out[2] == 0) return;
    check(g, Layout::channels_first, "depthwise");
    check(g, Layout::channels_last, multiplier == 1 ? "depthwise_last" : nullptr);
  };
  // Widths, heights and channels around the blocks, for the kernels with a body of their own.
  for (const int64_t k : {3, 5})
    for (const int64_t s : {1, 2})
      for (int64_t n = 1; n <= 36; n += quick ? 5 : 1) {
        depthwise(1, 2, 1, {5, n}, {k, k}, {s, s}, {k / 2, k / 2}, {1, 1});
        depthwise(2, 3, 1, {n, 7}, {k, k}, {s, s}, {k / 2, k / 2}, {1, 1});
        depthwise(1, n + 1, 1, {9, 6}, {k, k}, {s, s}, {k / 2, k / 2}, {1, 1});
      }
  depthwise(1, 2, 1, {20, 20}, {7, 7}, {1, 1}, {3, 3}, {1, 1});
  depthwise(2, 2, 3, {9, 17}, {3, 3}, {2, 2}, {1, 1}, {1, 1});
  depthwise(3, 2, 19, {9, 10}, {3, 3}, {1, 1}, {1, 1}, {1, 1});
  depthwise(1, 2, 1, {150, 130}, {3, 3}, {1, 1}, {1, 1}, {1, 1});  // several bands
  depthwise(1, 2, 1, {150, 131}, {5, 5}, {2, 2}, {2, 2}, {1, 1});
  depthwise(1, 3, 2, {3000}, {9}, {2}, {4}, {1});
  depthwise(1, 33, 1, {20, 30}, {3, 3}, {1, 1}, {1, 1}, {1, 1});
  std::mt19937 random(7);
  const auto below = [&](int n) { return static_cast<int>(random() % static_cast<unsigned>(n)); };
  for (int i = 0; i < (quick ? 40 : 300); ++i) {
    const bool square = below(2) == 0, dilated = below(3) == 0;
    const int64_t kh = 1 + below(7), sh = 1 + below(4);
    depthwise(1 + below(3), 2 + below(i % 9 == 0 ? 40 : 5), below(3) == 0 ? 1 + below(3) : 1,
              {1 + below(24), 1 + below(i % 7 == 0 ? 120 : 30)}, {kh, square ? kh : 1 + below(7)},
              {sh, square ? sh : 1 + below(4)}, {below(8), below(8)},
              {dilated ? 1 + below(3) : 1, dilated ? 1 + below(3) : 1});
  }
  // Few input channels.
  const auto first = [&](int64_t batch, int64_t in, int64_t out, const std::vector<int64_t>& size, int64_t kernel,
                         int64_t stride, int64_t dilation) {
    const int64_t padding = below(static_cast<int>(kernel));
    const ConvGeometry g = make(batch, in, out, 1, size, {kernel, kernel}, {stride, stride}, {padding, padding},
                                {dilation, dilation}, {padding, padding});
    if (g.out[1] * g.out[2] > 0)
      check(g, Layout::channels_first, kDType<T> != DType::bf16 && 2 * g.out[2] >= 16 ? "conv_first" : nullptr);
  };
  for (int64_t n = 8; n < 68; n += quick ? 7 : 1) {
    first(2, 1 + n % 4, 5, {6, n}, 3, 1, 1);
    first(1, 3, n - 7, {9, 20}, 1 + n % 5, 1 + n % 3, 1);
  }
  first(1, 3, 20, {130, 130}, 7, 2, 1);
  first(3, 1, 32, {28, 28}, 3, 1, 1);
  first(2, 4, 9, {30, 50}, 4, 3, 2);
}

}  // namespace

int main(int argc, char** argv) {
  return run_tiers(argc, argv, []<class T>(bool quick) { test_dtype<T>(quick); });
}
