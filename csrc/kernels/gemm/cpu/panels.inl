// The type of the panels of a product.
#pragma once

#include "../../common/cpu/common.inl"
#include "amx.inl"
#include "microkernels.inl"

#if defined(FASTOPS_HAS_AVX512_BF16)
// VDPBF16PS does the work of two float32 multiply-adds. Zen 5 executes as many of both (530 against 265 GF/s per core),
// Granite Rapids a quarter as many (107 against 212).
inline bool native_bf16_is_faster() { return __builtin_cpu_is("amd") != 0; }
#endif

// Below this many multiply-adds, configuring AMX tiles costs more than they save (Granite Rapids).
constexpr int64_t kAmxWork = 16 * 1024;

// body(P{}) with the panel type P for a product of type T with `work` multiply-adds.
template <class T, class Body>
inline auto with_panel(Bf16Multiply multiply, int64_t work, Body&& body) {
  (void)multiply;
  (void)work;
  if constexpr (same_type<T, bf16_t>) {
#if defined(FASTOPS_HAS_AMX)
    const bool native = multiply == Bf16Multiply::automatic ? work >= kAmxWork : multiply == Bf16Multiply::native;
    if (native) return body(bf16_amx{});
#elif defined(FASTOPS_HAS_AVX512_BF16)
    const bool native =
        multiply == Bf16Multiply::automatic ? native_bf16_is_faster() : multiply == Bf16Multiply::native;
    if (native) return body(bf16_pair{});
#endif
  }
  return body(Compute<T>{});
}
