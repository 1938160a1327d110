// What this processor can do, and which tier the process uses. Compiled for the baseline.
#pragma once

#include "kernel_table.h"

namespace fastops {

enum class Isa : int { scalar, avx2, avx512, avx512_bf16, amx, count };

const char* isa_name(Isa isa);

// The best tier that processor and operating system support (AMX: with permission granted by the kernel).
Isa isa_found();

// The best tier, lowered by FASTOPS_ISA or set_isa. A FASTOPS_ISA that names no tier or one above isa_found() is
// reported by isa_problem() (null when fine) and leaves the tier at isa_found().
Isa isa_used();
const char* isa_problem();

// For tests: use this tier from now on. Returns false, changing nothing, when the processor does not have it.
bool set_isa(Isa isa);

const char* cpu_name();  // the processor's brand string

// The kernels of isa_used(), or of the best tier below it that has any for this dtype.
const KernelTable& kernels(DType dtype);

}  // namespace fastops
