// Convolutions of integers, whose results are exact: every product, layout and way to load, tiles that are not full,
// more tiles of k than stages, windows over every edge, a stride, dilation, groups, k in two parts, sums of rows.
#include "conv.h"

namespace fastops::cuda {
namespace {

int phase_count(const ConvShape& s) { return phases_of(s, 0) * phases_of(s, 1) * phases_of(s, 2); }

template <class Multiplier>
void plan(ConvTask<typename Multiplier::S>& task, int64_t k, int splits) {
  task.tiles_m = static_cast<int>((task.m + Multiplier::kTileM - 1) / Multiplier::kTileM);
  task.tiles_n = static_cast<int>((task.n + Multiplier::kTileN - 1) / Multiplier::kTileN);
  task.splits = splits;
  task.k_per_split = (k / splits + Multiplier::kTileK - 1) / Multiplier::kTileK * Multiplier::kTileK;
}

template <class Multiplier, ConvProduct product, bool last, Loads loads>
bool launched(const ConvTask<typename Multiplier::S>& task) {
  using S = typename Multiplier::S;
  const int64_t slabs = int64_t{task.phases} * task.groups;
  permit_shared<conv_kernel<Multiplier, product, last, loads>>(ConvShared<Multiplier>::kBytes);
  if (!succeeded(launch({{"conv"},
                         int64_t{task.tiles_m} * task.tiles_n * slabs * task.splits,
                         Multiplier::kThreads,
                         ConvShared<Multiplier>::kBytes,
                         nullptr},
                        conv_kernel<Multiplier, product, last, loads>, task)))
    return false;
  const int64_t threads = task.m * ((task.n + 1) / 2) + task.m;
  return task.splits == 1 || succeeded(launch({{"reduce"},
                                               (threads + kReduceThreads - 1) / kReduceThreads * slabs,
                                               kReduceThreads,
                                               sizeof(ConvWindow),
                                               nullptr},
                                              conv_reduce_kernel<S, product, last>, task));
}

// The output, or with shape.gradient the gradient of x.
template <class Multiplier, bool last, Loads loads>
bool output_is_right(const Case& c, Path path, int splits, bool folded) {
  using S = typename Multiplier::S;
  const ConvShape& s = c.shape;
  const int inputs = c.groups * c.inputs, outputs = c.groups * c.outputs, taps = area(s.kernel);
  const Image x{last, inputs, s.in[1], s.in[2]}, y{last, outputs, s.out[1], s.out[2]};
  const Image &from = s.gradient ? y : x, &to = s.gradient ? x : y;
  const int from_channels = s.gradient ? c.outputs : c.inputs, to_channels = s.gradient ? c.inputs : c.outputs;
  const auto count = [&](const Image& image) {
    return static_cast<size_t>(c.batch * image.channels * image.height * image.width);
  };
  const auto data = random<S>(count(from), 1), saved = random<S>(count(from), 2);
  const auto w = random<S>(static_cast<size_t>(outputs * c.inputs * taps), 3),
             bias = random<S>(static_cast<size_t>(to.channels), 4);
  const Guarded<S> result(count(to));
  std::vector<int> expected(count(to));
  for (int b = 0; b < c.batch; ++b)
    for (int k = 0; k < to.channels; ++k)
      for (int h = 0; h < to.height; ++h)
        for (int v = 0; v < to.width; ++v) expected[to.at(b, k, h, v)] = got(bias[static_cast<size_t>(k)]);
  for_all(c, [&](int b, int k, int i, int ph, int pw, int h, int v, int tap) {
    const size_t read = s.gradient ? from.at(b, k, ph, pw) : from.at(b, i, h, v);
    const int row = s.gradient ? i : k, channel = s.gradient ? k % c.outputs : i % c.inputs;
    const int value = folded && got(saved[read]) <= 0 ? 0 : got(data[read]);
    expected[s.gradient ? to.at(b, i, h, v) : to.at(b, k, ph, pw)] +=
        value * got(w[static_cast<size_t>((row * taps + tap) * from_channels + channel)]);
  });

  const Image filters{true, from_channels, s.kernel[1], s.kernel[2]};
  ConvOperand<S> image = from.operand(data.get(), c.groups, folded ? Path::registers : path);
  ConvOperand<S> filter = filters.operand(w.get(), 1, path);
  image.saved = saved.get();
  filter.group_stride = int64_t{to_channels} * taps * from_channels;
  ConvTask<S> task{};
  task.shape = s;
  task.batch = c.batch;
  task.phases = phase_count(s);
  task.groups = c.groups;
  const int64_t positions = int64_t{c.batch} * axis_of(s, 1, 0).positions * axis_of(s, 2, 0).positions;
  task.m = last ? positions : to_channels;
  task.n = last ? to_channels : positions;
  task.a = last ? image : filter;
  task.b = last ? filter : image;
  task.slope.kind = folded ? ActivationKind::relu : ActivationKind::identity;
  const ConvOperand<S> place = to.operand(result.get(), c.groups, path);
  task.target = {place.group_stride,
                 place.image_stride,
                 {place.stride[0], place.stride[1], place.stride[2]},
                 place.channel_stride,
                 bias.get(),
                 ActivationKind::identity,
                 {},
                 result.get(),
                 nullptr,
                 true};
  task.target.pairs = reinterpret_cast<uintptr_t>(result.get()) % (2 * sizeof(S)) == 0;
  plan<Multiplier>(task, int64_t{taps} * from_channels, splits);
  const Guarded<typename Multiplier::C> partial(
      static_cast<size_t>(splits * task.phases * task.groups * task.m * (task.n + 1)));
  task.partial = partial.get();
  if (!launched<Multiplier, ConvProduct::output, last, loads>(task)) return false;
  for (size_t i = 0; i < expected.size(); ++i)
    if (got(result[i]) != expected[i]) return false;
  return true;
}

// grad_w of filters with taps or channels innermost, and grad_bias.
template <class Multiplier, bool last, Loads loads>
bool weight_is_right(const Case& c, Path path, int splits, bool folded, bool taps_innermost) {
  using S = typename Multiplier::S;
  const ConvShape& s = c.shape;
  const int inputs = c.groups * c.inputs, outputs = c.groups * c.outputs, taps = area(s.kernel);
  const Image x{last, inputs, s.in[1], s.in[2]}, y{last, outputs, s.out[1], s.out[2]};
  const size_t xs = static_cast<size_t>(c.batch * inputs * area(s.in)),
               ys = static_cast<size_t>(c.batch * outputs * area(s.out));
  const auto data = random<S>(xs, 1), g = random<S>(ys, 2), saved = random<S>(ys, 3);
  const size_t ws = static_cast<size_t>(outputs * c.inputs * taps);
  const Guarded<S> grad_w(ws), grad_bias(static_cast<size_t>(outputs));
  const auto slope = [&](size_t i) { return folded && got(saved[i]) <= 0 ? 0 : got(g[i]); };
  const Image filter{!taps_innermost, c.inputs, s.kernel[1], s.kernel[2]};
  std::vector<int> expected(ws), sums(static_cast<size_t>(outputs));
  for_all(c, [&](int b, int k, int i, int ph, int pw, int h, int v, int tap) {
    expected[filter.at(k, i % c.inputs, tap / s.kernel[2], tap % s.kernel[2])] +=
        slope(y.at(b, k, ph, pw)) * got(data[x.at(b, i, h, v)]);
  });
  for (int b = 0; b < c.batch; ++b)
    for (int k = 0; k < outputs; ++k)
      for (int h = 0; h < s.out[1]; ++h)
        for (int v = 0; v < s.out[2]; ++v) sums[static_cast<size_t>(k)] += slope(y.at(b, k, h, v));

  ConvTask<S> task{};
  task.shape = s;
  task.batch = c.batch;
  task.phases = 1;
  task.groups = c.groups;
  task.m = c.outputs;
  task.n = int64_t{c.inputs} * taps;
  task.a = y.operand(g.get(), c.groups, folded ? Path::registers : path);
  task.a.saved = saved.get();
  task.b = x.operand(data.get(), c.groups, path);
  task.slope.kind = folded ? ActivationKind::relu : ActivationKind::identity;
  const ConvOperand<S> place = filter.operand(grad_w.get(), 1, path);
  task.target = {c.outputs * place.image_stride,
                 place.image_stride,
                 {place.stride[0], place.stride[1], place.stride[2]},
                 place.channel_stride,
                 nullptr,
                 ActivationKind::identity,
                 {},
                 grad_w.get(),
                 nullptr,
                 false};
  task.row_sums = grad_bias.get();
  plan<Multiplier>(task, int64_t{c.batch} * area(s.out), splits);
  const Guarded<typename Multiplier::C> partial(static_cast<size_t>(splits * task.groups * task.m * (task.n + 2)));
  task.partial = partial.get();
  if (!launched<Multiplier, ConvProduct::weight, last, loads>(task)) return false;
  for (size_t i = 0; i < ws; ++i)
    if (got(grad_w[i]) != expected[i]) return false;
  for (size_t i = 0; i < sums.size(); ++i)
    if (got(grad_bias[i]) != sums[i]) return false;
  return true;
}

// The filters of a group by input channel, of two groups of 3 x 2 channels and 4 taps.
bool filters_are_right() {
  constexpr int64_t groups = 2, outputs = 3, inputs = 2, taps = 4, count = groups * outputs * inputs * taps;
  const Guarded<bf16_t> from(count), to(count);
  for (size_t i = 0; i < count; ++i) put(static_cast<int>(i), &from[i]);
  const FiltersTask<bf16_t> task{from.get(), to.get(), count,        inputs, taps, outputs, outputs * inputs * taps,
                                 taps,       1,        inputs * taps};
  if (!succeeded(launch({{"filters"}, 1, kFiltersThreads, 0, nullptr}, filters_kernel<bf16_t>, task))) return false;
  size_t next = 0;
  for (int64_t group = 0; group < groups; ++group)
    for (int64_t i = 0; i < inputs; ++i)
      for (int64_t tap = 0; tap < taps; ++tap)
        for (int64_t k = 0; k < outputs; ++k)
          if (got(to[next++]) != ((group * outputs + k) * inputs + i) * taps + tap) return false;
  return true;
}

bool all_are_right() {
  ConvShape gradient = kStrided;
  gradient.gradient = true;
  using Half = Mma16<bf16_t, 2, 2, 32, 32, true, true>;
  using Weight = Mma16<bf16_t, 2, 2, 32, 32, false, false>;
  using Float = Simt<float, 4, 2, 1>;
  const Case vectors{2, 1, 24, 10, kDilated}, few{2, 2, 3, 5, kDilated}, back{3, 2, 5, 24, gradient},
      sums{2, 2, 8, 8, kStrided};
  return output_is_right<Half, true, Loads::async>(vectors, Path::vectors, 1, false) &&
         output_is_right<Half, true, Loads::folded>(back, Path::vectors, 2, true) &&
         output_is_right<Half, false, Loads::folded>(few, Path::registers, 1, false) &&
         output_is_right<Float, true, Loads::async>(few, Path::elements, 1, false) &&
         output_is_right<Float, false, Loads::async>(back, Path::elements, 2, false) &&
         weight_is_right<Weight, true, Loads::async>(sums, Path::vectors, 1, false, false) &&
         weight_is_right<Weight, false, Loads::folded>({2, 1, 3, 5, kDilated}, Path::registers, 2, true, true) &&
         weight_is_right<Float, true, Loads::async>(sums, Path::vectors, 2, false, true) &&
         weight_is_right<Float, false, Loads::async>(sums, Path::elements, 1, false, false) && filters_are_right();
}

}  // namespace
}  // namespace fastops::cuda

int main() { return in_every_schedule(fastops::cuda::all_are_right); }
