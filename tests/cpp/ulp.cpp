// The largest error of every float32 activation over all 2^32 inputs, in units in the last place, against libm in
// float64 (long double or a series where that cancels).
//
//   ulp [--isa avx2] [--stride N] [--threads N] [--backward] [activation ...]
//
// Every tier of this machine (or the one named) is checked against one evaluation of the reference; --stride N takes
// every Nth input. --backward checks the derivative instead, from x or from y as saved_by_default (or, for a mask, x)
// says. An ulp is the spacing of float32 at the reference, denormals included. Exits 1 where a forward error exceeds
// its bound, or where NaN or an infinity comes out wrong. The bound is 2.5 (2.8 on the scalar tier, whose multiply-adds
// round twice), 3.7 for gelu and 4.8 for tanhshrink, near 0: less than PyTorch's own error there.
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "../../csrc/kernels/common/cpu/isa.h"

namespace {

using fastops::Activation;
using fastops::ActivationKind;

double positive_part(double x) { return x > 0 ? x : 0; }

double tanhshrink(double x) {
  const double w = x * x;
  if (std::fabs(x) < 0.02) return x * w * (1.0 / 3 - w * (2.0 / 15 - w * (17.0 / 315 - w * (62.0 / 2835))));
  if (std::fabs(x) < 1)
    return static_cast<double>(static_cast<long double>(x) - std::tanh(static_cast<long double>(x)));
  return x - std::tanh(x);
}

double sigmoid(double x) { return x >= 0 ? 1 / (1 + std::exp(-x)) : std::exp(x) / (1 + std::exp(x)); }
double softplus(double x) { return positive_part(x) + std::log1p(std::exp(-std::fabs(x))); }
double normal_cdf(double x) { return 0.5 * std::erfc(-x * M_SQRT1_2); }
double normal_pdf(double x) { return 0.5 * M_2_SQRTPI * M_SQRT1_2 * std::exp(-0.5 * x * x); }
constexpr double kGelu = 2 * M_2_SQRTPI * M_SQRT1_2;  // 2 sqrt(2 / pi)
double gelu_tanh_gate(double x) { return sigmoid(kGelu * (x + 0.044715 * x * x * x)); }
double mish_gate(double x) {
  const double e = std::exp(x), n = e * (e + 2);
  return x > 40 ? 1 : n / (n + 2);
}
double times(double x, double gate) { return gate == 0 ? 0 : x * gate; }  // the limit at -infinity

constexpr double kSeluAlpha = 1.6732632423543772848170429916717, kSeluScale = 1.0507009873554804934193349852946;

struct Case {
  const char* name;
  Activation activation;
  double (*value)(double x);
  double (*slope)(double saved);  // of x; of y for sigmoid and tanh
  double bound = 2.5, bound_scalar = 2.8;
};

const Case kCases[] = {
    {"relu",
     {ActivationKind::relu},
     [](double x) { return positive_part(x); },
     [](double x) { return x > 0 ? 1.0 : 0; }},
    {"relu6",
     {ActivationKind::relu6},
     [](double x) { return std::fmin(positive_part(x), 6); },
     [](double x) { return x > 0 && x < 6 ? 1.0 : 0; }},
    {"leaky_relu",
     {ActivationKind::leaky_relu, 0.01},
     [](double x) { return x > 0 ? x : x * 0.01; },
     [](double x) { return x > 0 ? 1 : 0.01; }},
    {"elu",
     {ActivationKind::elu, 1},
     [](double x) { return x > 0 ? x : std::expm1(x); },
     [](double x) { return x > 0 ? 1 : std::exp(x); }},
    {"selu",
     {ActivationKind::selu},
     [](double x) { return kSeluScale * (x > 0 ? x : kSeluAlpha * std::expm1(x)); },
     [](double x) { return kSeluScale * (x > 0 ? 1 : kSeluAlpha * std::exp(x)); }},
    {"celu",
     {ActivationKind::celu, 1},
     [](double x) { return x > 0 ? x : std::expm1(x); },
     [](double x) { return x > 0 ? 1 : std::exp(x); }},
    {"gelu",
     {ActivationKind::gelu},
     [](double x) { return times(x, normal_cdf(x)); },
     [](double x) { return normal_cdf(x) + times(x, normal_pdf(x)); },
     3.7,
     3.7},
    {"gelu_tanh",
     {ActivationKind::gelu_tanh},
     [](double x) { return times(x, gelu_tanh_gate(x)); },
     [](double x) {
       const double s = gelu_tanh_gate(x), other = gelu_tanh_gate(-x);
       return s + times(x, s * other) * kGelu * (1 + 3 * 0.044715 * (std::fabs(x) > 1e9 ? 0 : x * x));
     }},
    {"silu",
     {ActivationKind::silu},
     [](double x) { return times(x, sigmoid(x)); },
     [](double x) { return sigmoid(x) + times(x, sigmoid(x) * sigmoid(-x)); }},
    {"mish",
     {ActivationKind::mish},
     [](double x) { return times(x, mish_gate(x)); },
     [](double x) {
       const double e = std::exp(std::fmin(x, 50)), d = e * (e + 2) + 2;
       return x > 40 ? 1 : e == 0 ? 0 : e * ((e + 2) * d + 4 * x * (1 + e)) / (d * d);
     }},
    {"sigmoid", {ActivationKind::sigmoid}, [](double x) { return sigmoid(x); }, [](double y) { return (1 - y) * y; }},
    {"logsigmoid",
     {ActivationKind::logsigmoid},
     [](double x) { return -softplus(-x); },
     [](double x) { return sigmoid(-x); }},
    {"tanh", {ActivationKind::tanh}, [](double x) { return std::tanh(x); }, [](double y) { return 1 - y * y; }},
    {"softplus",
     {ActivationKind::softplus, 1, 20},
     [](double x) { return x > 20 ? x : softplus(x); },
     [](double x) { return x > 20 ? 1 : sigmoid(x); }},
    {"softsign",
     {ActivationKind::softsign},
     [](double x) { return std::isinf(x) ? (x > 0 ? 1 : -1) : x / (1 + std::fabs(x)); },
     [](double x) { return 1 / ((1 + std::fabs(x)) * (1 + std::fabs(x))); }},
    {"hardtanh",
     {ActivationKind::hardtanh, -1, 1},
     [](double x) { return std::fmax(std::fmin(x, 1), -1); },
     [](double x) { return x > -1 && x < 1 ? 1.0 : 0; }},
    {"hardsigmoid",
     {ActivationKind::hardsigmoid},
     [](double x) { return std::fmax(std::fmin(x + 3, 6), 0) / 6; },
     [](double x) { return x > -3 && x < 3 ? 1.0 / 6 : 0; }},
    {"hardswish",
     {ActivationKind::hardswish},
     [](double x) { return x <= -3 ? 0 : x * (std::fmin(x + 3, 6) / 6); },
     [](double x) { return x <= -3 ? 0
                           : x < 3 ? x / 3 + 0.5
                                   : 1; }},
    {"hardshrink",
     {ActivationKind::hardshrink, 0.5},
     [](double x) { return std::fabs(x) <= 0.5 ? 0 : x; },
     [](double x) { return std::fabs(x) <= 0.5 ? 0.0 : 1; }},
    {"softshrink",
     {ActivationKind::softshrink, 0.5},
     [](double x) { return std::fabs(x) <= 0.5 ? 0 : x - std::copysign(0.5, x); },
     [](double x) { return std::fabs(x) <= 0.5 ? 0.0 : 1; }},
    {"tanhshrink",
     {ActivationKind::tanhshrink},
     [](double x) { return std::isinf(x) ? x : tanhshrink(x); },
     [](double x) { return std::tanh(x) * std::tanh(x); },
     4.8,
     4.8},
    {"threshold",
     {ActivationKind::threshold, 0.1, 20},
     [](double x) { return x <= static_cast<double>(0.1f) ? 20 : x; },
     [](double x) { return x <= static_cast<double>(0.1f) ? 0.0 : 1; }},
};

// The tiers of this processor that have float32 activations of their own.
std::vector<const fastops::KernelTable*> tables_found() {
  std::vector<const fastops::KernelTable*> tables;
  for (int i = 0; i < static_cast<int>(fastops::Isa::count); ++i) {
    const fastops::Isa isa = static_cast<fastops::Isa>(i);
    if (isa == fastops::Isa::amx || !fastops::set_isa(isa)) continue;
    const fastops::KernelTable& table = fastops::kernels(fastops::DType::f32);
    if (tables.empty() || tables.back() != &table) tables.push_back(&table);
  }
  return tables;
}

double ulps(float got, double reference) {
  if (std::isnan(reference)) return std::isnan(got) ? 0 : INFINITY;
  if (std::isnan(got)) return INFINITY;
  if (std::fabs(reference) >= 0x1.ffffffp127)  // rounds to infinity; the largest float is one ulp away
    return std::fabs(got) >= 0x1.fffffep127f && (got > 0) == (reference > 0) ? 0 : INFINITY;
  const double value =
      std::isinf(got) ? std::copysign(0x1p128, got) : static_cast<double>(got);  // one ulp past the largest
  int exponent;
  std::frexp(reference, &exponent);
  return std::fabs(value - reference) / std::ldexp(1.0, std::fmax(exponent, -125) - 24);
}

struct Worst {
  double error = -1;
  float x = 0, got = 0;
};

constexpr int kChunk = 1 << 14;

void check(const Case& c, bool backward, const std::vector<const fastops::KernelTable*>& tables, int64_t stride,
           int threads, std::vector<Worst>& worst) {
  const int64_t inputs = ((int64_t{1} << 32) + stride - 1) / stride;
  const bool gelu = c.activation.kind == ActivationKind::gelu || c.activation.kind == ActivationKind::gelu_tanh;
  std::atomic<int64_t> next{0};
  std::mutex mutex;
  const fastops::Saved kind = fastops::saved_by_default(c.activation);
  const fastops::Saved saved = kind == fastops::Saved::output ? kind : fastops::Saved::input;
  const auto work = [&] {
    std::vector<float> x(kChunk), y(kChunk), ones(kChunk, 1.0f);
    std::vector<double> reference(kChunk);
    std::vector<Worst> mine(tables.size());
    for (;;) {
      const int64_t first = next.fetch_add(kChunk);
      if (first >= inputs) break;
      const int n = static_cast<int>(inputs - first < kChunk ? inputs - first : kChunk);
      for (int i = 0; i < n; ++i) {
        const uint32_t bits = static_cast<uint32_t>((first + i) * stride);
        std::memcpy(&x[i], &bits, 4);
        // sigmoid and tanh save y: their derivative is checked on y's range.
        const bool outside = backward && saved == fastops::Saved::output && !(std::fabs(x[i]) <= 1);
        if (outside) x[i] = 0.5f;
        const double v = x[i];
        reference[i] = std::isnan(v) ? NAN : backward ? c.slope(v) : c.value(v);
      }
      for (size_t t = 0; t < tables.size(); ++t) {
        const fastops::Planners& planners = tables[t]->planners;
        if (backward)
          planners.plan(fastops::ActivationBackward{fastops::DType::f32, c.activation, saved, 1, n, n, n})
              .run({ones.data(), x.data(), y.data()}, nullptr);
        else
          planners.plan(fastops::ActivationForward{fastops::DType::f32, c.activation, 1, n, n})
              .run({x.data(), y.data()}, nullptr);
        for (int i = 0; i < n; ++i) {
          if (backward && std::isnan(x[i])) continue;  // a choice of PyTorch's, checked in test_activation
          // An exponential below the normal numbers, in GELU below 2^-98, is zero, and so is the result.
          if (y[i] == 0 && std::fabs(x[i]) > 8 && std::fabs(reference[i]) < (gelu ? 0x1p-95 : 0x1p-116)) continue;
          const double error = ulps(y[i], reference[i]);
          if (error > mine[t].error) mine[t] = {error, x[i], y[i]};
        }
      }
    }
    const std::lock_guard<std::mutex> lock(mutex);
    for (size_t t = 0; t < tables.size(); ++t)
      if (mine[t].error > worst[t].error) worst[t] = mine[t];
  };
  std::vector<std::thread> pool;
  for (int i = 1; i < threads; ++i) pool.emplace_back(work);
  work();
  for (auto& thread : pool) thread.join();
}

}  // namespace

int main(int argc, char** argv) {
  int64_t stride = 1;
  int threads = static_cast<int>(std::thread::hardware_concurrency());
  bool backward = false;
  std::vector<std::string> names;
  const std::vector<const fastops::KernelTable*> found = tables_found();
  std::vector<const fastops::KernelTable*> tables;
  for (int i = 1; i < argc; ++i) {
    const std::string arg = argv[i];
    if (arg == "--backward") {
      backward = true;
    } else if (arg == "--stride" && i + 1 < argc) {
      stride = std::atoll(argv[++i]);
    } else if (arg == "--threads" && i + 1 < argc) {
      threads = std::atoi(argv[++i]);
    } else if (arg == "--isa" && i + 1 < argc) {
      const std::string wanted = argv[++i];
      for (const fastops::KernelTable* table : found)
        if (wanted == table->isa) tables.push_back(table);
      if (tables.empty()) {
        std::fprintf(stderr, "ulp: this machine has no float32 tier '%s'\n", wanted.c_str());
        return 2;
      }
    } else if (arg[0] != '-') {
      names.push_back(arg);
    } else {
      std::fprintf(stderr, "usage: ulp [--isa tier] [--stride N] [--threads N] [--backward] [activation ...]\n");
      return 2;
    }
  }
  if (stride < 1) stride = 1;
  if (tables.empty()) tables = found;

  bool fine = true;
  std::printf("%-12s %-12s %12s  %s\n", backward ? "derivative" : "activation", "tier", "max ulp", "at");
  for (const Case& c : kCases) {
    bool asked = names.empty();
    for (const auto& name : names) asked = asked || name == c.name;
    if (!asked) continue;
    std::vector<Worst> worst(tables.size());
    check(c, backward, tables, stride, threads, worst);
    for (size_t t = 0; t < tables.size(); ++t) {
      const Worst& w = worst[t];
      const double bound = tables[t] == &fastops::kernels_scalar ? c.bound_scalar : c.bound;
      const bool over = !backward && w.error > bound;
      std::printf("%-12s %-12s %12.4f  x = %a (%.9g), got %.9g%s\n", c.name, tables[t]->isa, w.error,
                  static_cast<double>(w.x), static_cast<double>(w.x), static_cast<double>(w.got), over ? "  OVER" : "");
      fine = fine && !over;
    }
    std::fflush(stdout);
  }
  return fine ? 0 : 1;
}
