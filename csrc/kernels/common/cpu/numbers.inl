// Arithmetic of sizes, and comparison of types: no inline template of std is called in a tier's namespace.
#pragma once

template <class A, class B>
constexpr bool same_type = false;
template <class A>
constexpr bool same_type<A, A> = true;

template <class T>
inline T smaller(T a, T b) {
  return a < b ? a : b;
}
template <class T>
inline T larger(T a, T b) {
  return a > b ? a : b;
}
inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }  // also for mixed integers
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
inline int64_t floor_div(int64_t a, int64_t b) { return a >= 0 ? a / b : -ceil_div(-a, b); }
// Bytes, rounded up to whole cache lines.
inline size_t aligned(int64_t bytes) { return static_cast<size_t>(round_up(bytes, 64)); }

inline int64_t greatest_common_divisor(int64_t a, int64_t b) {
  while (b != 0) {
    const int64_t rest = a % b;
    a = b;
    b = rest;
  }
  return a;
}
