// The pooling kernels against loops in double, on every tier of this machine, without torch: maxima, their indices and
// averages, forward and backward, in both layouts, every dtype, many geometries, with NaN, infinities and ties, and the
// same bits for any number of threads. Inputs are small integers, so that sums are exact. Every buffer lies against a
// page that must not be touched. Returns 1 if anything fails.
#include <cstdio>
#include <random>
#include <string>

#include "products.h"

namespace {

int64_t volume(const int64_t (&sizes)[3]) { return sizes[0] * sizes[1] * sizes[2]; }

std::string text(const PoolGeometry& g) {
  std::string result = std::to_string(g.batch) + "x" + std::to_string(g.channels);
  for (int i = 0; i < 3; ++i) {
    result += i == 0 ? " in " : "x";
    result += std::to_string(g.in[i]) + ">" + std::to_string(g.out[i]);
    if (!g.adaptive)
      result += "(k" + std::to_string(g.kernel[i]) + "s" + std::to_string(g.stride[i]) + "p" +
                std::to_string(g.padding[i]) + "d" + std::to_string(g.dilation[i]) + ")";
  }
  return result;
}

struct Tap {
  int64_t number, position;  // in the window's box; in the plane, -1 where that is outside the input
};

int64_t box(const PoolGeometry& g, int i) {
  if (!g.adaptive) return g.kernel[i];
  return g.in[i] % g.out[i] == 0 ? g.in[i] / g.out[i] : g.in[i] / g.out[i] + 2;
}

int64_t start(const PoolGeometry& g, int i, int64_t p) {
  return g.adaptive ? p * g.in[i] / g.out[i] : p * g.stride[i] - g.padding[i];
}

int64_t length(const PoolGeometry& g, int i, int64_t p) {
  return g.adaptive ? ((p + 1) * g.in[i] + g.out[i] - 1) / g.out[i] - start(g, i, p) : g.kernel[i];
}

// The taps of window (d, h, w) in order.
std::vector<Tap> taps_of(const PoolGeometry& g, int64_t d, int64_t h, int64_t w) {
  std::vector<Tap> taps;
  const int64_t dilation[3] = {g.adaptive ? 1 : g.dilation[0], g.adaptive ? 1 : g.dilation[1],
                               g.adaptive ? 1 : g.dilation[2]};
  for (int64_t i = 0; i < length(g, 0, d); ++i)
    for (int64_t j = 0; j < length(g, 1, h); ++j)
      for (int64_t k = 0; k < length(g, 2, w); ++k) {
        const int64_t at[3] = {start(g, 0, d) + i * dilation[0], start(g, 1, h) + j * dilation[1],
                               start(g, 2, w) + k * dilation[2]};
        bool in = true;
        for (int a = 0; a < 3; ++a) in = in && at[a] >= 0 && at[a] < g.in[a];
        if (in) taps.push_back({(i * box(g, 1) + j) * box(g, 2) + k, (at[0] * g.in[1] + at[1]) * g.in[2] + at[2]});
      }
  return taps;
}

double divisor(const PoolGeometry& g, int64_t d, int64_t h, int64_t w, size_t taps, bool include_pad,
               int64_t override) {
  if (override != 0) return static_cast<double>(override);
  if (g.adaptive || !include_pad) return static_cast<double>(taps);
  double result = 1;
  const int64_t p[3] = {d, h, w};
  for (int i = 0; i < 3; ++i)
    result *=
        static_cast<double>(std::min(start(g, i, p[i]) + g.kernel[i], g.in[i] + g.padding[i]) - start(g, i, p[i]));
  return result;
}

// Element `at` of plane (b, c), of `size` positions.
int64_t index_of(const PoolGeometry& g, Layout layout, int64_t plane, int64_t at, int64_t size) {
  if (layout == Layout::channels_first) return plane * size + at;
  return (plane / g.channels * size + at) * g.channels + plane % g.channels;
}

template <class T>
bool same(T a, T b) {
  return std::memcmp(&a, &b, sizeof(T)) == 0 || (std::isnan(widen(a)) && std::isnan(widen(b))) || widen(a) == widen(b);
}

template <class T>
void expect(const PoolGeometry& g, Layout layout, const char* what, const T* got, const std::vector<double>& wanted,
            double tolerance = 0) {
  for (size_t i = 0; i < wanted.size(); ++i) {
    const double value = static_cast<double>(widen(got[i]));
    if (same(got[i], narrow<T>(wanted[i])) ||
        std::fabs(value - wanted[i]) <= tolerance * unit_roundoff(kDType<T>) * std::fabs(wanted[i]))
      continue;
    if (++failures <= 40)
      std::printf("FAIL %s %s dtype %d %s %s [%zu] got %.9g, wanted %.9g\n", isa_name(isa_used()), what,
                  static_cast<int>(kDType<T>), layout == Layout::channels_first ? "first" : "last", text(g).c_str(), i,
                  value, wanted[i]);
    return;
  }
}

void fail(const PoolGeometry& g, Layout layout, const char* what) {
  if (++failures <= 40)
    std::printf("FAIL %s %s %s %s\n", isa_name(isa_used()), what, layout == Layout::channels_first ? "first" : "last",
                text(g).c_str());
}

enum class Values { integers, special, lowest };

template <class T>
void fill(T* x, int64_t n, Values values, unsigned seed) {
  std::mt19937 random(seed);
  const double special[] = {NAN, INFINITY, -INFINITY, 0.0, -0.0, 1.0};
  for (int64_t i = 0; i < n; ++i) {
    const unsigned r = random();
    x[i] = narrow<T>(values == Values::lowest                  ? -INFINITY
                     : values == Values::special && r % 5 == 0 ? special[r / 5 % 6]
                                                               : static_cast<int>(r % 13) - 6);
  }
}

// Which indices a gradient is computed with once more, after they were damaged.
bool is_damaged(size_t i) { return i % 3 == 1; }

template <class T>
void check_max(const PoolGeometry& g, Layout layout, Values values) {
  const int64_t planes = g.batch * g.channels, in = volume(g.in), out = volume(g.out);
  const Exact<T> x(planes * in);
  fill(x.get(), planes * in, values, 1);
  const auto size = static_cast<size_t>(planes * out);
  std::vector<double> y(size), grad_x(static_cast<size_t>(planes * in)), grad_rest(grad_x.size());
  std::vector<int64_t> positions(size), numbers(size);
  std::vector<bool> any(size);
  const Exact<T> grad_y(planes * out);
  fill(grad_y.get(), planes * out, Values::integers, 2);
  for (int64_t plane = 0; plane < planes; ++plane) {
    int64_t at = 0;
    for (int64_t d = 0; d < g.out[0]; ++d)
      for (int64_t h = 0; h < g.out[1]; ++h)
        for (int64_t w = 0; w < g.out[2]; ++w, ++at) {
          const std::vector<Tap> taps = taps_of(g, d, h, w);
          const auto to = static_cast<size_t>(index_of(g, layout, plane, at, out));
          double best = -INFINITY;
          Tap where = taps.empty() ? Tap{-1, -1} : taps[0];
          for (const Tap& tap : taps) {
            const double v = widen(x[static_cast<size_t>(index_of(g, layout, plane, tap.position, in))]);
            if (v > best || std::isnan(v)) {
              best = v;
              where = tap;
            }
          }
          any[to] = !taps.empty();
          y[to] = best;
          positions[to] = where.position;
          numbers[to] = where.number;
          if (taps.empty()) continue;
          const auto named = static_cast<size_t>(index_of(g, layout, plane, where.position, in));
          grad_x[named] += widen(grad_y[to]);
          if (!is_damaged(to)) grad_rest[named] += widen(grad_y[to]);
        }
  }
  const bool fits = box(g, 0) * box(g, 1) * box(g, 2) <= 256;
  for (const PoolIndices kind : {PoolIndices::none, PoolIndices::window, PoolIndices::plane}) {
    if (kind == PoolIndices::window && !fits) continue;
    const size_t index_size = kind == PoolIndices::plane ? 8 : kind == PoolIndices::window ? 1 : 0;
    for (const Team& team : kTeams) {
      const Exact<T> got(planes * out), got_grad(planes * in);
      const Exact<uint8_t> indices(static_cast<int64_t>(size * index_size));
      run_call(MaxPoolForward{kDType<T>, layout, g, kind}, {x.get(), got.get(), indices.get()}, team);
      expect(g, layout, "max", got.get(), y);
      for (size_t i = 0; i < size && kind != PoolIndices::none; ++i) {
        int64_t index = indices[i];
        if (kind == PoolIndices::plane) std::memcpy(&index, indices.get() + 8 * i, 8);
        if (any[i] && index != (kind == PoolIndices::plane ? positions[i] : numbers[i])) {
          fail(g, layout, kind == PoolIndices::plane ? "max plane indices" : "max window indices");
          break;
        }
      }
      if (kind == PoolIndices::none) continue;
      const MaxPoolBackward backward{kDType<T>, layout, g, kind};
      run_call(backward, {grad_y.get(), indices.get(), got_grad.get()}, team);
      const bool all = std::find(any.begin(), any.end(), false) == any.end();
      if (all)
        expect(g, layout, kind == PoolIndices::plane ? "max gradient (plane)" : "max gradient (window)", got_grad.get(),
               grad_x);
      if (&team != &kTeams[1]) continue;
      // Indices may be anybody's: those outside the plane get nothing. One of a window may be that of another element.
      const int64_t damage[] = {-1, in, in + 7, -in, int64_t{1} << 40, -(int64_t{1} << 62), int64_t{1} << 62};
      for (size_t i = 0; i < size; ++i) {
        if (!is_damaged(i)) continue;
        if (kind == PoolIndices::plane)
          std::memcpy(indices.get() + 8 * i, &damage[i / 3 % 7], 8);
        else
          indices[i] = i % 2 == 0 ? 255 : static_cast<uint8_t>(box(g, 0) * box(g, 1) * box(g, 2));
      }
      run_call(backward, {grad_y.get(), indices.get(), got_grad.get()}, team);
      if (all && kind == PoolIndices::plane)
        expect(g, layout, "max gradient of damaged indices", got_grad.get(), grad_rest);
    }
  }
}

template <class T>
void check_avg(const PoolGeometry& g, Layout layout, bool include_pad, int64_t override) {
  const int64_t planes = g.batch * g.channels, in = volume(g.in), out = volume(g.out);
  const Exact<T> x(planes * in), grad_y(planes * out);
  fill(x.get(), planes * in, Values::integers, 3);
  fill(grad_y.get(), planes * out, Values::integers, 4);
  std::vector<double> y(static_cast<size_t>(planes * out)), grad_x(static_cast<size_t>(planes * in)),
      magnitudes(grad_x.size());
  for (int64_t plane = 0; plane < planes; ++plane) {
    int64_t at = 0;
    for (int64_t d = 0; d < g.out[0]; ++d)
      for (int64_t h = 0; h < g.out[1]; ++h)
        for (int64_t w = 0; w < g.out[2]; ++w, ++at) {
          const std::vector<Tap> taps = taps_of(g, d, h, w);
          const double by = divisor(g, d, h, w, taps.size(), include_pad, override);
          const auto to = static_cast<size_t>(index_of(g, layout, plane, at, out));
          for (const Tap& tap : taps) {
            const auto from = static_cast<size_t>(index_of(g, layout, plane, tap.position, in));
            y[to] += widen(x[from]);
            grad_x[from] += widen(grad_y[to]) / by;
            magnitudes[from] += std::fabs(widen(grad_y[to]) / by);
          }
          y[to] /= by;
        }
  }
  std::vector<T> first_y, first_grad;
  for (const Team& team : kTeams) {
    std::vector<T> got(y.size()), got_grad(grad_x.size());
    const Exact<T> exact_y(planes * out), exact_grad(planes * in);
    run_call(AvgPoolForward{kDType<T>, layout, g, include_pad, override}, {x.get(), exact_y.get()}, team);
    run_call(AvgPoolBackward{kDType<T>, layout, g, include_pad, override}, {grad_y.get(), exact_grad.get()}, team);
    std::copy_n(exact_y.get(), got.size(), got.begin());
    std::copy_n(exact_grad.get(), got_grad.size(), got_grad.begin());
    expect(g, layout, "avg", got.data(), y, 2);
    const double compute = kDType<T> == DType::f64 ? 0x1p-53 : 0x1p-24;
    for (size_t i = 0; i < grad_x.size(); ++i) {
      const double bound = 64 * compute * magnitudes[i] + 1.01 * unit_roundoff(kDType<T>) * std::fabs(grad_x[i]) +
                           (kDType<T> == DType::f16 ? 0x1p-24 : 0);
      if (!(std::fabs(widen(got_grad[i]) - grad_x[i]) <= bound)) {
        fail(g, layout, "avg gradient");
        break;
      }
    }
    if (first_y.empty()) first_y = got, first_grad = got_grad;
    if (!same_bits(first_y, got) || !same_bits(first_grad, got_grad)) fail(g, layout, "avg threads");
  }
}

int64_t out_size(int64_t in, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation, bool ceil) {
  const int64_t span = in + 2 * padding - dilation * (kernel - 1) - 1;
  if (span < 0) return 0;
  int64_t out = (span + (ceil ? stride - 1 : 0)) / stride + 1;
  if (ceil && (out - 1) * stride >= in + padding) --out;
  return out;
}

PoolGeometry fixed(int64_t batch, int64_t channels, std::vector<int64_t> in, std::vector<int64_t> kernel,
                   std::vector<int64_t> stride, std::vector<int64_t> padding, std::vector<int64_t> dilation,
                   bool ceil) {
  PoolGeometry g = {batch, channels, {1, 1, 1}, {1, 1, 1}, {1, 1, 1}, {1, 1, 1}, {0, 0, 0}, {1, 1, 1}, false};
  const size_t first = 3 - in.size();
  for (size_t i = 0; i < in.size(); ++i) {
    g.in[first + i] = in[i];
    g.kernel[first + i] = kernel[i];
    g.stride[first + i] = stride[i];
    g.padding[first + i] = padding[i];
    g.dilation[first + i] = dilation[i];
    g.out[first + i] = out_size(in[i], kernel[i], stride[i], padding[i], dilation[i], ceil);
  }
  return g;
}

PoolGeometry square(int64_t batch, int64_t channels, int64_t in, int64_t kernel, int64_t stride, int64_t padding,
                    int64_t dilation = 1, bool ceil = false) {
  return fixed(batch, channels, {in, in + 1}, {kernel, kernel}, {stride, stride}, {padding, padding},
               {dilation, dilation}, ceil);
}

PoolGeometry adaptive(int64_t batch, int64_t channels, std::vector<int64_t> in, std::vector<int64_t> out) {
  PoolGeometry g = {batch, channels, {1, 1, 1}, {1, 1, 1}, {0, 0, 0}, {0, 0, 0}, {0, 0, 0}, {0, 0, 0}, true};
  const size_t first = 3 - in.size();
  for (size_t i = 0; i < in.size(); ++i) {
    g.in[first + i] = in[i];
    g.out[first + i] = out[i];
  }
  return g;
}

std::vector<PoolGeometry> geometries() {
  std::vector<PoolGeometry> all;
  for (int64_t in : {2, 5, 15, 16, 17, 28, 31, 33, 64, 67})
    for (int64_t channels : {1, 3}) {
      all.push_back(square(2, channels, in, 2, 2, 0));
      all.push_back(square(1, channels, in, 2, 2, 1, 1, true));
      all.push_back(square(2, channels, in, 2, 1, 0));
      if (in < 5) continue;
      all.push_back(square(2, channels, in, 3, 2, 1));
      all.push_back(square(1, channels, in, 3, 2, 0, 1, true));
      all.push_back(square(1, channels, in, 3, 1, 1));
      all.push_back(square(1, channels, in, 3, 3, 0, 1, true));
      all.push_back(square(1, channels, in, 5, 4, 2));
      all.push_back(square(1, channels, in, 2, 2, 1, 2));
    }
  for (int64_t channels : {1, 2, 7, 8, 15, 16, 17, 31, 33, 64, 65, 100}) all.push_back(square(1, channels, 6, 3, 2, 1));
  all.push_back(square(1, 2, 40, 17, 1, 8));                      // more than 256 taps
  all.push_back(square(1, 2, 40, 16, 3, 0));                      // exactly 256
  all.push_back(fixed(1, 3, {3000}, {2}, {2}, {0}, {1}, false));  // rows longer than a band
  all.push_back(fixed(1, 3, {3001}, {3}, {2}, {1}, {1}, true));
  all.push_back(fixed(1, 1, {20000}, {5}, {1}, {2}, {3}, false));  // and than a piece
  all.push_back(fixed(1, 1, {20000}, {9}, {7}, {4}, {1}, false));
  all.push_back(fixed(1, 1, {9000}, {8000}, {500}, {0}, {1}, false));
  all.push_back(fixed(1, 2, {5, 6, 7}, {2, 2, 2}, {2, 2, 2}, {0, 0, 0}, {1, 1, 1}, false));
  all.push_back(fixed(2, 2, {7, 6, 9}, {3, 2, 3}, {2, 1, 2}, {1, 1, 1}, {1, 2, 1}, true));
  all.push_back(fixed(1, 2, {4, 5, 33}, {3, 3, 3}, {1, 1, 1}, {1, 1, 1}, {1, 1, 1}, false));
  all.push_back(fixed(1, 1, {1, 1}, {2, 2}, {1, 1}, {1, 1}, {4, 4}, false));  // windows without elements
  for (const auto& [in, out] :
       std::vector<std::pair<int64_t, int64_t>>{{7, 1}, {8, 2}, {10, 7}, {3, 5}, {1, 3}, {28, 1}, {33, 7}})
    for (int64_t channels : {1, 19}) {
      all.push_back(adaptive(2, channels, {in}, {out}));
      all.push_back(adaptive(2, channels, {in, in + 1}, {out, out}));
      if (in < 20) all.push_back(adaptive(1, channels, {in, in, in}, {out, out + 1, out}));
    }
  all.push_back(adaptive(1, 3, {100, 120}, {1, 1}));
  all.push_back(fixed(0, 3, {5, 5}, {2, 2}, {2, 2}, {0, 0}, {1, 1}, false));
  std::mt19937 random(5);
  const auto number = [&](int64_t low, int64_t high) {
    return low + static_cast<int64_t>(random()) % (high - low + 1);
  };
  while (all.size() < 500) {
    const size_t dims = static_cast<size_t>(number(1, 3));
    std::vector<int64_t> in, kernel, stride, padding, dilation;
    for (size_t i = 0; i < dims; ++i) {
      in.push_back(number(1, dims == 1 ? 200 : dims == 2 ? 24 : 9));
      kernel.push_back(number(1, 5));
      stride.push_back(number(1, 4));
      dilation.push_back(number(1, 3));
      padding.push_back(number(0, kernel.back() / 2));
    }
    const PoolGeometry g = fixed(number(1, 2), number(1, 20), in, kernel, stride, padding, dilation, number(0, 1) == 1);
    if (volume(g.out) > 0) all.push_back(g);
  }
  return all;
}

// The gradient of no outputs is zero, along whichever axis there are none.
template <class T>
void check_no_outputs() {
  for (const PoolGeometry& g : {adaptive(2, 3, {12, 12}, {0, 11}), adaptive(1, 3, {12, 12}, {11, 0}),
                                adaptive(2, 3, {6, 5, 7}, {2, 0, 3}), adaptive(1, 2, {6, 5, 7}, {0, 3, 4})})
    for (const Layout layout : {Layout::channels_first, Layout::channels_last}) {
      const auto size = static_cast<size_t>(g.batch * g.channels * volume(g.in));
      std::vector<T> grad_x(size, narrow<T>(NAN)), other(size, narrow<T>(NAN));
      run_call(AvgPoolBackward{kDType<T>, layout, g, true, 0}, {nullptr, grad_x.data()}, Team{});
      run_call(MaxPoolBackward{kDType<T>, layout, g, PoolIndices::window}, {nullptr, nullptr, other.data()}, Team{});
      for (size_t i = 0; i < size; ++i)
        if (widen(grad_x[i]) != 0 || widen(other[i]) != 0) return fail(g, layout, "the gradient of no outputs");
    }
}

template <class T>
void check_dtype() {
  check_no_outputs<T>();
  int64_t i = 0;
  for (const PoolGeometry& g : geometries())
    for (const Layout layout : {Layout::channels_first, Layout::channels_last}) {
      ++i;
      check_max<T>(g, layout, i % 3 == 0 ? Values::special : i % 7 == 0 ? Values::lowest : Values::integers);
      const bool plain = g.adaptive || (g.dilation[0] == 1 && g.dilation[1] == 1 && g.dilation[2] == 1);
      if (plain) check_avg<T>(g, layout, i % 4 < 2, i % 5 == 0 ? 3 : 0);
    }
}

}  // namespace

int main(int argc, char** argv) {
  return run_tiers(argc, argv, []<class T>(bool) { check_dtype<T>(); });
}
