// Fake quantization and its gradients on every tier, against the contract by plain loops in the type that is computed
// in: outputs and masks bit by bit, sums within their roundings.
#include <algorithm>

#include "products.h"
#include "random.h"

namespace {

template <class T>
struct TypeOf {
  using type = float;
};
template <>
struct TypeOf<double> {
  using type = double;
};

template <class T>
void test(int64_t outer, int64_t inner, int64_t channels, bool by_column) {
  using C = typename TypeOf<T>::type;
  const bool whole = coin(), with_x = coin();
  const int low = static_cast<int>(between(-130, 0)), high = low + static_cast<int>(between(0, 255));
  const int64_t size = outer * inner;
  const Guarded<T> x(size, coin()), grad_y(size, coin());
  std::normal_distribution<double> normal;
  for (const Guarded<T>* one : {&x, &grad_y})
    for (int64_t i = 0; i < size; ++i) (*one)[i] = narrow<T>(normal(generator));
  const Exact<float> scale(channels), zero(channels);
  for (int64_t c = 0; c < channels; ++c) {
    scale[static_cast<size_t>(c)] = 0.001f * static_cast<float>(between(1, 60));
    zero[static_cast<size_t>(c)] = static_cast<float>(between(low, high)) + (whole ? 0.0f : 0.375f);
  }
  const double special[] = {NAN, INFINITY, -INFINITY, 1e30, 0};
  for (int64_t i = 0; i < size && i < 5; ++i) x[between(0, size - 1)] = narrow<T>(special[i]);

  std::vector<T> wanted_y(static_cast<size_t>(size)), wanted_x(wanted_y);
  std::vector<uint8_t> wanted_mask(wanted_y.size());
  std::vector<double> of_scale(static_cast<size_t>(channels)), of_zero(of_scale);
  for (int64_t i = 0; i < size; ++i) {
    const auto at = static_cast<size_t>(i), c = static_cast<size_t>(by_column ? i % inner : i / inner % channels);
    const C s = scale[c], inverse = 1 / scale[c], z = zero[c], v = static_cast<C>(x(i)), g = static_cast<C>(grad_y(i));
    const C product = v * inverse, r = whole ? std::nearbyint(product) + z : std::nearbyint(product + z);
    const C q = std::isnan(r) ? C(low) : std::min(std::max(r, C(low)), C(high));
    const bool inside = r >= C(low) && r <= C(high);
    wanted_y[at] = narrow<T>((q - z) * s);
    wanted_mask[at] = inside;
    wanted_x[at] = narrow<T>(inside ? g : C(0));
    of_scale[c] += double(g) * double(inside ? ((q - z) * s - v) * inverse : q - z);
    of_zero[c] -= inside ? 0 : double(g) * double(s);
  }
  const auto same = [](const char* what, const void* a, const void* b, size_t bytes) {
    if (bytes == 0 || std::memcmp(a, b, bytes) == 0 || ++failures > 20) return;
    std::printf("FAIL %s %s: other bits than the contract's\n", isa_name(isa_used()), what);
  };
  const size_t bytes = static_cast<size_t>(size) * sizeof(T);

  Bits sums;
  for (const Team& team : kTeams) {
    for (const bool with_mask : {false, true}) {
      const Guarded<T> y(size, coin());
      const Exact<uint8_t> mask(with_mask ? size : 0);
      const FakeQuantizeForward call{kDType<T>, outer, inner, channels, by_column, whole, with_mask, low, high};
      run_call(call, {x.data(), scale.get(), zero.get(), y.data(), with_mask ? mask.get() : nullptr}, team);
      for (int64_t i = 0; i < size; ++i)  // the sign of a zero is nobody's
        if (y(i) == 0) y[i] = wanted_y[static_cast<size_t>(i)];
      same("fake_quantize", y.data(), wanted_y.data(), bytes);
      if (!with_mask) continue;
      same("its mask", mask.get(), wanted_mask.data(), wanted_mask.size());
      const Guarded<T> grad_x(size, coin());
      run_call(FakeQuantizeBackward{kDType<T>, outer, inner}, {grad_y.data(), mask.get(), grad_x.data()}, team);
      same("its gradient", grad_x.data(), wanted_x.data(), bytes);
    }
    const Guarded<T> grad_x(with_x ? size : 0, coin());
    const Exact<float> grad_scale(channels), grad_zero(channels);
    const FakeQuantizeLearnedBackward call{kDType<T>, outer, inner, channels, by_column, whole, with_x, low, high};
    run_call(call,
             {grad_y.data(), x.data(), scale.get(), zero.get(), with_x ? grad_x.data() : nullptr, grad_scale.get(),
              grad_zero.get()},
             team);
    const size_t length = static_cast<size_t>(channels) * sizeof(float);
    sums.same("learned", team, {{grad_scale.get(), length}, {grad_zero.get(), length}});
    if (with_x) same("learned gradient", grad_x.data(), wanted_x.data(), bytes);
    for (size_t c = 0; c < static_cast<size_t>(channels); ++c) {
      expect<float>("gradient of the scale", grad_scale[c], of_scale[c], 128 * 128 * (1 + size / channels));
      expect<float>("gradient of the zero point", grad_zero[c], of_zero[c], 1 + size / channels);
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  return run_tiers(argc, argv, []<class T>(bool quick) {
    for (int i = 0; i < (quick ? 20 : 60); ++i) {
      const int64_t inner = between(0, 40), channels = between(1, 9);
      test<T>(between(0, 3) * channels, inner, channels, false);
      test<T>(between(0, 70), channels, channels, true);
      test<T>(1, between(0, 40), 1, false);
    }
    test<T>(1, 100003, 1, false);  // for several threads
    test<T>(6, 20011, 3, false);
    test<T>(1500, 67, 67, true);
  });
}
