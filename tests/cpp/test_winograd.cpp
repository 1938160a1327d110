// Winograd convolution and both its gradients against plain loops in float64, for shapes of every size, also where the
// library would choose another algorithm: so this file compiles the kernels for itself, in the portable tier unless
// built with another tier's FASTOPS_VEC_ macro and flags. test_conv.cpp runs every tier on what they choose.
//
// The rms error stays within three times (F(4x4): twelve times) that of direct summation in float32; F(2x2) of small
// integers is exact. Operands and bits are tested as in test_conv.cpp.
#include <cstdio>
#include <random>

#if !defined(FASTOPS_VEC_AVX2) && !defined(FASTOPS_VEC_AVX512) && !defined(FASTOPS_VEC_NEON) && \
    !defined(FASTOPS_VEC_SCALAR)
#define FASTOPS_VEC_SCALAR
#endif
#include "../../csrc/kernels/common/cpu/bodies_prelude.h"
#include "products.h"

namespace fastops {
namespace tested {
namespace {
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wunused-function"  // the planners of the ops that it includes
#include "../../csrc/kernels/conv/cpu/winograd_weight.inl"
#pragma GCC diagnostic pop
}  // namespace
}  // namespace tested
}  // namespace fastops

namespace {

struct Case {
  int64_t batch, channels, outputs, height, width, pad_h, pad_w;
  Layout layout = Layout::channels_first, w_layout = Layout::channels_first;
  Precision precision = Precision::highest;
  ActivationKind kind = ActivationKind::identity;
  bool backward = false;  // the gradient of the input, or, with bias and z, a transposed convolution with ReLU
  bool bias = true, z = false, integers = false, at_end = true;
};

void fail(const Case& c, const char* what, double got, double bound) {
  if (++failures > 20) return;
  std::printf(
      "%s: %g, bound %g (batch %d channels %d -> %d, %d x %d, padding %d %d, layouts %d %d, precision %d, "
      "activation %d, backward %d, bias %d, z %d, integers %d, at_end %d)\n",
      what, got, bound, static_cast<int>(c.batch), static_cast<int>(c.channels), static_cast<int>(c.outputs),
      static_cast<int>(c.height), static_cast<int>(c.width), static_cast<int>(c.pad_h), static_cast<int>(c.pad_w),
      static_cast<int>(c.layout), static_cast<int>(c.w_layout), static_cast<int>(c.precision), static_cast<int>(c.kind),
      c.backward, c.bias, c.z, c.integers, c.at_end);
}

// Element (b, c, i, j) of a dense image.
struct Image {
  Layout layout;
  int64_t channels, height, width;
  int64_t operator()(int64_t b, int64_t c, int64_t i, int64_t j) const {
    return layout == Layout::channels_last ? ((b * height + i) * width + j) * channels + c
                                           : ((b * channels + c) * height + i) * width + j;
  }
};

ConvGeometry geometry(const Case& c) {
  return {c.batch,
          c.channels,
          c.outputs,
          1,
          {1, c.height, c.width},
          {1, c.height + 2 * c.pad_h - 2, c.width + 2 * c.pad_w - 2},
          {1, 3, 3},
          {1, 1, 1},
          {0, c.pad_h, c.pad_w},
          {1, 1, 1}};
}

// The plan of Winograd's algorithm, also where the library would choose another one.
template <class Call>
Plan<Call> plan_winograd(const Call& call, const typename Call::Pointers& pointers, int threads) {
  Plan<Call> plan;
  plan.call = call;
  plan.target.threads = threads;
  tested::plan_winograd(plan, tested::bind(plan, pointers));
  return plan;
}

template <class Call>
void run_winograd(const Call& call, const typename Call::Pointers& pointers, const Team& team) {
  const Plan<Call> plan = plan_winograd(call, pointers, team.threads);
  const Workspace workspace(plan.workspace);
  plan.run(pointers, workspace.get(), team);
}

// Which orders have run with packed weights: [F(4x4)][share_tiles].
bool packed_orders[2][2] = {};

// The same call with weights packed ahead, which take the place of w.
void run_packed(ConvForward call, ConvForward::Pointers pointers, const Team& team, bool at_end) {
  call.packed_w = true;
  const Plan<ConvForward> plan = plan_winograd(call, pointers, team.threads);
  const Pages packed(plan.packed, at_end, 64);
  plan.pack(pointers.w, packed.data());
  pointers.w = packed.data();
  const Workspace workspace(plan.workspace);
  plan.run(pointers, workspace.get(), team);
  const bool large = plan.name.tile[0] == 4;
  packed_orders[large][reinterpret_cast<const tested::WinogradPlan*>(plan.decisions)->share_tiles] = true;
}

// Adds a[i] b[i] to expected[i] in float64 and to direct[i] in float32, and returns the largest product. The
// sanitizers, which watch the kernels of this file, would take longer here than there.
__attribute__((no_sanitize("address", "undefined"))) double add_products(const double* a, int64_t a_step,
                                                                         const float* b, int64_t b_step,
                                                                         double* expected, float* direct,
                                                                         int64_t to_step, int64_t n) {
  double largest = 0;
  for (; n > 0; --n, a += a_step, b += b_step, expected += to_step, direct += to_step) {
    const double product = *a * static_cast<double>(*b), magnitude = product < 0 ? -product : product;
    if (magnitude > largest) largest = magnitude;
    *expected += product;
    *direct += static_cast<float>(*a) * *b;
  }
  return largest;
}

bool exact_kind(ActivationKind kind) { return kind == ActivationKind::identity || kind == ActivationKind::relu; }

void test(const Case& c, unsigned seed) {
  const ConvGeometry g = geometry(c);
  const int64_t out_h = g.out[1], out_w = g.out[2];
  if (out_h < 1 || out_w < 1) return;
  const Image in{c.layout, c.channels, c.height, c.width}, out{c.layout, c.outputs, out_h, out_w};
  const int64_t in_size = c.batch * c.channels * c.height * c.width, out_size = c.batch * c.outputs * out_h * out_w;
  const int64_t from_size = c.backward ? out_size : in_size, to_size = c.backward ? in_size : out_size;

  std::mt19937 random(seed);
  std::uniform_int_distribution<int> integer(-3, 3);
  std::normal_distribution<double> normal;
  const auto draw = [&] { return c.integers ? integer(random) : normal(random); };
  Guarded<float> x(from_size, c.at_end), saved(from_size, c.at_end), w(9 * c.channels * c.outputs, c.at_end),
      bias(c.backward ? c.channels : c.outputs, c.at_end);
  x.fill(draw);
  saved.fill(draw);
  w.fill(draw);
  bias.fill(draw);

  // The sums in float64, and in float32 as they come. What is added up is formed once: each value has many products.
  std::vector<double> expected(static_cast<size_t>(to_size), 0.0);
  std::vector<float> direct(static_cast<size_t>(to_size), 0.0f);
  double largest = 1;
  std::vector<double> summands;
  for (int64_t i = 0; i < from_size; ++i) summands.push_back(c.backward ? x(i) * derivative(c.kind, saved(i)) : x(i));
  const int64_t in_step = c.layout == Layout::channels_last ? 1 : c.height * c.width;
  const int64_t w_step = c.w_layout == Layout::channels_last ? 1 : 9;
  for (int64_t i = 0; i < out_h; ++i)
    for (int64_t j = 0; j < out_w; ++j)
      for (int64_t tap = 0; tap < 9; ++tap) {
        const int64_t ii = i - c.pad_h + tap / 3, jj = j - c.pad_w + tap % 3;
        if (ii < 0 || jj < 0 || ii >= c.height || jj >= c.width) continue;
        for (int64_t b = 0; b < c.batch; ++b)
          for (int64_t k = 0; k < c.outputs; ++k) {
            const int64_t at_in = in(b, 0, ii, jj), at_out = out(b, k, i, j);
            const float* const weights = w.data() + (9 * k * c.channels + tap * (w_step == 1 ? c.channels : 1));
            const double* const from = summands.data() + (c.backward ? at_out : at_in);
            const int64_t into = c.backward ? at_in : at_out;
            const int64_t from_step = c.backward ? 0 : in_step, into_step = c.backward ? in_step : 0;
            largest = std::max(largest, add_products(from, from_step, weights, w_step, expected.data() + into,
                                                     direct.data() + into, into_step, c.channels));
          }
      }
  double direct_squares = 0;
  for (size_t i = 0; i < expected.size(); ++i) direct_squares += (direct[i] - expected[i]) * (direct[i] - expected[i]);
  const Image& to = c.backward ? in : out;
  if (c.bias)
    for (int64_t b = 0; b < c.batch; ++b)
      for (int64_t k = 0; k < to.channels; ++k)
        for (int64_t i = 0; i < to.height; ++i)
          for (int64_t j = 0; j < to.width; ++j) expected[static_cast<size_t>(to(b, k, i, j))] += bias(k);
  const ActivationKind epilogue = !c.backward ? c.kind : c.z ? ActivationKind::relu : ActivationKind::identity;

  const ConvForward forward{.dtype = DType::f32,
                            .layout = c.layout,
                            .w_layout = c.w_layout,
                            .geometry = g,
                            .with_bias = c.bias,
                            .activation = {c.kind},
                            .with_z = c.z,
                            .precision = c.precision};
  const ConvBackwardInput backward{.dtype = DType::f32,
                                   .layout = c.layout,
                                   .w_layout = c.w_layout,
                                   .geometry = g,
                                   .activation = {c.kind},
                                   .with_bias = c.bias,
                                   .epilogue = {epilogue},
                                   .with_z = c.z,
                                   .precision = c.precision};
  const float* const b = c.bias ? bias.data() : nullptr;
  std::vector<float> first;
  for (const Team& team : kTeams)
    for (const bool packed : {false, true}) {
      if (packed && c.backward) continue;
      Guarded<float> y(to_size, c.at_end), z(c.z ? to_size : 0, c.at_end);
      float* const to_z = c.z ? z.data() : nullptr;
      if (c.backward)
        run_winograd(backward, {x.data(), saved.data(), w.data(), b, y.data(), to_z}, team);
      else if (packed)
        run_packed(forward, {x.data(), w.data(), b, y.data(), to_z}, team, c.at_end);
      else
        run_winograd(forward, {x.data(), w.data(), b, y.data(), to_z}, team);
      std::vector<float> values = y.values();
      const std::vector<float> more = z.values();
      values.insert(values.end(), more.begin(), more.end());
      if (first.empty())
        first = values;
      else if (!same_bits(first, values))
        fail(c, packed ? "bits of packed weights" : "bits of another team", 0, 0);
    }

  const bool medium = c.precision == Precision::medium;
  double worst = 0, squares = 0;
  const auto compare = [&](float got, double wanted) {
    const double error = std::fabs(got - wanted);
    if (!(error <= worst)) worst = error;
    squares += error * error;
  };
  for (size_t i = 0; i < expected.size(); ++i) {
    if (c.z) compare(first[expected.size() + i], expected[i]);
    compare(first[i], activate(epilogue, expected[i]));
  }
  const bool exact = c.integers && !medium && exact_kind(c.kind);
  const double terms = 9.0 * static_cast<double>(c.backward ? c.outputs : c.channels);
  const double bound = exact ? 0 : 0x1p-24 * (medium ? 30 : 3) * terms * largest;
  if (!(worst <= bound)) fail(c, "largest error", worst, bound);
  const double rms = std::sqrt(squares), rms_bound = (medium ? 12 : 3) * std::sqrt(direct_squares);
  if (c.kind == ActivationKind::identity && !c.integers && !c.z && expected.size() > 200 && !(rms <= rms_bound))
    fail(c, "rms error over direct summation's", 3 * rms / rms_bound, 3);
}

// The gradients of the weights, and of the bias where the case has one.
void test_weight(const Case& c, unsigned seed) {
  const ConvGeometry g = geometry(c);
  const int64_t out_h = g.out[1], out_w = g.out[2];
  if (out_h < 1 || out_w < 1) return;
  const Image in{c.layout, c.channels, c.height, c.width}, out{c.layout, c.outputs, out_h, out_w};
  const int64_t out_size = c.batch * c.outputs * out_h * out_w, w_size = 9 * c.channels * c.outputs;
  std::mt19937 random(seed);
  std::uniform_int_distribution<int> integer(-3, 3);
  std::normal_distribution<double> normal;
  const auto draw = [&] { return c.integers ? integer(random) : normal(random); };
  Guarded<float> x(c.batch * c.channels * c.height * c.width, c.at_end), grad_y(out_size, c.at_end),
      saved(out_size, c.at_end);
  x.fill(draw);
  grad_y.fill(draw);
  saved.fill(draw);

  // Weights, then biases.
  std::vector<double> expected(static_cast<size_t>(w_size + c.outputs), 0.0);
  std::vector<float> direct(expected.size(), 0.0f);
  double largest = 1;
  const int64_t in_step = c.layout == Layout::channels_last ? 1 : c.height * c.width;
  const int64_t w_step = c.w_layout == Layout::channels_last ? 1 : 9;
  for (int64_t b = 0; b < c.batch; ++b)
    for (int64_t k = 0; k < c.outputs; ++k)
      for (int64_t i = 0; i < out_h; ++i)
        for (int64_t j = 0; j < out_w; ++j) {
          const int64_t at = out(b, k, i, j);
          const double gradient = grad_y(at) * derivative(c.kind, saved(at));
          expected[static_cast<size_t>(w_size + k)] += gradient;
          for (int64_t tap = 0; tap < 9; ++tap) {
            const int64_t ii = i - c.pad_h + tap / 3, jj = j - c.pad_w + tap % 3;
            if (ii < 0 || jj < 0 || ii >= c.height || jj >= c.width) continue;
            const int64_t to = 9 * k * c.channels + tap * (w_step == 1 ? c.channels : 1);
            largest = std::max(largest, add_products(&gradient, 0, x.data() + in(b, 0, ii, jj), in_step,
                                                     expected.data() + to, direct.data() + to, w_step, c.channels));
          }
        }

  std::vector<float> first;
  for (const Team& team : kTeams) {
    Guarded<float> grad_w(w_size, c.at_end), grad_bias(c.outputs, c.at_end);
    run_winograd(ConvBackwardWeight{.dtype = DType::f32,
                                    .layout = c.layout,
                                    .w_layout = c.w_layout,
                                    .geometry = g,
                                    .activation = {c.kind},
                                    .with_grad_w = true,
                                    .with_grad_bias = c.bias},
                 {grad_y.data(), saved.data(), x.data(), grad_w.data(), c.bias ? grad_bias.data() : nullptr}, team);
    std::vector<float> values = grad_w.values();
    if (c.bias) {
      const std::vector<float> more = grad_bias.values();
      values.insert(values.end(), more.begin(), more.end());
    }
    if (first.empty())
      first = values;
    else if (!same_bits(first, values))
      fail(c, "grad_w's bits of another team", 0, 0);
  }

  double worst = 0, squares = 0, direct_squares = 0;
  for (size_t i = 0; i < first.size(); ++i) {
    const double error = std::fabs(first[i] - expected[i]);
    if (!(error <= worst)) worst = error;
    if (i >= static_cast<size_t>(w_size)) continue;
    squares += error * error;
    direct_squares += (direct[i] - expected[i]) * (direct[i] - expected[i]);
  }
  const double terms = static_cast<double>(c.batch * out_h * out_w) + 8;
  const double bound = c.integers && exact_kind(c.kind) ? 0 : 0x1p-24 * 3 * terms * largest;
  if (!(worst <= bound)) fail(c, "grad_w's largest error", worst, bound);
  const double rms = std::sqrt(squares), rms_bound = 3 * std::sqrt(direct_squares);
  if (c.kind == ActivationKind::identity && !c.integers && w_size > 200 && terms > 100 && !(rms <= rms_bound))
    fail(c, "grad_w's rms error over direct summation's", 3 * rms / rms_bound, 3);
}

void test_random(int64_t height, int64_t width, unsigned seed) {
  std::mt19937 random(seed);
  const auto below = [&](int n) { return static_cast<int>(random() % static_cast<unsigned>(n)); };
  constexpr ActivationKind kinds[4] = {ActivationKind::identity, ActivationKind::relu, ActivationKind::tanh,
                                       ActivationKind::silu};
  const auto channels = [&] { return 1 + below(1 + below(70)); };
  Case c{1 + below(4), channels(), channels(), height, width, below(4), below(4)};
  c.layout = static_cast<Layout>(below(2));
  c.w_layout = static_cast<Layout>(below(2));
  c.precision = below(2) == 0 ? Precision::highest : Precision::medium;
  c.kind = kinds[below(4)];
  c.backward = below(2) == 0;
  c.bias = below(3) != 0;
  c.z = below(3) == 0;
  c.integers = below(3) == 0;
  c.at_end = below(2) == 0;
  test(c, seed);
  test_weight(c, seed);
}

}  // namespace

// Argument: "quick" for fewer cases.
int main(int argc, char** argv) {
  const bool quick = argc > 1 && std::strcmp(argv[1], "quick") == 0;
  unsigned seed = 0;
  for (int round = 0; round < (quick ? 1 : 2); ++round)
    for (int64_t height = 1; height <= 20; ++height)
      for (int64_t width = 1; width <= 20; ++width) test_random(height, width, ++seed);
  // Several chains of multiply-adds, few tiles and many weights, wide and high images, many small ones.
  const Case shapes[] = {{1, 520, 40, 5, 6, 1, 1},  {2, 130, 300, 4, 3, 1, 0}, {1, 40, 20, 3, 260, 1, 1},
                         {1, 33, 17, 150, 9, 2, 0}, {1, 17, 33, 45, 60, 1, 1}, {40, 20, 40, 7, 7, 1, 1}};
  for (const Case& shape : shapes)
    for (int variant = 0; variant < 8; ++variant) {
      Case c = shape;
      c.layout = c.w_layout = static_cast<Layout>(variant & 1);
      c.precision = (variant >> 1 & 1) == 0 ? Precision::highest : Precision::medium;
      c.backward = (variant & 4) != 0;
      c.at_end = variant % 3 != 0;
      test(c, ++seed);
      if (variant < 2) test_weight(c, seed);
    }
  test_weight({2, 140, 270, 9, 9, 1, 1}, ++seed);
  for (int large = 0; large < 2; ++large)
    for (int tiles = 0; tiles < 2; ++tiles)
      if (!packed_orders[large][tiles]) {
        std::printf("F(%dx%d) with shared %s was never packed\n", large ? 4 : 2, large ? 4 : 2,
                    tiles ? "tiles" : "weights");
        ++failures;
      }
  std::printf("%s\n", failures == 0 ? "ok" : "FAILED");
  return failures == 0 ? 0 : 1;
}
