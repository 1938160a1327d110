// Depthwise convolutions of integers in both layouts: output and gradients, folded and not, with a stride and two
// outputs a channel, sums in two parts.
#include "conv/cuda/depthwise.cuh"

#include "conv.h"

namespace fastops::cuda {
namespace {

template <class S>
DepthwiseImage<S> depthwise(const Image& image, const S* data) {
  const ConvOperand<S> o = image.operand(data, 1, Path::elements);
  return {data, o.image_stride, {o.stride[0], o.stride[1], o.stride[2]}, o.channel_stride};
}

// Output, gradient of the input, of the weight and of the bias of one convolution.
template <bool last>
bool depthwise_is_right(Case c) {
  using S = float;
  const ConvShape& s = c.shape;
  const int channels = c.groups, outputs = c.groups * c.outputs, taps = area(s.kernel);
  const Image x{last, channels, s.in[1], s.in[2]}, y{last, outputs, s.out[1], s.out[2]};
  const size_t xs = static_cast<size_t>(c.batch * channels * area(s.in)),
               ys = static_cast<size_t>(c.batch * outputs * area(s.out));
  const auto data = random<S>(xs, 1), g = random<S>(ys, 2), saved = random<S>(ys, 3);
  const auto w = random<S>(static_cast<size_t>(outputs * taps), 4);
  const Guarded<S> result(ys), grad_x(xs), grad_w(static_cast<size_t>(outputs * taps)),
      grad_bias(static_cast<size_t>(outputs));
  std::vector<int> expected(ys), expected_x(xs), expected_w(grad_w.size()), sums(grad_bias.size());
  const auto slope = [&](size_t i) { return got(saved[i]) <= 0 ? 0 : got(g[i]); };
  for_all(c, [&](int b, int k, int i, int ph, int pw, int h, int v, int tap) {
    const size_t to = y.at(b, k, ph, pw), from = x.at(b, i, h, v), filter = static_cast<size_t>(k * taps + tap);
    expected[to] += got(data[from]) * got(w[filter]);
    expected_x[from] += slope(to) * got(w[filter]);
    expected_w[filter] += slope(to) * got(data[from]);
  });
  for (int b = 0; b < c.batch; ++b)
    for (int k = 0; k < outputs; ++k)
      for (int h = 0; h < s.out[1]; ++h)
        for (int v = 0; v < s.out[2]; ++v) sums[static_cast<size_t>(k)] += slope(y.at(b, k, h, v));

  const auto elements = [](const char* name, size_t count) {
    return Launch{{name}, static_cast<int64_t>(count / kDepthwiseThreads + 1), kDepthwiseThreads, 0, nullptr};
  };
  DepthwiseTask<S> task{};
  task.shape = s;
  task.count = static_cast<int64_t>(ys);
  task.channels = outputs;
  task.multiplier = c.outputs;
  task.channels_last = last;
  task.from = depthwise(x, data.get());
  task.w = w.get();
  task.y = result.get();
  DepthwiseTask<S> gradient = task;
  gradient.shape.gradient = true;
  gradient.count = static_cast<int64_t>(xs);
  gradient.channels = channels;
  gradient.from = depthwise(y, g.get());
  gradient.saved = saved.get();
  gradient.slope.kind = ActivationKind::relu;
  gradient.y = grad_x.get();
  DepthwiseWeightTask<S> weight{};
  weight.shape = s;
  weight.positions = c.batch * area(s.out);
  weight.splits = 2;
  weight.positions_per_split = (weight.positions + 1) / 2;
  weight.channels = outputs;
  weight.multiplier = c.outputs;
  weight.lanes = last ? 32 : 1;
  weight.channel_blocks = (outputs + weight.lanes - 1) / weight.lanes;
  weight.tap_blocks = (taps + kDepthwiseTaps - 1) / kDepthwiseTaps;
  weight.g = depthwise(y, g.get());
  weight.x = depthwise(x, data.get());
  weight.saved = saved.get();
  weight.slope.kind = ActivationKind::relu;
  weight.grad_w = grad_w.get();
  weight.grad_bias = grad_bias.get();
  const Guarded<S> partial(static_cast<size_t>(weight.splits * outputs * (taps + 1)));
  weight.partial = partial.get();
  const Launch sum{{"weight"},
                   int64_t{weight.channel_blocks} * weight.tap_blocks * weight.splits,
                   kDepthwiseThreads,
                   DepthwiseShared::kBytes,
                   nullptr};
  if (!succeeded(launch(elements("output", ys), depthwise_kernel<S>, task)) ||
      !succeeded(launch(elements("gradient", xs), depthwise_kernel<S>, gradient)) ||
      !succeeded(launch(sum, depthwise_weight_kernel<S>, weight)) ||
      !succeeded(launch(elements("reduce", partial.size()), depthwise_reduce_kernel<S>, weight)))
    return false;
  const auto same = [](const Guarded<S>& actual, const std::vector<int>& wanted) {
    for (size_t i = 0; i < wanted.size(); ++i)
      if (got(actual[i]) != wanted[i]) return false;
    return true;
  };
  return same(result, expected) && same(grad_x, expected_x) && same(grad_w, expected_w) && same(grad_bias, sums);
}

bool all_are_right() {
  const Case strided{2, 5, 1, 2, kStrided}, dilated{2, 5, 1, 2, kDilated};
  return depthwise_is_right<true>(strided) && depthwise_is_right<false>(strided) && depthwise_is_right<true>(dilated);
}

}  // namespace
}  // namespace fastops::cuda

int main() { return in_every_schedule(fastops::cuda::all_are_right); }
