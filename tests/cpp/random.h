// Random sizes and numbers between guard pages, and what is compared: numbers within a bound, bits between teams.
#pragma once

#include <cmath>
#include <random>

#include "tiers.h"

namespace {

std::mt19937 generator(1);
int64_t between(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(generator); }
bool coin() { return between(0, 1) != 0; }

// Normal numbers that begin or end at a page that faults.
template <class T>
struct Numbers {
  int64_t count;
  Pages pages;
  explicit Numbers(int64_t count, bool at_end = coin()) : count(count), pages(bytes(), at_end, sizeof(T)) {
    std::normal_distribution<double> normal;
    for (int64_t i = 0; i < count; ++i) data()[i] = static_cast<T>(normal(generator));
  }
  size_t bytes() const { return static_cast<size_t>(count) * sizeof(T); }
  T* data() const { return static_cast<T*>(pages.data()); }
  T& operator[](int64_t i) const { return data()[i]; }
};

// `terms`: how many numbers are summed. An infinity or NaN must be where it is wanted.
template <class T>
void expect(const char* what, double got, double wanted, int64_t terms = 1) {
  const double bound = (sizeof(T) == 8 ? 1e-12 : 1e-4) * (1 + std::fabs(wanted)) * std::sqrt(double(terms));
  if (std::fabs(got - wanted) <= bound || got == wanted || (std::isnan(got) && std::isnan(wanted)) || ++failures > 20)
    return;
  std::printf("FAIL %s %s: got %.9g, wanted %.9g\n", isa_name(isa_used()), what, got, wanted);
}

// What a first team wrote, which every other one must write, too.
class Bits {
 public:
  void same(const char* what, const Team& team, std::initializer_list<std::pair<const void*, size_t>> results) {
    std::vector<char> bytes;
    for (const auto& [data, size] : results)
      bytes.insert(bytes.end(), static_cast<const char*>(data), static_cast<const char*>(data) + size);
    if (first_.empty()) first_ = bytes;
    if (first_ != bytes && ++failures < 20)
      std::printf("FAIL %s %s: other bits with %d threads\n", isa_name(isa_used()), what, team.threads);
  }

 private:
  std::vector<char> first_;
};

}  // namespace
