// Peak rates for benchmarks: only multiply-adds, in registers, in enough independent chains to hide their latency.
#pragma once

#include "../../gemm/cpu/amx.inl"
#include "../../gemm/cpu/panels.inl"
#include "numbers.inl"
#include "vec.h"

inline double monotonic_seconds() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}

constexpr int kPeakChains = 12;

// acc = step(acc) on every chain, `steps` times.
template <class Step>
__attribute__((noinline)) void run_chains(int64_t steps, Vec<float>* result, Step step) {
  Vec<float> acc[kPeakChains];
#pragma GCC unroll 12
  for (int i = 0; i < kPeakChains; ++i) acc[i] = result[i];
  for (int64_t s = 0; s < steps; ++s) {
#pragma GCC unroll 12
    for (int i = 0; i < kPeakChains; ++i) acc[i] = step(acc[i]);
  }
#pragma GCC unroll 12
  for (int i = 0; i < kPeakChains; ++i) result[i] = acc[i];
}

// GFLOP/s of the best of many short runs of `flop` operations. The best, as the machine may be shared.
template <class Run>
double best_rate(double milliseconds, double flop, Run run) {
  const double start = monotonic_seconds();
  double best = 0, now = start;
  do {
    const double before = now;
    run();
    now = monotonic_seconds();
    best = larger(best, flop / (now - before) * 1e-9);
  } while (now - start < milliseconds * 1e-3);
  return best;
}

// The rate of one vector instruction. The asm statement seems to read memory, so that the compiler keeps runs whose
// results are not used.
template <class Step>
double vector_rate(double milliseconds, double flop_per_lane, Step step) {
  constexpr int64_t kSteps = 20000;
  Vec<float> chains[kPeakChains];
  for (int i = 0; i < kPeakChains; ++i) chains[i] = Vec<float>::set1(1);
  const double flop = flop_per_lane * kPeakChains * Vec<float>::size * static_cast<double>(kSteps);
  return best_rate(milliseconds, flop, [&] {
    run_chains(kSteps, chains, step);
    __asm__ volatile("" : : "r"(chains) : "memory");
  });
}

double peak_f32(double milliseconds) {
  const Vec<float> a = Vec<float>::set1(0.5f), b = Vec<float>::set1(0.25f);
  return vector_rate(milliseconds, 2, [a, b](Vec<float> acc) { return fma(acc, a, b); });
}

double peak_bf16(double milliseconds) {
#if defined(FASTOPS_HAS_AMX)
  constexpr int kSteps = 4000;
  const AmxSession session;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_zero(4);
  _tile_zero(5);
  return best_rate(milliseconds, 4.0 * kSteps * 2 * 16 * 16 * kTileK, [] {
    for (int i = 0; i < kSteps; ++i) {
      _tile_dpbf16ps(0, 4, 5);
      _tile_dpbf16ps(1, 4, 5);
      _tile_dpbf16ps(2, 4, 5);
      _tile_dpbf16ps(3, 4, 5);
    }
  });
#else
#if defined(FASTOPS_HAS_AVX512_BF16)
  if (native_bf16_is_faster()) {
    const __m512i a = _mm512_set1_epi32(0x3c003c00);
    return vector_rate(milliseconds, 4,
                       [a](Vec<float> acc) { return Vec<float>{_mm512_dpbf16_ps(acc.v, (__m512bh)a, (__m512bh)a)}; });
  }
#endif
  return peak_f32(milliseconds);
#endif
}
