// The functions of ptx.cuh for the emulator, each written from the description of its instruction in the PTX ISA.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "simt.h"

namespace fastops::cuda {

inline void* shared_memory() { return simt::shared_memory(); }

[[noreturn]] inline void trap(const char* what) { simt::fail(what); }

inline unsigned cvt_rna_tf32(float x) {
  const unsigned bits = __builtin_bit_cast(unsigned, x);
  return x != x ? bits : (bits + 0x1000) & ~0x1fffu;
}
inline float tf32_value(unsigned bits) { return __builtin_bit_cast(float, bits & ~0x1fffu); }

// The result has the largest error that the instruction may have, in either direction.
inline float rcp_approx(float x) {
  const float exact = 1 / x;
  if (!std::isfinite(exact) || std::fpclassify(exact) != FP_NORMAL) return exact;
  return std::nextafterf(exact, (__builtin_bit_cast(unsigned, x) & 1) != 0 ? INFINITY : -INFINITY);
}

inline void cp_async_16(void* shared, const void* global, int bytes) { simt::copy_async(shared, global, 16, bytes); }
template <int kBytes>
void cp_async_element(void* shared, const void* global, int bytes) {
  static_assert(kBytes == 4 || kBytes == 8);
  simt::copy_async(shared, global, kBytes, bytes);
}
inline void cp_async_commit() { simt::copy_async_commit(); }
template <int kGroups>
void cp_async_wait() {
  simt::copy_async_wait(kGroups);
}

namespace host {

struct LoadMatrix {
  const void* row;
  unsigned* r;
};

// The address of lane i is that of row i % 8 of matrix i / 8. From matrix m, lane i receives element (i / 4, 2 (i % 4))
// and the next one of that row; if transposed, element (2 (i % 4), i / 4) and the next one of that column.
template <bool kTransposed>
void load_matrices(void* const (&lanes)[32]) {
  for (int i = 0; i < 32; ++i)
    for (int m = 0; m < 4; ++m) {
      uint16_t pair[2];
      for (int e = 0; e < 2; ++e) {
        const int row = kTransposed ? 2 * (i % 4) + e : i / 4, column = kTransposed ? i / 4 : 2 * (i % 4) + e;
        const void* begin = static_cast<LoadMatrix*>(lanes[m * 8 + row])->row;
        if (reinterpret_cast<uintptr_t>(begin) % 16 != 0) simt::fail("a row of ldmatrix is misaligned");
        std::memcpy(&pair[e], static_cast<const char*>(begin) + 2 * column, 2);
      }
      static_cast<LoadMatrix*>(lanes[i])->r[m] = pair[0] | static_cast<unsigned>(pair[1]) << 16;
    }
}

struct Multiply {
  float* c;
  const unsigned *a, *b;
};

inline float value_of(uint16_t bits, bf16_t) { return __builtin_bit_cast(float, static_cast<unsigned>(bits) << 16); }
inline float value_of(uint16_t bits, f16_t) {
  _Float16 half;
  std::memcpy(&half, &bits, 2);
  return static_cast<float>(half);
}

// The sum of k products in float32, in order. The order of a GPU is not specified.
template <int k, class A, class B>
void multiply(void* const (&lanes)[32], const A& a, const B& b) {
  for (int g = 0; g < 8; ++g)
    for (int t = 0; t < 4; ++t)
      for (int i = 0; i < 4; ++i) {
        float& c = static_cast<Multiply*>(lanes[4 * g + t])->c[i];
        for (int j = 0; j < k; ++j) c += a(i < 2 ? g : g + 8, j) * b(j, 2 * t + i % 2);
      }
}

// a0 a1: row g, columns 2 t and 2 t + 1; a2 a3: row g + 8; a4 a5: row g, columns 2 t + 8 and + 9; a6 a7: row g + 8.
// b0 b1: rows 2 t and 2 t + 1 of column g; b2 b3: rows 2 t + 8 and + 9. A register holds two of these.
template <class S>
void mma_m16n8k16(void* const (&lanes)[32]) {
  float a[16][16], b[16][8];
  for (int g = 0; g < 8; ++g)
    for (int t = 0; t < 4; ++t) {
      const Multiply& lane = *static_cast<Multiply*>(lanes[4 * g + t]);
      for (int e = 0; e < 8; ++e)
        a[(e / 2) % 2 == 0 ? g : g + 8][2 * t + e % 2 + (e < 4 ? 0 : 8)] =
            value_of(static_cast<uint16_t>(lane.a[e / 2] >> 16 * (e % 2)), S{});
      for (int e = 0; e < 4; ++e)
        b[2 * t + e % 2 + (e < 2 ? 0 : 8)][g] = value_of(static_cast<uint16_t>(lane.b[e / 2] >> 16 * (e % 2)), S{});
    }
  multiply<16>(lanes, [&](int i, int j) { return a[i][j]; }, [&](int i, int j) { return b[i][j]; });
}

// a0: (g, t), a1: (g + 8, t), a2: (g, t + 4), a3: (g + 8, t + 4); b0: (t, g), b1: (t + 4, g).
inline void mma_m16n8k8_tf32(void* const (&lanes)[32]) {
  float a[16][8], b[8][8];
  for (int g = 0; g < 8; ++g)
    for (int t = 0; t < 4; ++t) {
      const Multiply& lane = *static_cast<Multiply*>(lanes[4 * g + t]);
      for (int e = 0; e < 4; ++e) a[e % 2 == 0 ? g : g + 8][e < 2 ? t : t + 4] = tf32_value(lane.a[e]);
      for (int e = 0; e < 2; ++e) b[e == 0 ? t : t + 4][g] = tf32_value(lane.b[e]);
    }
  multiply<8>(lanes, [&](int i, int j) { return a[i][j]; }, [&](int i, int j) { return b[i][j]; });
}

}  // namespace host

inline void ldmatrix_x4(unsigned (&r)[4], const void* row) {
  host::LoadMatrix mine{row, r};
  simt::warp_operation("ldmatrix", &mine, host::load_matrices<false>);
}
inline void ldmatrix_x4_trans(unsigned (&r)[4], const void* row) {
  host::LoadMatrix mine{row, r};
  simt::warp_operation("ldmatrix.trans", &mine, host::load_matrices<true>);
}
template <class S>
void mma_m16n8k16(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2], S) {
  host::Multiply mine{c, a, b};
  simt::warp_operation("mma.m16n8k16", &mine, host::mma_m16n8k16<S>);
}
inline void mma_m16n8k8_tf32(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  host::Multiply mine{c, a, b};
  simt::warp_operation("mma.m16n8k8", &mine, host::mma_m16n8k8_tf32);
}

}  // namespace fastops::cuda
