// What the C++ tests of the convolutions share: a case with all its operands, run forward, for both gradients and as a
// transposed convolution, against plain loops in float64.
//
// Integer-valued data must match exactly; other data within a bound of the form c k eps sum |a b|. Every operand lies
// against a page that must not be touched, before it or behind it (AddressSanitizer does not see masked vector
// accesses). Each case runs with teams of 1, 2 and 3 threads, and of 3 that get 2, and must give the same bits.
#pragma once

#include <cstdio>
#include <random>

#include "products.h"

namespace {

struct Case {
  ConvGeometry geometry;
  Layout layout = Layout::channels_first, w_layout = Layout::channels_first;
  ActivationKind kind = ActivationKind::identity;
  bool bias = true, z = false, integers = true, at_end = true;
  unsigned outputs = 3;  // of the weight gradient: 1 grad_w, 2 grad_bias
  Bf16Multiply multiply = Bf16Multiply::automatic;
};

inline void fail(const Case& c, DType dtype, const char* what, int64_t at, double got, double expected) {
  if (++failures > 20) return;
  const ConvGeometry& g = c.geometry;
  std::printf("%s dtype %d: %s[%lld] = %.9g, expected %.9g (batch %lld channels %lld -> %lld groups %lld",
              isa_name(isa_used()), static_cast<int>(dtype), what, static_cast<long long>(at), got, expected,
              static_cast<long long>(g.batch), static_cast<long long>(g.in_channels),
              static_cast<long long>(g.out_channels), static_cast<long long>(g.groups));
  const char* const names[6] = {"in", "out", "kernel", "stride", "padding", "dilation"};
  const int64_t* const sizes[6] = {g.in, g.out, g.kernel, g.stride, g.padding, g.dilation};
  for (int i = 0; i < 6; ++i)
    std::printf(", %s %lld %lld %lld", names[i], static_cast<long long>(sizes[i][0]),
                static_cast<long long>(sizes[i][1]), static_cast<long long>(sizes[i][2]));
  std::printf(", layouts %d %d, activation %d, bias %d, z %d, integers %d, outputs %u, multiply %d)\n",
              static_cast<int>(c.layout), static_cast<int>(c.w_layout), static_cast<int>(c.kind), c.bias, c.z,
              c.integers, c.outputs, static_cast<int>(c.multiply));
}

inline int64_t volume(const int64_t* size) { return size[0] * size[1] * size[2]; }

// Where element (b, c, position) of a dense image lies.
inline int64_t image_at(Layout layout, int64_t channels, int64_t volume, int64_t b, int64_t c, int64_t position) {
  return layout == Layout::channels_last ? (b * volume + position) * channels + c
                                         : (b * channels + c) * volume + position;
}

// body(x index, w index, y index, x step, w step, n) for the products of an output with n input channels at one tap.
template <class Body>
void for_channels(const Case& test, Body&& body) {
  const ConvGeometry& g = test.geometry;
  const int64_t channels = g.in_channels / g.groups, outputs = g.out_channels / g.groups;
  const int64_t in_volume = volume(g.in), out_volume = volume(g.out), taps = volume(g.kernel);
  const bool w_last = test.w_layout == Layout::channels_last;
  const int64_t x_step = test.layout == Layout::channels_last ? 1 : in_volume, w_step = w_last ? 1 : taps;
  for (int64_t p = 0; p < out_volume; ++p)
    for (int64_t r = 0; r < taps; ++r) {
      const int64_t position[3] = {p / g.out[2] / g.out[1], p / g.out[2] % g.out[1], p % g.out[2]};
      const int64_t tap[3] = {r / g.kernel[2] / g.kernel[1], r / g.kernel[2] % g.kernel[1], r % g.kernel[2]};
      int64_t q = 0;
      bool inside = true;
      for (int d = 0; d < 3; ++d) {
        const int64_t at = position[d] * g.stride[d] - g.padding[d] + tap[d] * g.dilation[d];
        inside = inside && at >= 0 && at < g.in[d];
        q = q * g.in[d] + at;
      }
      if (!inside) continue;
      for (int64_t b = 0; b < g.batch; ++b)
        for (int64_t k = 0; k < g.out_channels; ++k)
          body(image_at(test.layout, g.in_channels, in_volume, b, k / outputs * channels, q),
               k * channels * taps + r * (w_last ? channels : 1),
               image_at(test.layout, g.out_channels, out_volume, b, k, p), x_step, w_step, channels);
    }
}

// body(x index, w index, y index) for every product of the convolution.
template <class Body>
void for_products(const Case& test, Body&& body) {
  for_channels(test, [&](int64_t x_at, int64_t w_at, int64_t y_at, int64_t x_step, int64_t w_step, int64_t n) {
    for (int64_t i = 0; i < n; ++i) body(x_at + i * x_step, w_at + i * w_step, y_at);
  });
}

// A sum and the sum of its terms' magnitudes.
struct Sum {
  double value = 0, magnitude = 0;
  void add(double a, double b, double scale) {
    value += a * b;
    magnitude += scale * std::fabs(b);
  }
};

template <class T>
class Test {
 public:
  Test(const Case& test, unsigned seed)
      : c(test),
        g(test.geometry),
        x_size(g.batch * g.in_channels * volume(g.in)),
        w_size(g.out_channels * (g.in_channels / g.groups) * volume(g.kernel)),
        y_size(g.batch * g.out_channels * volume(g.out)),
        x(x_size, c.at_end),
        w(w_size, c.at_end),
        grad_y(y_size, c.at_end),
        saved(y_size, c.at_end),
        bias(g.out_channels, c.at_end),
        in_bias(g.in_channels, c.at_end) {
    std::mt19937 random(seed);
    std::uniform_int_distribution<int> integer(-3, 3);
    std::normal_distribution<double> normal(0, 1);
    const auto draw = [&] { return c.integers ? integer(random) : normal(random); };
    x.fill(draw);
    w.fill(draw);
    grad_y.fill(draw);
    saved.fill([&] { return c.kind == ActivationKind::tanh ? std::tanh(draw()) : draw(); });
    bias.fill(draw);
    in_bias.fill(draw);
    x_values = widened(x, x_size);
    w_values = widened(w, w_size);
  }

  void forward() const {
    std::vector<Sum> expected(static_cast<size_t>(y_size));
    for_channels(c, [&](int64_t x_at, int64_t w_at, int64_t y_at, int64_t x_step, int64_t w_step, int64_t n) {
      const double *from = x_values.data() + x_at, *by = w_values.data() + w_at;
      Sum sum;
      for (int64_t i = 0; i < n; ++i, from += x_step, by += w_step) sum.add(*from, *by, std::fabs(*from));
      expected[static_cast<size_t>(y_at)].value += sum.value;
      expected[static_cast<size_t>(y_at)].magnitude += sum.magnitude;
    });
    const ConvForward call{.dtype = kDType<T>,
                           .layout = c.layout,
                           .w_layout = c.w_layout,
                           .geometry = g,
                           .with_bias = c.bias,
                           .activation = {c.kind},
                           .with_z = c.z};
    const T* const b = c.bias ? bias.data() : nullptr;
    const std::vector<T> bits =
        images(expected, g.out_channels, volume(g.out), c.bias ? &bias : nullptr, "y", 0,
               [&](T* y, T* z, const Team& team) { run_call(call, {x.data(), w.data(), b, y, z}, team, c.multiply); });
    const Team& team = kTeams[g.out_channels % 4];  // one team a case is enough
    const Guarded<T> y(y_size, c.at_end), z(c.z ? y_size : 0, c.at_end);
    run_packed(call, {x.data(), w.data(), b, y.data(), c.z ? z.data() : nullptr}, team, c.at_end, c.multiply);
    if (!same_bits(joined(y, z), bits)) fail(c, kDType<T>, "y with packed weights", team.threads, 0, 0);
  }

  // As the gradient of x and as a transposed convolution with bias and an activation.
  void backward_input(bool transposed_convolution) const {
    const ActivationKind before = transposed_convolution ? ActivationKind::identity : c.kind;
    std::vector<Sum> expected(static_cast<size_t>(x_size));
    const std::vector<Gradient> gradients = gradients_of(before);
    for_channels(c, [&](int64_t x_at, int64_t w_at, int64_t y_at, int64_t x_step, int64_t w_step, int64_t n) {
      const Gradient gradient = gradients[static_cast<size_t>(y_at)];
      Sum* to = expected.data() + x_at;
      const double* by = w_values.data() + w_at;
      for (int64_t i = 0; i < n; ++i, to += x_step, by += w_step) to->add(gradient.value, *by, gradient.scale);
    });
    const bool biased = transposed_convolution && c.bias;
    const ActivationKind after = transposed_convolution ? c.kind : ActivationKind::identity;
    const ConvBackwardInput call{.dtype = kDType<T>,
                                 .layout = c.layout,
                                 .w_layout = c.w_layout,
                                 .geometry = g,
                                 .activation = {before},
                                 .with_bias = biased,
                                 .epilogue = {after},
                                 .with_z = c.z};
    const T* const kept = before == ActivationKind::identity ? nullptr : saved.data();
    const T* const b = biased ? in_bias.data() : nullptr;
    images(
        expected, g.in_channels, volume(g.in), biased ? &in_bias : nullptr, "grad_x", slack(before),
        [&](T* to, T* z, const Team& team) {
          run_call(call, {grad_y.data(), kept, w.data(), b, to, z}, team, c.multiply);
        },
        after, exact(before));
  }

  void backward_weight() const {
    std::vector<Sum> w_expected(static_cast<size_t>(w_size)), bias_expected(static_cast<size_t>(g.out_channels));
    const std::vector<Gradient> gradients = gradients_of(c.kind);
    for_channels(c, [&](int64_t x_at, int64_t w_at, int64_t y_at, int64_t x_step, int64_t w_step, int64_t n) {
      const Gradient gradient = gradients[static_cast<size_t>(y_at)];
      Sum* to = w_expected.data() + w_at;
      const double* by = x_values.data() + x_at;
      for (int64_t i = 0; i < n; ++i, to += w_step, by += x_step) to->add(gradient.value, *by, gradient.scale);
    });
    const int64_t positions = volume(g.out);
    for (int64_t b = 0; b < g.batch; ++b)
      for (int64_t k = 0; k < g.out_channels; ++k)
        for (int64_t p = 0; p < positions; ++p) {
          const int64_t at = image_at(c.layout, g.out_channels, positions, b, k, p);
          const Gradient gradient = gradients[static_cast<size_t>(at)];
          bias_expected[static_cast<size_t>(k)].add(gradient.value, 1, gradient.scale);
        }
    std::vector<T> first_w, first_bias;
    const bool with_w = (c.outputs & 1) != 0, with_bias = (c.outputs & 2) != 0;
    const ConvBackwardWeight call{.dtype = kDType<T>,
                                  .layout = c.layout,
                                  .w_layout = c.w_layout,
                                  .geometry = g,
                                  .activation = {c.kind},
                                  .with_grad_w = with_w,
                                  .with_grad_bias = with_bias};
    for (const Team& team : kTeams) {
      const Guarded<T> grad_w(with_w ? w_size : 0, c.at_end);
      const Guarded<T> grad_bias(with_bias ? g.out_channels : 0, c.at_end);
      run_call(call,
               {.grad_y = grad_y.data(),
                .saved = c.kind == ActivationKind::identity ? nullptr : saved.data(),
                .x = with_w ? x.data() : nullptr,
                .grad_w = with_w ? grad_w.data() : nullptr,
                .grad_bias = with_bias ? grad_bias.data() : nullptr},
               team, c.multiply);
      if (&team != kTeams) {
        if (!same_bits(grad_w.values(), first_w) || !same_bits(grad_bias.values(), first_bias))
          fail(c, kDType<T>, "weight gradient with another team", team.threads, 0, 0);
        continue;
      }
      first_w = grad_w.values();
      first_bias = grad_bias.values();
      const int64_t length = g.batch * positions;
      for (int64_t i = 0; with_w && i < w_size; ++i) {
        const Sum& sum = w_expected[static_cast<size_t>(i)];
        if (!close(grad_w[i], sum.value, sum.magnitude, length, exact(c.kind), slack(c.kind)))
          fail(c, kDType<T>, "grad_w", i, grad_w(i), sum.value);
      }
      for (int64_t i = 0; with_bias && i < g.out_channels; ++i) {
        const Sum& sum = bias_expected[static_cast<size_t>(i)];
        if (!close(grad_bias[i], sum.value, sum.magnitude, length, exact(c.kind), slack(c.kind)))
          fail(c, kDType<T>, "grad_bias", i, grad_bias(i), sum.value);
      }
    }
  }

 private:
  static constexpr double kCompute = kDType<T> == DType::f64 ? 0x1p-53 : 0x1p-24;

  bool exact(ActivationKind kind) const {
    return c.integers && (kind == ActivationKind::identity || kind == ActivationKind::relu);
  }
  // What the derivative rounds; a 16-bit product may round g once more.
  static double slack(ActivationKind kind) {
    return kind == ActivationKind::identity ? 0 : 16 * kCompute + (kDType<T> == DType::bf16 ? 0x1p-8 : 0);
  }

  // g, and what its rounding error is relative to: 1 - y^2 cancels, so that is grad_y itself. Formed once for each
  // element of y, which has many products.
  struct Gradient {
    double value, scale;
  };
  std::vector<Gradient> gradients_of(ActivationKind kind) const {
    std::vector<Gradient> all;
    for (int64_t i = 0; i < y_size; ++i) {
      const double factor = kind == ActivationKind::identity ? 1 : derivative(kind, saved(i));
      all.push_back({grad_y(i) * factor, std::fabs(grad_y(i)) * std::max(1.0, std::fabs(factor))});
    }
    return all;
  }

  static std::vector<double> widened(const Guarded<T>& from, int64_t size) {
    std::vector<double> all;
    for (int64_t i = 0; i < size; ++i) all.push_back(from(i));
    return all;
  }

  static std::vector<T> joined(const Guarded<T>& y, const Guarded<T>& z) {
    std::vector<T> both = y.values();
    const std::vector<T> more = z.values();
    both.insert(both.end(), more.begin(), more.end());
    return both;
  }

  // Runs call(y, z, team) with every team; y = kind(expected + bias). Returns y and z.
  template <class Call>
  std::vector<T> images(const std::vector<Sum>& expected, int64_t channels, int64_t positions, const Guarded<T>* added,
                        const char* what, double more_slack, Call&& call, ActivationKind kind, bool exact_sums) const {
    const int64_t size = g.batch * channels * positions;
    std::vector<T> first;
    for (const Team& team : kTeams) {
      const Guarded<T> y(size, c.at_end), z(c.z ? size : 0, c.at_end);
      call(y.data(), c.z ? z.data() : nullptr, team);
      if (&team != kTeams) {
        if (!same_bits(joined(y, z), first)) fail(c, kDType<T>, what, -1, team.threads, 0);
        continue;
      }
      first = joined(y, z);
      const bool linear = kind == ActivationKind::identity || kind == ActivationKind::relu;
      for (int64_t i = 0; i < size; ++i) {
        Sum sum = expected[static_cast<size_t>(i)];
        const int64_t channel = c.layout == Layout::channels_last ? i % channels : i / positions % channels;
        if (added != nullptr) sum.add(1, (*added)(channel), 1);
        const int64_t length = w_size + 1;
        if (c.z && !close(z[i], sum.value, sum.magnitude, length, exact_sums, more_slack))
          fail(c, kDType<T>, "z", i, z(i), sum.value);
        const double value = activate(kind, sum.value);
        if (!close(y[i], value, 1.2 * sum.magnitude, length, exact_sums && linear,
                   more_slack + (linear ? 0 : 8 * kCompute)))
          fail(c, kDType<T>, what, i, y(i), value);
      }
    }
    return first;
  }
  template <class Call>
  std::vector<T> images(const std::vector<Sum>& expected, int64_t channels, int64_t positions, const Guarded<T>* added,
                        const char* what, double more_slack, Call&& call) const {
    return images(expected, channels, positions, added, what, more_slack, call, c.kind, c.integers);
  }

  const Case& c;
  const ConvGeometry& g;
  const int64_t x_size, w_size, y_size;
  Guarded<T> x, w, grad_y, saved, bias, in_bias;
  std::vector<double> x_values, w_values;  // what the references read, again and again
};

template <class T>
void test(const Case& c, unsigned seed) {
  const Test<T> one(c, seed);
  one.forward();
  one.backward_input(false);
  one.backward_input(true);
  if (c.outputs != 0) one.backward_weight();
}

// The geometry with `after` elements of padding behind; out follows.
inline ConvGeometry make(int64_t batch, int64_t in_channels, int64_t out_channels, int64_t groups,
                         const std::vector<int64_t>& in, const std::vector<int64_t>& kernel,
                         const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                         const std::vector<int64_t>& dilation, const std::vector<int64_t>& after) {
  ConvGeometry g{batch, in_channels, out_channels, groups, {1, 1, 1}, {1, 1, 1}, {1, 1, 1}, {1, 1, 1}, {}, {1, 1, 1}};
  const size_t dims = in.size();
  for (size_t i = 0; i < dims; ++i) {
    const size_t d = 3 - dims + i;
    g.in[d] = in[i], g.kernel[d] = kernel[i], g.stride[d] = stride[i], g.padding[d] = padding[i];
    g.dilation[d] = dilation[i];
    const int64_t room = in[i] + padding[i] + after[i] - dilation[i] * (kernel[i] - 1) - 1;
    g.out[d] = room < 0 ? 0 : room / stride[i] + 1;
  }
  return g;
}

}  // namespace
