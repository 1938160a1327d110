// Pools of windows that overlap and reach over the edge, forward and backward: every x is different, so that a maximum
// is at one place.
#include "pool/cuda/pool.cuh"

#include "check.h"

namespace fastops::cuda {
namespace {

constexpr int kIn = 23, kOut = 12, kChannels = 3, kImages = 2;

// 3 wide, 2 apart, 1 over the edge.
template <class I>
PoolShape<I> windows(bool channels_last) {
  return {kChannels, {1, 1, kIn}, {1, 1, kOut}, {1, 1, 3}, {1, 1, 2},
          {0, 0, 1}, {1, 1, 1},   {1, 1, 3},    false,     channels_last};
}

template <class I>
bool pools_are_right(bool channels_last) {
  const PoolShape<I> shape = windows<I>(channels_last);
  constexpr size_t ins = kImages * kChannels * kIn, outs = kImages * kChannels * kOut;
  const Guarded<float> x(ins), grad_x(ins), averaged(ins), y(outs), mean(outs), grad_y(outs);
  const Guarded<uint8_t> taps(outs);
  const auto at = [&](int image, int channel, int position, int size) {
    return static_cast<size_t>(channels_last ? (image * size + position) * kChannels + channel
                                             : (image * kChannels + channel) * size + position);
  };
  for (size_t i = 0; i < ins; ++i) x[i] = static_cast<float>(i * 37 % 139);
  for (size_t i = 0; i < outs; ++i) grad_y[i] = static_cast<float>(i % 7 + 1);
  const Launch forward{{"forward"}, 1, kPoolThreads, 0, nullptr}, backward = forward;
  const PoolDivisor inside{false, 0};
  if (!succeeded(launch(forward, max_pool_forward_kernel<float, I>, shape, static_cast<I>(outs), x.get(), y.get(),
                        PoolIndices::window, taps.get())) ||
      !succeeded(launch(backward, max_pool_backward_kernel<float, I>, shape, static_cast<I>(ins), grad_y.get(),
                        PoolIndices::window, taps.get(), grad_x.get())) ||
      !succeeded(launch(forward, avg_pool_forward_kernel<float, I>, shape, static_cast<I>(outs), x.get(), mean.get(),
                        inside)) ||
      !succeeded(launch(backward, avg_pool_backward_kernel<float, I>, shape, static_cast<I>(ins), grad_y.get(),
                        averaged.get(), inside)))
    return false;
  for (int image = 0; image < kImages; ++image)
    for (int channel = 0; channel < kChannels; ++channel) {
      float largest[kIn] = {}, spread[kIn] = {};
      for (int p = 0; p < kOut; ++p) {
        const int first = p * 2 - 1 < 0 ? 0 : p * 2 - 1, last = p * 2 + 1 < kIn ? p * 2 + 1 : kIn - 1;
        int best = first;
        float sum = 0;
        for (int i = first; i <= last; ++i) {
          if (x[at(image, channel, i, kIn)] > x[at(image, channel, best, kIn)]) best = i;
          sum += x[at(image, channel, i, kIn)];
        }
        const size_t output = at(image, channel, p, kOut);
        const float count = static_cast<float>(last - first + 1);
        if (y[output] != x[at(image, channel, best, kIn)] || taps[output] != best - (p * 2 - 1)) return false;
        if (mean[output] != sum / count) return false;
        largest[best] += grad_y[output];
        for (int i = first; i <= last; ++i) spread[i] += grad_y[output] / count;
      }
      for (int i = 0; i < kIn; ++i) {
        if (grad_x[at(image, channel, i, kIn)] != largest[i]) return false;
        if (averaged[at(image, channel, i, kIn)] != spread[i]) return false;
      }
    }
  return true;
}

bool all_are_right() {
  return pools_are_right<int>(false) && pools_are_right<int>(true) && pools_are_right<int64_t>(false);
}

}  // namespace
}  // namespace fastops::cuda

int main() { return in_every_schedule(fastops::cuda::all_are_right); }
