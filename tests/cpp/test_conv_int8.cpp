// int8 convolutions on every tier: the bits that the contract describes, whose integer sum and float32 arithmetic plain
// loops repeat here. Every buffer is exactly as large as the contract says and lies against a page that must not be
// touched.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "products.h"
#include "random.h"

namespace {

enum class Y { levels, floats };

struct Case {
  ConvGeometry geometry;
  bool float_x = false;
  Layout x_layout = Layout::channels_last, y_layout = Layout::channels_last;
  Y y = Y::levels;
  ActivationKind kind = ActivationKind::identity;
  bool residual = false, extreme = false;
  int x_zero = 128, y_low = 0, y_high = 255;
};

ConvGeometry make(int64_t batch, int64_t in, int64_t out, int64_t groups, int64_t height, int64_t width,
                  int64_t kernel_h, int64_t kernel_w, int64_t stride = 1, int64_t padding = 0, int64_t dilation = 1) {
  ConvGeometry g{batch,
                 in,
                 out,
                 groups,
                 {1, height, width},
                 {1, 0, 0},
                 {1, kernel_h, kernel_w},
                 {1, stride, stride},
                 {0, padding, padding},
                 {1, dilation, dilation}};
  for (int i = 1; i < 3; ++i)
    g.out[i] = std::max<int64_t>((g.in[i] + 2 * padding - dilation * (g.kernel[i] - 1) - 1) / stride + 1, 0);
  return g;
}

int64_t volume(const int64_t* size) { return size[0] * size[1] * size[2]; }
int64_t image_at(Layout layout, int64_t channels, int64_t volume, int64_t b, int64_t c, int64_t position) {
  return layout == Layout::channels_last ? (b * volume + position) * channels + c
                                         : (b * channels + c) * volume + position;
}

void fail(const Case& c, const char* what, int64_t at, double got, double wanted) {
  if (++failures > 20) return;
  const ConvGeometry& g = c.geometry;
  std::printf("FAIL %s %s[%lld] = %.9g, wanted %.9g (", isa_name(isa_used()), what, static_cast<long long>(at), got,
              wanted);
  for (const int64_t size : {g.batch, g.in_channels, g.out_channels, g.groups, g.in[1], g.in[2], g.kernel[1],
                             g.kernel[2], g.stride[1], g.padding[1], g.dilation[1]})
    std::printf("%lld ", static_cast<long long>(size));
  std::printf("float x %d, y %d, layouts %d %d, activation %d, residual %d, zero %d)\n", c.float_x,
              static_cast<int>(c.y), static_cast<int>(c.x_layout), static_cast<int>(c.y_layout),
              static_cast<int>(c.kind), c.residual, c.x_zero);
}

template <class T>
void test(const Case& c) {
  const ConvGeometry& g = c.geometry;
  const int64_t in_volume = volume(g.in), out_volume = volume(g.out), taps = volume(g.kernel);
  const int64_t channels = g.in_channels / g.groups, outputs = g.out_channels / g.groups;
  const int64_t x_size = g.batch * g.in_channels * in_volume, y_size = g.batch * g.out_channels * out_volume;
  ConvInt8Forward call{.dtype = kDType<T>,
                       .geometry = g,
                       .float_x = c.float_x,
                       .float_y = c.y == Y::floats,
                       .x_layout = c.x_layout,
                       .y_layout = c.y_layout,
                       .x_zero = c.x_zero,
                       .x_inverse = 37.5f,
                       .with_residual = c.residual,
                       .residual_scale = 0.37f,
                       .activation = {c.kind},
                       .y_factor = c.kind == ActivationKind::identity ? 1.0f : 3.25f,
                       .y_offset = c.kind == ActivationKind::identity ? 0.0f : 17.5f,
                       .y_low = c.y_low,
                       .y_high = c.y_high};
  const Guarded<T> x(c.float_x ? x_size : 0, coin());
  const Guarded<uint8_t> x_levels(c.float_x ? 0 : x_size, coin());
  const Guarded<int8_t> w(g.out_channels * channels * taps, coin());
  const Guarded<float> multiplier(g.out_channels, coin()), offset(g.out_channels, coin());
  const Guarded<uint8_t> residual(c.residual ? y_size : 0, coin());
  std::normal_distribution<double> normal(0, 2);
  if (c.float_x)
    for (int64_t i = 0; i < x_size; ++i)
      x[i] = narrow<T>(c.extreme && between(0, 9) == 0 ? (coin()   ? NAN
                                                          : coin() ? INFINITY
                                                                   : -1e30)
                                                       : normal(generator));
  for (int64_t i = 0; i < (c.float_x ? 0 : x_size); ++i)
    x_levels[i] = static_cast<uint8_t>(c.extreme ? 255 : between(0, 255));
  for (int64_t i = 0; i < g.out_channels * channels * taps; ++i)
    w[i] = static_cast<int8_t>(c.extreme ? (i / (channels * taps) % 2 == 0 ? -128 : 127) : between(-128, 127));
  const float typical = 60.0f / (4000.0f * std::sqrt(static_cast<float>(channels * taps) + 1));
  for (int64_t k = 0; k < g.out_channels; ++k) {
    multiplier[k] = k % 7 == 3 ? 0 : typical * static_cast<float>(between(-10, 20)) / 10;
    offset[k] = c.extreme && k % 5 == 1 ? NAN : static_cast<float>(between(-800, 3000)) / 10;
  }
  for (int64_t i = 0; i < (c.residual ? y_size : 0); ++i) residual[i] = static_cast<uint8_t>(between(0, 255));

  std::vector<uint8_t> first;
  for (const Team& team : kTeams)
    for (const bool packed : {false, true}) {
      const Guarded<T> floats(c.y == Y::floats ? y_size : 0, coin());
      const Guarded<uint8_t> levels(c.y == Y::floats ? 0 : y_size, coin());
      const ConvInt8Forward::Pointers pointers{c.float_x ? static_cast<const void*>(x.data()) : x_levels.data(),
                                               w.data(),
                                               multiplier.data(),
                                               offset.data(),
                                               c.residual ? residual.data() : nullptr,
                                               c.y == Y::floats ? static_cast<void*>(floats.data()) : levels.data()};
      if (packed)
        run_packed(call, pointers, team, coin());
      else
        run_call(call, pointers, team);
      const uint8_t* const bytes = static_cast<const uint8_t*>(pointers.y);
      const std::vector<uint8_t> got(bytes, bytes + (c.y == Y::floats ? y_size * int64_t{sizeof(T)} : y_size));
      if (first.empty()) first = got;
      if (got != first) fail(c, packed ? "packed" : "team", team.threads, 0, 0);
    }

  std::vector<int> q(static_cast<size_t>(x_size));
  for (int64_t i = 0; i < x_size; ++i) {
    float level = c.float_x ? static_cast<float>(widen(x[i])) * call.x_inverse + static_cast<float>(c.x_zero)
                            : static_cast<float>(x_levels[i]);
    level = std::isnan(level) ? 0 : std::min(std::max(level, 0.0f), 255.0f);
    q[static_cast<size_t>(i)] = static_cast<int>(std::nearbyint(level));
  }
  const Layout x_layout = c.float_x ? c.x_layout : Layout::channels_last;
  for (int64_t b = 0; b < g.batch; ++b)
    for (int64_t p = 0; p < out_volume; ++p)
      for (int64_t k = 0; k < g.out_channels; ++k) {
        const int64_t at[2] = {p / g.out[2], p % g.out[2]};
        int64_t sum = 0;
        for (int64_t r = 0; r < taps; ++r) {
          const int64_t h = at[0] * g.stride[1] - g.padding[1] + r / g.kernel[2] * g.dilation[1];
          const int64_t v = at[1] * g.stride[2] - g.padding[2] + r % g.kernel[2] * g.dilation[2];
          if (h < 0 || h >= g.in[1] || v < 0 || v >= g.in[2]) continue;
          for (int64_t j = 0; j < channels; ++j)
            sum += (q[static_cast<size_t>(
                        image_at(x_layout, g.in_channels, in_volume, b, k / outputs * channels + j, h * g.in[2] + v))] -
                    c.x_zero) *
                   int64_t{w[(k * taps + r) * channels + j]};
        }
        const int64_t place = (b * out_volume + p) * g.out_channels + k;
        float v = static_cast<float>(sum) * multiplier[k];
        v = v + offset[k];
        if (c.residual) {
          const float added = static_cast<float>(residual[place]) * call.residual_scale;
          v = v + added;
        }
        double wanted = c.kind == ActivationKind::relu6 ? std::min(std::max(double{v}, 0.0), 6.0) : activate(c.kind, v);
        if (std::isnan(v)) wanted = NAN;
        const bool exact = c.kind != ActivationKind::silu;
        if (c.y == Y::levels) {
          float level = static_cast<float>(wanted);
          if (c.kind != ActivationKind::identity) {
            level = level * call.y_factor;
            level = level + call.y_offset;
          }
          level = std::isnan(level)
                      ? static_cast<float>(c.y_low)
                      : std::min(std::max(level, static_cast<float>(c.y_low)), static_cast<float>(c.y_high));
          const int got = first[static_cast<size_t>(place)], nearest = static_cast<int>(std::nearbyint(level));
          if (got != nearest && (exact || std::fabs(static_cast<float>(got) - level) > 0.501f))
            fail(c, "y", place, got, nearest);
          continue;
        }
        T value;
        std::memcpy(
            &value,
            first.data() + sizeof(T) * static_cast<size_t>(image_at(c.y_layout, g.out_channels, out_volume, b, k, p)),
            sizeof value);
        const double got = widen(value), rounded = widen(narrow<T>(wanted));
        const double slack = exact ? 0 : 8 * unit_roundoff(kDType<T>) * std::fabs(wanted) + 1e-7;
        if (got != rounded && !(std::isnan(got) && std::isnan(v)) && !(std::fabs(got - rounded) <= slack))
          fail(c, "y", place, got, rounded);
      }
}

// The same convolution with all that a call may differ in.
template <class T>
void vary(const ConvGeometry& g) {
  Case c{g};
  c.float_x = coin();
  c.x_layout = coin() ? Layout::channels_last : Layout::channels_first;
  c.y_layout = coin() ? Layout::channels_last : Layout::channels_first;
  c.y = coin() ? Y::levels : Y::floats;
  const ActivationKind kinds[] = {ActivationKind::identity, ActivationKind::identity, ActivationKind::relu,
                                  ActivationKind::relu6, ActivationKind::silu};
  c.kind = kinds[between(0, 4)];
  c.residual = coin();
  c.extreme = between(0, 4) == 0;
  const int zeros[] = {0, 255, 128, 3};
  c.x_zero = zeros[between(0, 3)];
  c.y_low = coin() ? 0 : 40;
  c.y_high = coin() ? 255 : 200;
  test<T>(c);
}

}  // namespace

int main(int argc, char** argv) {
  return run_tiers(
      argc, argv,
      []<class T>(bool quick) {
        const bool all = kDType<T> == DType::f32;  // the other dtypes differ in the load of x and the store of y
        // Columns and channels from nothing to beyond the largest tile; positions around the tiles' rows.
        for (const int64_t s : {0, 1, 2, 3, 4, 5, 15, 16, 17, 31, 32, 33, 47, 48, 49, 63, 64, 65, 80, 130}) {
          if (!all && s % 5 != 0) continue;
          vary<T>(make(1, 8, s, 1, 3, 3, 1, 1));
          vary<T>(make(1, s, 20, 1, 3, 3, 1, 1));
          vary<T>(make(2, s, s, s == 0 ? 1 : s, 5, 6, 3, 3, 1, 1));
          if (s <= 33) vary<T>(make(1, 4, 70, 1, 1, s, 1, 1));
          if (s <= 33) vary<T>(make(1, 3, 5, 1, s, 4, 3, 2, 1, 1));
        }
        // Strides, paddings, dilations, groups; few channels, whose rows of taps are one piece.
        vary<T>(make(2, 3, 24, 1, 17, 15, 7, 7, 2, 3));
        vary<T>(make(1, 3, 24, 1, 9, 8, 3, 3, 2, 1, 2));
        vary<T>(make(2, 16, 40, 1, 7, 9, 3, 3, 1, 1));
        vary<T>(make(2, 16, 40, 1, 9, 9, 3, 3, 2, 1));
        vary<T>(make(1, 20, 33, 1, 9, 8, 3, 3, 1, 4, 3));
        vary<T>(make(1, 24, 36, 3, 6, 5, 3, 3, 1, 1));
        vary<T>(make(1, 6, 12, 3, 6, 5, 3, 3, 2, 0));
        vary<T>(make(1, 10, 20, 10, 6, 5, 3, 3, 1, 1));
        vary<T>(make(1, 40, 40, 1, 2, 2, 1, 1, 1, 2));
        vary<T>(make(0, 4, 4, 1, 5, 5, 3, 3));
        vary<T>(make(1, 4, 4, 1, 2, 2, 3, 3));
        // Short and long rows, whole ones and a rest; pieces of whole chunks and of parts; no border to copy.
        vary<T>(make(2, 64, 40, 1, 7, 7, 3, 3, 1, 1));
        vary<T>(make(1, 64, 33, 1, 4, 35, 3, 3, 1, 1));
        vary<T>(make(2, 24, 70, 1, 3, 20, 1, 3, 1, 0));
        vary<T>(make(2, 128, 20, 1, 9, 18, 3, 3, 2, 0));
        vary<T>(make(1, 40, 20, 1, 20, 35, 1, 1, 2, 0));
        vary<T>(make(2, 128, 66, 2, 5, 6, 3, 3, 1, 1, 2));
        vary<T>(make(3, 72, 50, 1, 5, 7, 1, 1, 1, 0));
        // Depthwise: more and fewer taps than a group of four, steps, wide rows.
        vary<T>(make(1, 70, 70, 70, 9, 11, 3, 3, 2, 1));
        vary<T>(make(2, 20, 20, 20, 7, 13, 5, 5, 1, 2));
        vary<T>(make(1, 33, 33, 33, 8, 8, 2, 4, 1, 0));
        vary<T>(make(1, 16, 16, 16, 9, 9, 3, 3, 1, 2, 2));
        vary<T>(make(1, 9, 9, 9, 12, 12, 7, 7, 3, 3));
        vary<T>(make(1, 2, 2, 2, 25, 25, 23, 23, 1, 0));
        // Blocks for several threads, by positions and by columns; deep sums.
        if (all) {
          vary<T>(make(2, 64, 72, 1, 12, 12, 1, 1));
          vary<T>(make(1, 32, 300, 1, 5, 5, 3, 3, 1, 1));
          vary<T>(make(1, 600, 130, 1, 4, 4, 1, 1));
          Case most{make(1, kMostInt8Products, 3, 1, 1, 1, 1, 1)};
          most.extreme = true;
          most.y = Y::floats;
          for (const int zero : {0, 255}) {
            most.x_zero = zero;
            test<T>(most);
          }
        }
        for (int i = 0; i < (quick ? 10 : all ? 60 : 15); ++i) {
          const int64_t groups = coin() ? 1 : between(1, 4), kernel = between(1, 4);
          vary<T>(make(between(1, 3), groups * between(1, 40), groups * between(1, 40), groups, between(4, 10),
                       between(4, 10), kernel, between(1, 4), between(1, 3), between(0, 3), between(1, 2)));
        }
      },
      false, true);
}
