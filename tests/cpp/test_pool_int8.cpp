// Pools of uint8 images on every tier: the levels that the contract describes, by plain loops. Buffers are exactly as
// large as it says and lie against pages that must not be touched.
#include <algorithm>
#include <cmath>

#include "products.h"
#include "random.h"

namespace {

template <class T>
void test(const PoolGeometry& g, bool average, bool float_y, bool include, int64_t divisor_override) {
  const PoolInt8Forward call{.dtype = kDType<T>,
                             .geometry = g,
                             .average = average,
                             .float_y = float_y,
                             .count_include_pad = include,
                             .divisor_override = divisor_override,
                             .zero = average ? static_cast<int>(between(0, 255)) : 0,
                             .factor = 0.75f,
                             .offset = 100.25f};
  const int64_t pixels = g.in[0] * g.in[1] * g.in[2], outputs = g.out[0] * g.out[1] * g.out[2];
  const int64_t size = g.batch * outputs * g.channels;
  const Guarded<uint8_t> x(g.batch * pixels * g.channels, coin());
  for (int64_t i = 0; i < g.batch * pixels * g.channels; ++i) x[i] = static_cast<uint8_t>(between(0, 255));
  Bits bits;
  for (const Team& team : kTeams) {
    const Guarded<uint8_t> levels(float_y ? 0 : size, coin());
    const Guarded<T> floats(float_y ? size : 0, coin());
    run_call(call, {x.data(), float_y ? static_cast<void*>(floats.data()) : levels.data()}, team);
    bits.same("pool_int8", team,
              {{float_y ? static_cast<void*>(floats.data()) : levels.data(),
                static_cast<size_t>(size) * (float_y ? sizeof(T) : 1)}});
    if (team.threads > 1) continue;
    for (int64_t b = 0; b < g.batch; ++b)
      for (int64_t p = 0; p < outputs; ++p) {
        int64_t from[3], to[3], step[3], divisor = 1;
        const int64_t at[3] = {p / g.out[2] / g.out[1], p / g.out[2] % g.out[1], p % g.out[2]};
        for (int a = 0; a < 3; ++a) {
          step[a] = g.adaptive ? 1 : g.dilation[a];
          from[a] = g.adaptive ? at[a] * g.in[a] / g.out[a] : at[a] * g.stride[a] - g.padding[a];
          to[a] = g.adaptive ? ((at[a] + 1) * g.in[a] + g.out[a] - 1) / g.out[a] : from[a] + g.kernel[a] * step[a];
          int64_t counted = 0;
          for (int64_t i = from[a]; i < to[a]; i += step[a])
            counted += include && !g.adaptive ? i < g.in[a] + g.padding[a] : i >= 0 && i < g.in[a];
          divisor *= counted;
        }
        for (int64_t c = 0; c < g.channels; ++c) {
          int most = 0, sum = 0;
          for (int64_t d = from[0]; d < to[0]; d += step[0])
            for (int64_t h = from[1]; h < to[1]; h += step[1])
              for (int64_t w = from[2]; w < to[2]; w += step[2]) {
                if (d < 0 || d >= g.in[0] || h < 0 || h >= g.in[1] || w < 0 || w >= g.in[2]) continue;
                const int level = x[((b * pixels) + (d * g.in[1] + h) * g.in[2] + w) * g.channels + c];
                most = std::max(most, level);
                sum += level - call.zero;
              }
          const int64_t place = (b * outputs + p) * g.channels + c;
          if (!average) {
            if (levels[place] != most) expect<float>("maximum", levels[place], most);
            continue;
          }
          const float factor = call.factor / static_cast<float>(divisor_override != 0 ? divisor_override : divisor);
          float v = static_cast<float>(sum) * factor;
          v = v + call.offset;
          if (float_y && widen(floats[place]) != widen(narrow<T>(v)))
            expect<double>("average", widen(floats[place]), v);
          const double level = std::nearbyint(std::min(std::max(v, 0.0f), 255.0f));
          if (!float_y && levels[place] != level) expect<double>("average level", levels[place], level);
        }
      }
  }
}

PoolGeometry make(int64_t batch, int64_t channels, int64_t height, int64_t width, int64_t kernel, int64_t stride,
                  int64_t padding, int64_t dilation = 1) {
  PoolGeometry g{batch,
                 channels,
                 {1, height, width},
                 {1, 0, 0},
                 {1, kernel, kernel},
                 {1, stride, stride},
                 {0, padding, padding},
                 {1, dilation, dilation},
                 false};
  for (int i = 1; i < 3; ++i)
    g.out[i] = (g.in[i] + 2 * padding - dilation * (kernel - 1) - 1 + (coin() ? stride - 1 : 0)) / stride + 1;
  for (int i = 1; i < 3; ++i)  // a window begins in the image or in the padding before it
    if ((g.out[i] - 1) * stride >= g.in[i] + padding) --g.out[i];
  return g;
}

}  // namespace

int main(int argc, char** argv) {
  return run_tiers(
      argc, argv,
      []<class T>(bool) {
        for (const int64_t channels : {1, 15, 16, 17, 63, 64, 65, 130})
          for (const bool average : {false, true}) {
            const bool float_y = average && coin();
            test<T>(make(2, channels, 7, 9, 3, 2, 1), average, float_y, coin(), 0);
            test<T>(make(1, channels, 5, 4, 2, 2, 0), average, float_y, coin(), coin() ? 3 : 0);
            if (!average) test<T>(make(1, channels, 9, 9, 3, 1, 1, 2), false, false, true, 0);
            test<T>({2, channels, {1, 7, 5}, {1, 3, 2}, {}, {}, {}, {}, true}, average, float_y, coin(), 0);
            test<T>({1, channels, {1, 7, 7}, {1, 1, 1}, {}, {}, {}, {}, true}, average, float_y, coin(), 0);
          }
        test<T>(make(0, 4, 5, 5, 3, 2, 1), false, false, true, 0);
        test<T>(make(8, 64, 40, 40, 3, 2, 1), false, false, true, 0);  // for several threads
        test<T>(make(8, 64, 40, 40, 3, 2, 1), true, coin(), true, 0);
      },
      false, true);
}
