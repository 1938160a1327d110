// Convolution + activation + max pool, forward and backward, on every tier this machine has, against the three
// operations one after the other in float64: on integer-valued data y, the indices and all gradients match exactly.
// With the pages and the teams of convolutions.h.
#include "convolutions.h"

namespace {

struct PoolCase {
  Case conv;
  int64_t pool[3];
  bool specials;  // NaNs and an infinity in x: forward alone
};

template <class T>
class PoolTest {
 public:
  PoolTest(const PoolCase& test, unsigned seed)
      : c(test.conv),
        g(test.conv.geometry),
        x_size(g.batch * g.in_channels * volume(g.in)),
        w_size(g.out_channels * (g.in_channels / g.groups) * volume(g.kernel)),
        z_size(g.batch * g.out_channels * volume(g.out)),
        pooled{g.out[0] / test.pool[0], g.out[1] / test.pool[1], g.out[2] / test.pool[2]},
        y_size(g.batch * g.out_channels * volume(pooled)),
        x(x_size, c.at_end),
        w(w_size, c.at_end),
        bias(g.out_channels, c.at_end),
        grad_y(y_size, c.at_end),
        expected_y(static_cast<size_t>(y_size)),
        expected_index(static_cast<size_t>(y_size)),
        maximum(static_cast<size_t>(y_size)) {
    std::mt19937 random(seed);
    std::uniform_int_distribution<int> integer(-2, 2);
    const auto draw = [&] { return integer(random); };
    x.fill(draw);
    w.fill(draw);
    bias.fill(draw);
    grad_y.fill(draw);
    for (int i = 0; test.specials && x_size > 0 && i < 3; ++i)
      x[static_cast<int64_t>(random() % static_cast<unsigned>(x_size))] = narrow<T>(i == 2 ? INFINITY : NAN);
    for (int d = 0; d < 3; ++d) pool[d] = test.pool[d];
    reference();
  }

  void forward() const {
    std::vector<T> first_y;
    std::vector<uint8_t> first_indices;
    for (const bool indexed : {true, false})
      for (const Team& team : kTeams) {
        const Guarded<T> y(y_size, c.at_end);
        const GuardedBytes indices(y_size, c.at_end);
        const ConvPoolForward call{.dtype = kDType<T>,
                                   .layout = c.layout,
                                   .w_layout = c.w_layout,
                                   .geometry = g,
                                   .pool = {pool[0], pool[1], pool[2]},
                                   .with_bias = c.bias,
                                   .activation = {c.kind},
                                   .with_indices = indexed};
        const T* const b = c.bias ? bias.data() : nullptr;
        run_call(call, {x.data(), w.data(), b, y.data(), indexed ? indices.data() : nullptr}, team, c.multiply);
        if (indexed && &team == kTeams) {
          first_y = y.values();
          first_indices = indices.values();
        }
        if (!same_bits(y.values(), first_y) || (indexed && indices.values() != first_indices))
          fail(c, kDType<T>, "pooled with another team", team.threads, indexed, 0);
        if (indexed != (team.threads == 2)) continue;  // one way or the other for each team
        run_packed(call, {x.data(), w.data(), b, y.data(), indexed ? indices.data() : nullptr}, team, c.at_end,
                   c.multiply);
        if (!same_bits(y.values(), first_y)) fail(c, kDType<T>, "pooled with packed weights", team.threads, indexed, 0);
      }
    for (int64_t i = 0; i < y_size; ++i) {
      const size_t at = static_cast<size_t>(i);
      const double got = widen(first_y[at]), want = expected_y[at];
      if (!(got == want || (got != got && want != want))) fail(c, kDType<T>, "pooled", i, got, want);
      if (first_indices[at] != expected_index[at])
        fail(c, kDType<T>, "index", i, first_indices[at], expected_index[at]);
    }
  }

  void backward() const {
    std::vector<double> gradient(static_cast<size_t>(z_size));
    for (int64_t i = 0; i < y_size; ++i)
      if (expected_index[static_cast<size_t>(i)] != kNoGradient)
        gradient[static_cast<size_t>(maximum[static_cast<size_t>(i)])] = grad_y(i);
    std::vector<double> want[3] = {std::vector<double>(static_cast<size_t>(x_size)),
                                   std::vector<double>(static_cast<size_t>(w_size)),
                                   std::vector<double>(static_cast<size_t>(g.out_channels))};
    for_products(c, [&](int64_t x_at, int64_t w_at, int64_t z_at) {
      want[0][static_cast<size_t>(x_at)] += gradient[static_cast<size_t>(z_at)] * w(w_at);
      want[1][static_cast<size_t>(w_at)] += gradient[static_cast<size_t>(z_at)] * x(x_at);
    });
    for (int64_t i = 0; i < z_size; ++i) {
      const int64_t k = c.layout == Layout::channels_last ? i % g.out_channels : i / volume(g.out) % g.out_channels;
      want[2][static_cast<size_t>(k)] += gradient[static_cast<size_t>(i)];
    }
    const GuardedBytes indices(y_size, c.at_end);
    std::copy(expected_index.begin(), expected_index.end(), indices.data());
    const char* const names[3] = {"grad_x", "grad_w", "grad_bias"};
    for (unsigned outputs = 1; outputs < 8; ++outputs)
      for (const Team& team : kTeams) {
        const auto size = [&](unsigned i) {
          return (outputs >> i & 1) != 0 ? static_cast<int64_t>(want[i].size()) : 0;
        };
        const Guarded<T> out[3] = {{size(0), c.at_end}, {size(1), c.at_end}, {size(2), c.at_end}};
        const bool with_x = (outputs & 1) != 0, with_w = (outputs & 2) != 0, with_bias = (outputs & 4) != 0;
        const ConvPoolBackward call{.dtype = kDType<T>,
                                    .layout = c.layout,
                                    .w_layout = c.w_layout,
                                    .geometry = g,
                                    .pool = {pool[0], pool[1], pool[2]},
                                    .with_grad_x = with_x,
                                    .with_grad_w = with_w,
                                    .with_grad_bias = with_bias};
        run_call(call,
                 {.grad_y = grad_y.data(),
                  .indices = indices.data(),
                  .x = with_w ? x.data() : nullptr,
                  .w = with_x ? w.data() : nullptr,
                  .grad_x = with_x ? out[0].data() : nullptr,
                  .grad_w = with_w ? out[1].data() : nullptr,
                  .grad_bias = with_bias ? out[2].data() : nullptr},
                 team, c.multiply);
        for (unsigned o = 0; o < 3; ++o)
          for (int64_t i = 0; i < size(o); ++i)
            if (out[o](i) != widen(narrow<T>(want[o][static_cast<size_t>(i)])))
              fail(c, kDType<T>, names[o], i, out[o](i), want[o][static_cast<size_t>(i)]);
      }
  }

 private:
  // Bytes against a page that must not be touched.
  class GuardedBytes {
   public:
    GuardedBytes(int64_t size, bool at_end)
        : size_(static_cast<size_t>(size)), words_((size + 1) / 2, at_end), skip_(at_end ? size % 2 : 0) {}
    uint8_t* data() const { return reinterpret_cast<uint8_t*>(words_.data()) + skip_; }
    std::vector<uint8_t> values() const { return std::vector<uint8_t>(data(), data() + size_); }

   private:
    size_t size_;
    Guarded<bf16_t> words_;
    int64_t skip_;
  };

  void reference() {
    std::vector<double> z(static_cast<size_t>(z_size));
    const bool last = c.layout == Layout::channels_last, relu = c.kind == ActivationKind::relu;
    for (int64_t i = 0; c.bias && i < z_size; ++i)
      z[static_cast<size_t>(i)] = bias(last ? i % g.out_channels : i / volume(g.out) % g.out_channels);
    for_products(c,
                 [&](int64_t x_at, int64_t w_at, int64_t z_at) { z[static_cast<size_t>(z_at)] += x(x_at) * w(w_at); });
    for (int64_t b = 0; b < g.batch; ++b)
      for (int64_t k = 0; k < g.out_channels; ++k)
        for (int64_t p = 0; p < volume(pooled); ++p) {
          const int64_t window[3] = {p / pooled[2] / pooled[1], p / pooled[2] % pooled[1], p % pooled[2]};
          double best = -INFINITY;
          int64_t best_at = -1, index = 0;
          for (int64_t t = 0; t < volume(pool); ++t) {
            const int64_t tap[3] = {t / pool[2] / pool[1], t / pool[2] % pool[1], t % pool[2]};
            int64_t position = 0;
            for (int d = 0; d < 3; ++d) position = position * g.out[d] + window[d] * pool[d] + tap[d];
            const int64_t at = image_at(c.layout, g.out_channels, volume(g.out), b, k, position);
            const double rounded = widen(narrow<T>(z[static_cast<size_t>(at)]));
            const double value = relu && rounded <= 0 ? 0 : rounded;
            if (best_at >= 0 && !(value > best || value != value)) continue;
            best = value;
            best_at = at;
            index = t;
          }
          const size_t at = static_cast<size_t>(image_at(c.layout, g.out_channels, volume(pooled), b, k, p));
          expected_y[at] = best;
          expected_index[at] = relu && best <= 0 ? kNoGradient : static_cast<uint8_t>(index);
          maximum[at] = best_at;
        }
  }

  const Case& c;
  const ConvGeometry& g;
  const int64_t x_size, w_size, z_size;
  const int64_t pooled[3];
  const int64_t y_size;
  int64_t pool[3];
  Guarded<T> x, w, bias, grad_y;
  std::vector<double> expected_y;
  std::vector<uint8_t> expected_index;
  std::vector<int64_t> maximum;
};

template <class T>
void test_dtype(bool quick) {
  unsigned seed = 1;
  const auto check = [&](const ConvGeometry& geometry, const std::vector<int64_t>& pool, Layout layout, bool specials) {
    PoolCase test{{geometry, layout, layout}, {pool[0], pool[1], pool[2]}, specials};
    test.conv.kind = ++seed % 3 != 0 ? ActivationKind::relu : ActivationKind::identity;
    test.conv.bias = seed % 4 != 0;
    test.conv.at_end = seed % 2 == 0;
    test.conv.w_layout = static_cast<Layout>(seed / 2 % 2);
    const PoolTest<T> one(test, seed);
    one.forward();
    if (!specials) one.backward();
  };
  const auto first = [&](int64_t batch, int64_t in, int64_t out, int64_t height, int64_t width, bool specials) {
    check(make(batch, in, out, 1, {height, width}, {3, 3}, {1, 1}, {1, 1}, {1, 1}, {1, 1}), {1, 2, 2},
          Layout::channels_first, specials);
  };
  // The first layer's own kernel.
  for (int64_t n = 1; n < 70; n += quick ? 9 : 1) {
    first(2, 1 + n % 4, 3, 6, n, false);
    first(1, 1, 5, n, 9, n % 4 == 0);
  }
  first(20, 1, 3, 5, 7, false);
  first(1, 3, 2, 180, 66, false);
  first(2, 1, 6, 28, 28, true);
  if constexpr (sizeof(T) >= 4) {  // two threads share one image
    const Guarded<T> x(56 * 28, true), w(32 * 9, true), y(32 * 28 * 14, true);
    const ConvPoolForward call{.dtype = kDType<T>,
                               .layout = Layout::channels_first,
                               .w_layout = Layout::channels_first,
                               .geometry = make(1, 1, 32, 1, {56, 28}, {3, 3}, {1, 1}, {1, 1}, {1, 1}, {1, 1}),
                               .pool = {1, 2, 2}};
    asked = 0;
    run_call(call, {x.data(), w.data(), nullptr, y.data()}, {2, run_and_note});
    if (asked != 2 && ++failures <= 20) std::printf("one image of 56x28 asked for %d threads, not 2\n", asked);
  }
  // Blocks of images; windows of all shapes, with rows and columns left over.
  check(make(3, 6, 8, 1, {40, 41}, {3, 3}, {1, 1}, {1, 1}, {1, 1}, {1, 1}), {1, 2, 2}, Layout::channels_first, false);
  check(make(7, 2, 20, 1, {80, 80}, {3, 3}, {1, 1}, {1, 1}, {1, 1}, {1, 1}), {1, 2, 2}, Layout::channels_last, true);
  check(make(3, 6, 35, 1, {90, 90}, {1, 1}, {1, 1}, {0, 0}, {1, 1}, {0, 0}), {1, 3, 2}, Layout::channels_first, true);
  check(make(2, 3, 5, 1, {6, 7, 9}, {2, 3, 3}, {1, 1, 1}, {0, 1, 1}, {1, 1, 1}, {0, 1, 1}), {2, 2, 3},
        Layout::channels_last, false);
  std::mt19937 random(7);
  const auto below = [&](int n) { return static_cast<int>(random() % static_cast<unsigned>(n)); };
  for (int i = 0; i < (quick ? 40 : 200); ++i) {
    const int64_t groups = below(3) == 0 ? 2 : 1, stride = 1 + below(2), padding = below(2);
    check(make(1 + below(4), groups * (1 + below(6)), groups * (1 + below(9)), groups, {3 + below(18), 3 + below(30)},
               {1 + below(3), 1 + below(3)}, {stride, stride}, {padding, padding}, {1, 1}, {padding, padding}),
          {1, 1 + below(3), 1 + below(4)}, static_cast<Layout>(below(2)), below(6) == 0);
  }
}

}  // namespace

int main(int argc, char** argv) {
  return run_tiers(argc, argv, []<class T>(bool quick) { test_dtype<T>(quick); });
}
