// Every PTX instruction that the kernels use, each behind a function. For compilers other than nvcc, the emulator has
// functions with the same names (tests/emulator/ptx_host.h), written from the descriptions in the PTX ISA.
//
// The fragments of the matrix instructions for lane = 4 g + t are those of mma.m16n8k16 and mma.m16n8k8 in the PTX ISA:
//   a[0], a[1]  rows g and g + 8; columns 2 t and 2 t + 1 (tf32: column t)
//   a[2], a[3]  the same rows, 8 (tf32: 4) columns further
//   b[0]        column g; rows 2 t and 2 t + 1 (tf32: row t)
//   b[1]        the same column, 8 (tf32: 4) rows further
//   c[0], c[1]  row g, columns 2 t and 2 t + 1
//   c[2], c[3]  row g + 8, the same columns
#pragma once

#include "../tensor.h"

#if !defined(__CUDACC__)
#include "ptx_host.h"
#else

namespace fastops::cuda {

// The shared memory of the block, of the size given at the launch, 16-byte aligned.
__device__ inline void* shared_memory() {
  extern __shared__ __align__(16) unsigned char fastops_shared[];
  return fastops_shared;
}

__device__ inline unsigned shared_address(const void* shared) {
  return static_cast<unsigned>(__cvta_generic_to_shared(shared));
}

// ---- conversions, rounding to nearest even; NaN stays NaN

__device__ inline bf16_t cvt_rn_bf16(float x) {
  bf16_t y;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
}
__device__ inline f16_t cvt_rn_f16(float x) {
  f16_t y;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
}
__device__ inline float cvt_f32(f16_t x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}
// Rounds to tf32, halves away from zero. The result is a float with 10 bits of fraction.
__device__ inline unsigned cvt_rna_tf32(float x) {
  unsigned y;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
  return y;
}

// 1 / x within 1 ulp, for a normal x and a normal result.
__device__ inline float rcp_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Ends the program, as an assertion of PyTorch's kernels does.
__device__ inline void trap(const char*) { asm volatile("trap;"); }

// ---- asynchronous copies from global to shared memory

// Copies 16 bytes: the first `bytes` are read, the others are zero. Both addresses are 16-byte aligned.
__device__ inline void cp_async_16(void* shared, const void* global, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(bytes)
               : "memory");
}
// Copies kBytes (4 or 8) bytes, or writes zeros if `bytes` is 0.
template <int kBytes>
__device__ inline void cp_async_element(void* shared, const void* global, int bytes) {
  static_assert(kBytes == 4 || kBytes == 8);
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(shared)), "l"(global), "n"(kBytes),
               "r"(bytes)
               : "memory");
}
// Makes a group of this thread's copies since its last group.
__device__ inline void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most the last kGroups groups of this thread are pending.
template <int kGroups>
__device__ inline void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
}

// ---- matrix instructions of a whole warp

// Loads four 8x8 matrices of 16-bit numbers. Lane i passes the address of row i % 8 of matrix i / 8. It receives, in
// r[m], elements 2 (i % 4) and 2 (i % 4) + 1 of row i / 4 of matrix m.
__device__ inline void ldmatrix_x4(unsigned (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
// The same, with every matrix transposed.
__device__ inline void ldmatrix_x4_trans(unsigned (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// c += a b, for a of 16x16 and b of 16x8.
__device__ inline void mma_m16n8k16(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2], bf16_t) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ inline void mma_m16n8k16(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2], f16_t) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
// c += a b, for a of 16x8 and b of 8x8, in tf32.
__device__ inline void mma_m16n8k8_tf32(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

}  // namespace fastops::cuda

#endif
