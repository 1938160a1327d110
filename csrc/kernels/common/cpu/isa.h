// The instruction sets of this processor, and the tier that the process uses. Compiled without flags of an instruction
// set.
#pragma once

#include "kernel_table.h"

namespace fastops {

// In order, but for those of other kinds of processors: neon is 64-bit Arm's, the others but scalar are x86-64's.
enum class Isa : int { scalar, avx2, avx512, avx512_bf16, amx, neon, count };

const char* isa_name(Isa isa);

// The best tier that the processor, the operating system and this library have. For AMX, Linux must also have granted
// permission.
Isa isa_found();

// isa_found(), or a lower tier chosen by FASTOPS_ISA or set_isa. If FASTOPS_ISA names no tier, or a tier above
// isa_found(), it has no effect and isa_problem() says why. isa_problem() is null otherwise.
Isa isa_used();
const char* isa_problem();

// Selects a tier, for tests. Returns false and changes nothing if the processor does not have it.
bool set_isa(Isa isa);

bool has_kernels(Isa isa);  // whether this library has them; the scalar ones always

const char* cpu_name();  // the processor's brand string

// The kernels of isa_used(), or of the best lower tier with kernels for this dtype.
const KernelTable& kernels(DType dtype);
// The kernels of isa_used(), for products of integers.
const KernelTable& integer_kernels();

template <class Call>
const KernelTable& kernels_of(const Call& call) {
  if constexpr (requires { Call::integer_products; })
    return integer_kernels();
  else
    return kernels(dtype_of(call));
}

}  // namespace fastops
