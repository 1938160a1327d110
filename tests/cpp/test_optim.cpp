// A step of SGD and of Adam against plain loops in double, on every tier of this machine: lists of parameters of any
// size, and parameters that share their memory.
#include <memory>

#include "random.h"

namespace {

template <class T>
using Tensors = std::vector<std::unique_ptr<Numbers<T>>>;

// The tensors of a list of parameters: p, grad, m, v, top of each, one after the other.
template <class T>
struct Parameters {
  Tensors<T> tensors;
  std::vector<std::vector<T>> before;

  explicit Parameters(const std::vector<int64_t>& sizes) {
    for (const int64_t n : sizes)
      for (int i = 0; i < 5; ++i) {
        Numbers<T>& one = *tensors.emplace_back(std::make_unique<Numbers<T>>(n));
        for (int64_t j = 0; j < n && i > 2; ++j) one[j] = std::fabs(one[j]);
        before.emplace_back(one.data(), one.data() + n);
      }
  }
  T* at(size_t piece, size_t which) const { return tensors[5 * piece + which]->data(); }
  // Another step begins with the same numbers.
  void reset() const {
    for (size_t i = 0; i < tensors.size(); ++i) std::copy(before[i].begin(), before[i].end(), tensors[i]->data());
  }
  void compare(const char* what, Bits* bits, const Team& team) const {
    for (size_t i = 0; i < tensors.size(); ++i) bits[i].same(what, team, {{tensors[i]->data(), tensors[i]->bytes()}});
  }
};

// `again`: the last piece is a second one with the memory of the first.
template <class T, class Call>
void check(const std::vector<int64_t>& sizes, bool again, Call call, const typename Call::Options& options) {
  constexpr bool adam = std::is_same_v<Call, AdamStep>;
  const Parameters<T> own(sizes);
  std::vector<size_t> order(sizes.size());
  for (size_t i = 0; i < order.size(); ++i) order[i] = i;
  if (again && !sizes.empty()) order.push_back(0);
  call.in_order = again;
  std::vector<typename Call::Piece> pieces;
  for (const size_t i : order) {
    if constexpr (adam)
      pieces.push_back({own.at(i, 0), own.at(i, 1), own.at(i, 2), own.at(i, 3), call.amsgrad ? own.at(i, 4) : nullptr,
                        sizes[i], -0.01 * double(i + 1), 0.5});
    else
      pieces.push_back({own.at(i, 0), own.at(i, 1), call.with_momentum ? own.at(i, 2) : nullptr, sizes[i]});
  }
  std::vector<Bits> bits(own.tensors.size());
  for (const Team& team : kTeams) {
    own.reset();
    run_call(call, {pieces.data(), static_cast<int64_t>(pieces.size()), &options}, team);
    own.compare(adam ? "adam" : "sgd", bits.data(), team);
  }

  std::vector<std::vector<double>> wanted;
  for (const auto& one : own.before) wanted.emplace_back(one.begin(), one.end());
  for (size_t piece = 0; piece < pieces.size(); ++piece) {
    const size_t i = order[piece];
    for (size_t j = 0; j < static_cast<size_t>(sizes[i]); ++j) {
      double &p = wanted[5 * i][j], &m = wanted[5 * i + 2][j];
      double g = call.maximize ? -wanted[5 * i + 1][j] : wanted[5 * i + 1][j];
      if constexpr (adam) {
        double &v = wanted[5 * i + 3][j], &top = wanted[5 * i + 4][j];
        p *= options.decay;
        g += options.weight_decay * p;
        m += (1 - options.beta1) * (g - m);
        v = options.beta2 * v + (1 - options.beta2) * g * g;
        if (call.amsgrad) top = std::fmax(top, v);
        p += pieces[piece].step_size * m / (std::sqrt(call.amsgrad ? top : v) / pieces[piece].correction + options.eps);
      } else {
        g += options.weight_decay * p;
        if (call.with_momentum) {
          m = options.momentum * m + (1 - options.dampening) * g;
          g = call.nesterov ? g + options.momentum * m : m;
        }
        p -= options.lr * g;
      }
    }
  }
  for (size_t i = 0; i < wanted.size(); ++i)
    for (size_t j = 0; j < wanted[i].size(); ++j)
      expect<T>(adam ? "adam" : "sgd", (*own.tensors[i])[static_cast<int64_t>(j)], wanted[i][j]);
}

template <class T>
void check_both(const std::vector<int64_t>& sizes, bool again) {
  const bool momentum = coin();
  check<T>(sizes, again, SgdStep{kDType<T>, momentum, momentum && coin(), coin(), false},
           SgdStep::Options{0.1, 0.9, coin() ? 0.2 : 0, coin() ? 0.01 : 0});
  const bool decoupled = coin();
  check<T>(sizes, again, AdamStep{kDType<T>, coin(), coin(), false},
           AdamStep::Options{0.9, 0.99, 1e-3, decoupled ? 0 : 0.01, decoupled ? 0.99 : 1});
}

}  // namespace

int main(int argc, char** argv) {
  return run_tiers(argc, argv, []<class T>(bool quick) {
    if constexpr (sizeof(T) >= 4) {
      for (int i = 0; i < (quick ? 30 : 200); ++i) {
        std::vector<int64_t> sizes(static_cast<size_t>(between(0, 5)));
        for (int64_t& n : sizes) n = between(0, 100);
        check_both<T>(sizes, coin());
      }
      check_both<T>({70001, 3, 20000}, false);
    }
  });
}
