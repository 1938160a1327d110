// Conversions of the 16-bit storage types by integer arithmetic, for targets without instructions for them. Included
// inside a namespace, like vec.h. They round to nearest even. Overflow gives infinity, NaN stays NaN, denormals are
// kept.
#pragma once

FASTOPS_HOST_FN float float_of_bits(uint32_t bits) { return __builtin_bit_cast(float, bits); }
FASTOPS_HOST_FN uint32_t bits_of_float(float x) { return __builtin_bit_cast(uint32_t, x); }

FASTOPS_HOST_FN float widen(bf16_t x) { return float_of_bits(static_cast<uint32_t>(x.bits) << 16); }
FASTOPS_HOST_FN float widen(f16_t x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16;
  const uint32_t exponent = x.bits >> 10 & 31, fraction = x.bits & 1023;
  if (exponent == 31) return float_of_bits(sign | 0x7f800000 | fraction << 13 | (fraction != 0 ? 0x400000u : 0u));
  if (exponent == 0) return float_of_bits(sign | bits_of_float(static_cast<float>(fraction) * 0x1p-24f));
  return float_of_bits(sign | (exponent + 112) << 23 | fraction << 13);
}
FASTOPS_HOST_FN void narrow(float x, bf16_t* p) {
  const uint32_t bits = bits_of_float(x);
  p->bits = static_cast<uint16_t>(x != x ? bits >> 16 | 0x40 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
FASTOPS_HOST_FN void narrow(float x, f16_t* p) {
  const uint32_t bits = bits_of_float(x), magnitude = bits & 0x7fffffff;
  uint32_t half;
  if (magnitude > 0x7f800000) {
    half = 0x7e00 | (magnitude >> 13 & 1023);
  } else if (magnitude >= 0x477ff000) {  // 65520 and up round to infinity
    half = 0x7c00;
  } else if (magnitude < 0x38800000) {  // denormal: adding 0.5 leaves the rounded multiple of 2^-24 in the low bits
    half = bits_of_float(float_of_bits(magnitude) + 0.5f) - 0x3f000000;
  } else {
    half = (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13;
  }
  p->bits = static_cast<uint16_t>(half | (bits >> 16 & 0x8000));
}
