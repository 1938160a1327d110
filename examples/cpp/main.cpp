// fastops without torch: a matrix product, a convolution whose weights are packed ahead, and one on two threads.
#include <fastops/fastops.h>

#include <cmath>
#include <cstdio>
#include <thread>
#include <vector>

namespace {

// A team of new threads for every call. A program that computes often keeps a pool instead.
void run_on_threads(int threads, fastops::Region::Body body, void* context) {
  fastops::Region region(threads, body, context);
  std::vector<std::thread> others;
  for (int i = 1; i < threads; ++i) others.emplace_back([&] { region.serve(); });
  region.lead();
  for (std::thread& other : others) other.join();
}

bool check(const char* what, float got, double expected) {
  const bool good = std::fabs(got - expected) < 1e-4 * (1 + std::fabs(expected));
  std::printf("%-28s %12.5f %s\n", what, got, good ? "ok" : "WRONG");
  return good;
}

}  // namespace

int main() {
  using namespace fastops;
  constexpr int64_t m = 3, n = 40, k = 50;
  std::vector<float> x(m * k), w(n * k), y(m * n);
  for (size_t i = 0; i < x.size(); ++i) x[i] = std::sin(static_cast<float>(i));
  for (size_t i = 0; i < w.size(); ++i) w[i] = std::cos(static_cast<float>(i));

  // y = relu(x W^T)
  const auto product = plan_linear({.dtype = DType::f32,
                                    .m = m,
                                    .n = n,
                                    .k = k,
                                    .x_strides = {k, 1},
                                    .w_strides = {k, 1},
                                    .y_row_stride = n,
                                    .activation = {ActivationKind::relu}});
  const Scratch scratch(product.workspace);
  product.run({.x = x.data(), .w = w.data(), .y = y.data()}, scratch.get());
  double sum = 0;
  for (int64_t p = 0; p < k; ++p) sum += static_cast<double>(x[p]) * w[7 * k + p];
  bool good = check("linear", y[7], sum > 0 ? sum : 0);

  // A 3x3 convolution with padding 1 of a 16x20 image, 8 -> 16 channels. The weights are packed once.
  const ConvGeometry geometry{.batch = 1,
                              .in_channels = 8,
                              .out_channels = 16,
                              .groups = 1,
                              .in = {1, 16, 20},
                              .out = {1, 16, 20},
                              .kernel = {1, 3, 3},
                              .stride = {1, 1, 1},
                              .padding = {0, 1, 1},
                              .dilation = {1, 1, 1}};
  ConvForward call{
      .dtype = DType::f32, .layout = Layout::channels_first, .w_layout = Layout::channels_first, .geometry = geometry};
  std::vector<float> image(8 * 16 * 20, 0.5f), filters(16 * 8 * 9, 0.25f), output(16 * 16 * 20);
  call.packed_w = true;
  const auto packed = plan_conv(call);
  const Scratch weights(packed.packed), memory(packed.workspace);
  if (packed.packed > 0) packed.pack(filters.data(), weights.get());
  const void* const kept = packed.packed > 0 ? weights.get() : filters.data();
  packed.run({.x = image.data(), .w = kept, .y = output.data()}, memory.get());
  good &= check("conv, in the middle", output[5 * 20 + 5], 8 * 9 * 0.125);
  good &= check("conv, at a corner", output[0], 8 * 4 * 0.125);

  // The same on two threads, with the weights as they are.
  call.packed_w = false;
  const auto parallel = plan_conv(call, Cpu{2});
  const Scratch shared(parallel.workspace);
  parallel.run({.x = image.data(), .w = filters.data(), .y = output.data()}, shared.get(), Team{2, run_on_threads});
  good &= check("conv on two threads", output[5 * 20 + 5], 8 * 9 * 0.125);
  std::printf("kernels: %s_%s, %s_%s\n", product.name.algorithm, product.tier, packed.name.algorithm, packed.tier);
  return good ? 0 : 1;
}
